//! Links that fail and come back, each in the way that one does.

use std::process::Command;

use anyhow::Context;

use super::{Host, INTERFACE, Lab, ip, run};

/// The table of the rules that reject, in the destination's namespace.
const TABLE: &str = "postcopy-outage";

/// How a link between source and destination fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// Nothing passes, and nobody is told.
    Silence,
    /// The source's interface is down: whoever sends there is told so.
    Down,
    /// Whatever comes is answered with a reset, or where there is none, that nobody listens.
    Reject,
}

impl Lab {
    /// The link fails.
    ///
    /// # Errors
    /// If `ip` or `nft` do.
    pub fn begin(&self, outage: Outage) -> anyhow::Result<()> {
        match outage {
            Outage::Silence => self.cut(Host::Source),
            Outage::Down => ip(["-n", &self.namespace(Host::Source), "link", "set", INTERFACE, "down"]),
            Outage::Reject => {
                let hook = "type filter hook input priority 0; policy accept";
                let rules = "meta l4proto tcp reject with tcp reset\nmeta l4proto udp reject";
                self.nft(&format!("table inet {TABLE} {{\nchain input {{\n{hook}\n{rules}\n}}\n}}\n"))
            }
        }
    }

    /// It is up again.
    ///
    /// # Errors
    /// If `ip` or `nft` fail.
    pub fn end(&self, outage: Outage) -> anyhow::Result<()> {
        match outage {
            Outage::Silence => self.restore(Host::Source),
            Outage::Down => ip(["-n", &self.namespace(Host::Source), "link", "set", INTERFACE, "up"]),
            Outage::Reject => self.nft(&format!("delete table inet {TABLE}")),
        }
    }

    fn nft(&self, rules: &str) -> anyhow::Result<()> {
        let mut command: Command = self.run_in(Host::Destination, "nft");
        command.arg(rules);
        run(&mut command)
    }

    /// Bytes that have come to a host over its link.
    ///
    /// # Errors
    /// If its namespace cannot be entered, or the kernel does not count.
    pub fn bytes_received(&self, host: Host) -> anyhow::Result<u64> {
        let text = self.inside(host, || std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(INTERFACE)?.strip_prefix(':'));
        let bytes = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        bytes.context("no count of what came")
    }
}
