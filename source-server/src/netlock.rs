//! What CRIU leaves behind in the network when a dump ends with the tasks stopped.
//!
//! With `--tcp-established` every established socket stays in repair mode, and packets of the connections
//! stay blocked: by one DROP rule per connection and direction that spares packets with mark 0xc114 (lock
//! method iptables), or by a table of its own (nftables). A connection survives a roll-back only if the
//! sockets leave repair mode first and the rules go then.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use kernel::spawn::CommandSetup;
use kernel::tcp;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use crate::process::{ProcessTree, Task};

/// Packets that CRIU itself sends carry this mark and pass its lock.
const CRIU_MARK: &str = "0xc114";

/// The network namespace in which CRIU locked the network; outlives the tasks.
#[derive(Debug)]
pub struct NetworkLock {
    namespace: Option<File>,
    /// Sockets (by inode) that had `SO_REUSEADDR` set before the freeze: leaving repair mode clears it, and a
    /// server that is restarted later could not bind its port.
    reusing: BTreeSet<String>,
}

/// The TCP and other sockets of a process: inode and a duplicate of each.
fn sockets(task: &Task) -> Vec<(String, OwnedFd)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", task.pid)) else { return Vec::new() };
    let socket = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((inode, task.handle.take(number).ok()?))
    };
    entries.flatten().filter_map(socket).collect()
}

impl NetworkLock {
    /// Remembers the tree's network namespace.
    ///
    /// # Errors
    /// `NotFound` if the tree is gone.
    pub fn of(tree: &ProcessTree) -> io::Result<Self> {
        let namespace = crate::dump::other_network(tree.root().pid)?;
        let set = |(inode, socket): (String, OwnedFd)| {
            matches!(getsockopt(&socket, sockopt::ReuseAddr), Ok(true)).then_some(inode)
        };
        let reusing = tree.tasks.iter().flat_map(sockets).filter_map(set).collect();
        Ok(Self { namespace, reusing })
    }

    /// The lock around a tree whose network was locked by another process; `reusing` is what it said of it.
    ///
    /// # Errors
    /// `NotFound` if the tree is gone.
    pub fn resumed(tree: &ProcessTree, reusing: BTreeSet<String>) -> io::Result<Self> {
        Ok(Self { namespace: crate::dump::other_network(tree.root().pid)?, reusing })
    }

    /// Sockets, by inode, that had `SO_REUSEADDR` set before the freeze.
    #[must_use]
    pub const fn reusing(&self) -> &BTreeSet<String> {
        &self.reusing
    }

    /// Takes every TCP socket of the tree out of repair mode; returns how many there were.
    #[must_use]
    pub fn end_repair(&self, tree: &ProcessTree) -> usize {
        let mut ended = 0;
        for (inode, socket) in tree.tasks.iter().flat_map(sockets) {
            // Sockets that are not TCP have no such option.
            if !matches!(tcp::in_repair(socket.as_fd()), Ok(true)) || tcp::end_repair(socket.as_fd()).is_err()
            {
                continue;
            }
            ended += 1;
            if self.reusing.contains(&inode) {
                if let Err(error) = setsockopt(&socket, sockopt::ReuseAddr, &true) {
                    tracing::warn!(inode, "SO_REUSEADDR could not be set again: {error}");
                }
            }
        }
        ended
    }

    /// Removes CRIU's rules; returns what could not be removed.
    #[must_use]
    pub fn unlock(&self) -> Vec<String> {
        let mut failed = Vec::new();
        for tool in ["iptables", "ip6tables"] {
            let Some(rules) = self.output(&format!("{tool}-save"), &[]) else { continue };
            for rule in rules.lines().filter(|rule| is_lock_rule(rule)) {
                let mut words = vec!["-w"];
                words.extend(rule.split_whitespace());
                words[1] = "-D";
                if self.output(tool, &words).is_none() {
                    failed.push(format!("{tool} {}", words.join(" ")));
                }
            }
        }
        let tables = self.output("nft", &["list", "tables"]).unwrap_or_default();
        for table in tables.lines().filter_map(lock_table) {
            let words = ["delete", "table", "inet", table];
            if self.output("nft", &words).is_none() {
                failed.push(format!("nft {}", words.join(" ")));
            }
        }
        failed
    }

    /// Standard output of a command in the namespace, if it could be run and succeeded.
    fn output(&self, program: &str, args: &[&str]) -> Option<String> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stderr(Stdio::null());
        if let Some(namespace) = &self.namespace {
            command.enter_namespace(namespace.try_clone().ok()?.into());
        }
        let output = command.output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A rule of `iptables-save` that CRIU made to lock one connection.
fn is_lock_rule(rule: &str) -> bool {
    rule.starts_with("-A ") && rule.contains(CRIU_MARK) && rule.trim_end().ends_with("-j DROP")
}

/// The table that CRIU made, in a line of `nft list tables`.
fn lock_table(line: &str) -> Option<&str> {
    let name = line.strip_prefix("table inet ")?.trim();
    let pid = name.strip_prefix("CRIU-")?;
    (!pid.is_empty() && pid.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_crius_own_rules_are_taken() {
        let lock =
            "-A INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 1 -j DROP";
        assert!(is_lock_rule(lock));
        assert!(!is_lock_rule("-A INPUT -p tcp -j DROP"));
        assert!(!is_lock_rule("-A INPUT -m mark --mark 0xc114 -j ACCEPT"));
        assert!(!is_lock_rule("# 0xc114 -j DROP"));
        assert_eq!(lock_table("table inet CRIU-123"), Some("CRIU-123"));
        assert_eq!(lock_table("table inet filter"), None);
        assert_eq!(lock_table("table inet CRIU-1; flush"), None);
    }
}
