//! A move from the source to the destination of a lab, as an experiment starts it and waits for it.

use std::ffi::OsString;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use host::criu::Criu;
use host::identity::Identity;
use protocol::link::LinkKind;

use crate::lab::{Host, Lab, SERVICE, wait_listening};
use crate::report::MoveReport;
use crate::tool::{Tool, Used, beside, wait_both};

/// Where the daemon listens.
const PORT: u16 = 7300;
const LISTEN_LIMIT: Duration = Duration::from_secs(30);

/// Why this CRIU cannot move a process with its connections here, if it cannot.
#[must_use]
pub fn service_obstacle(criu: &Criu) -> Option<String> {
    (!criu.dumps_internet_sockets()).then(|| {
        let version = &criu.version;
        format!(
            "criu {version} cannot dump Internet sockets on this kernel; use 4.2 or later (scripts/setup --criu-next, \
             then --criu PATH)"
        )
    })
}

/// How a process is moved.
#[derive(Debug)]
pub struct Crossing<'a> {
    /// The hosts.
    pub lab: &'a Lab,
    /// The destination; [`Host::Source`] is a move over loopback.
    pub to: Host,
    /// The kind of link, as `--link` takes it.
    pub link: &'a str,
    /// Further arguments of `source-server move` and of `uffd-daemon serve`.
    pub arguments: [Vec<OsString>; 2],
    /// Whether the service address and its open connections move along.
    pub with_service: bool,
    /// The CRIU to use.
    pub criu: &'a Path,
    /// Where logs and reports go.
    pub dir: &'a Path,
}

/// A move that was started. Dropping it kills its tools; what they restored ends with the lab.
#[derive(Debug)]
pub struct Moving {
    /// `source-server move`
    pub source: Tool,
    /// `uffd-daemon serve`
    pub destination: Tool,
    /// Where the source and the destination write their reports.
    pub reports: [PathBuf; 2],
}

/// A move that has ended well.
#[derive(Clone, Debug)]
pub struct Moved {
    /// What the source reports.
    pub source: MoveReport,
    /// What the destination reports.
    pub destination: MoveReport,
    /// What the tools used, with when they ended.
    pub used: (Used, Used),
}

impl Crossing<'_> {
    /// Starts the daemon, waits until it listens, and starts the move of `pid`.
    ///
    /// # Errors
    /// If one of them does not start.
    pub fn start(&self, pid: u32) -> anyhow::Result<Moving> {
        let reports = ["source", "destination"].map(|side| self.dir.join(format!("{side}.json")));
        let peer = format!("{}:{PORT}", self.address());
        let [source_identity, destination_identity] = self.identities()?;
        let mut serve = self.lab.run_in(self.to, beside("uffd-daemon")?);
        serve.args(["serve", "--listen", &peer, "--once", "--link", self.link, "--insecure", "--json"]);
        serve.arg(&reports[1]).args(destination_identity).args(&self.arguments[1]);
        if self.with_service {
            serve.arg("--hook").arg(format!("pre-restore={}", self.lab.add_address_command(SERVICE)));
            serve.arg("--hook").arg(format!("post-restore={}", self.lab.announce_command(SERVICE)));
        }
        self.finish(&mut serve, "destination")?;
        let destination = Tool::start("uffd-daemon", serve, self.dir.join("uffd-daemon.log"))?;
        wait_listening(self.lab, self.to, PORT, &destination, LISTEN_LIMIT)?;

        let mut start = self.lab.run_in(Host::Source, beside("source-server")?);
        start.args([
            "move",
            "--pid",
            &pid.to_string(),
            "--to",
            &peer,
            "--link",
            self.link,
            "--insecure",
            "--json",
        ]);
        start.arg(&reports[0]).args(source_identity).args(&self.arguments[0]);
        if self.with_service {
            start.arg("--hook").arg(format!("post-dump={}", self.lab.remove_address_command(SERVICE)));
        }
        self.finish(&mut start, "source")?;
        let source = Tool::start("source-server", start, self.dir.join("source-server.log"))?;
        Ok(Moving { source, destination, reports })
    }

    /// What a link that authenticates both sides needs: each has a key of its own, and knows the other's.
    fn identities(&self) -> anyhow::Result<[Vec<OsString>; 2]> {
        if !self.link.parse::<LinkKind>().map_err(anyhow::Error::msg)?.authenticates() {
            return Ok(Default::default());
        }
        let [source, destination] = ["source-key", "destination-key"].map(|name| self.dir.join(name));
        let print = |dir| Identity::make(dir).map(|identity| identity.fingerprint().to_string());
        let (source_print, destination_print) = (print(&source)?, print(&destination)?);
        let side = |own: PathBuf, peer: String| -> Vec<OsString> {
            vec!["--identity".into(), own.into(), "--peer".into(), peer.into()]
        };
        Ok([side(source, destination_print), side(destination, source_print)])
    }

    fn address(&self) -> Ipv4Addr {
        if self.to == Host::Source { Ipv4Addr::LOCALHOST } else { self.lab.destination_address() }
    }

    /// What both tools are told alike, at the end of their command lines.
    fn finish(&self, command: &mut Command, side: &str) -> anyhow::Result<()> {
        // A process group of its own: Ctrl-C is for the experiment, which lets the run in hand end.
        command.process_group(0);
        let work_dir = self.dir.join(side);
        fs::create_dir_all(&work_dir).with_context(|| format!("creating {work_dir:?}"))?;
        command.arg("--work-dir").arg(work_dir).arg("--criu").arg(self.criu);
        if self.with_service {
            command.args(["--", "--tcp-established"]);
        }
        Ok(())
    }
}

impl Moving {
    /// Whether both tools still run, or have ended well.
    ///
    /// # Errors
    /// If one failed; with what it said.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for tool in [&mut self.source, &mut self.destination] {
            if tool.has_ended()? {
                let status = tool.wait(Duration::ZERO)?;
                ensure!(status.success(), "{status}: {}", tool.last_lines());
            }
        }
        Ok(())
    }

    /// The last lines of both tools, for messages.
    #[must_use]
    pub fn last_lines(&self) -> String {
        format!("source-server: {}\nuffd-daemon: {}", self.source.last_lines(), self.destination.last_lines())
    }

    /// Whether both tools have ended.
    ///
    /// # Errors
    /// The errno of `poll(2)`.
    pub fn has_ended(&self) -> anyhow::Result<bool> {
        Ok(self.source.has_ended()? && self.destination.has_ended()?)
    }

    /// Waits for the good end of both sides.
    ///
    /// # Errors
    /// If one fails, or does not end within `limit`.
    pub fn wait(mut self, limit: Duration) -> anyhow::Result<Moved> {
        let used = wait_both(&mut self.source, &mut self.destination, limit)?;
        let [source, destination] = self.reports;
        let (source, destination) = (MoveReport::read(&source)?, MoveReport::read(&destination)?);
        ensure!(destination.pages.adds_up(), "pages are missing in the account: {:?}", destination.pages);
        Ok(Moved { source, destination, used })
    }
}
