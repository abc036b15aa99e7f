//! What CRIU leaves behind in the network when a dump ends with the tasks stopped.
//!
//! With `--tcp-established` every established socket stays in repair mode, and packets of the connections
//! stay blocked: by one DROP rule per connection and direction that spares packets with mark 0xc114 (lock
//! method iptables), or by a table of its own (nftables). A connection survives a roll-back only if the
//! sockets leave repair mode first and the rules go then.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use kernel::spawn::CommandSetup;
use kernel::tcp;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use crate::process::{ProcessTree, Task};

/// Packets that CRIU itself sends carry this mark and pass its lock.
const CRIU_MARK: &str = "0xc114";
/// Of the id of a run at least so much is in the name of its table: CRIU cuts it off.
const RUN_ID_MIN: usize = 21;

/// The network namespace in which CRIU locked the network, and what of its lock is this tree's: other trees may be on the
/// move. Outlives the tasks.
#[derive(Debug)]
pub struct NetworkLock {
    namespace: Option<File>,
    /// Sockets (by inode) that had `SO_REUSEADDR` set before the freeze: leaving repair mode clears it, and a
    /// server that is restarted later could not bind its port.
    reusing: BTreeSet<String>,
    /// Connections that the tree has or had.
    connections: BTreeSet<Connection>,
    /// What CRIU's table may be named after, behind `CRIU-`.
    run: String,
}

/// The addresses of a TCP connection: of one end, and of the other.
type Connection = (SocketAddr, SocketAddr);

/// The TCP sockets of a process: inode and a duplicate of each.
fn sockets(task: &Task) -> Vec<(String, OwnedFd)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", task.pid)) else { return Vec::new() };
    let socket = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
        let number = entry.file_name().to_str()?.parse().ok()?;
        let socket = task.handle.take(number).ok()?;
        // Others have no such option.
        tcp::in_repair(socket.as_fd()).is_ok().then_some((inode, socket))
    };
    entries.flatten().filter_map(socket).collect()
}

/// The connection that a socket is of, if it has one.
fn connection(socket: &OwnedFd) -> Option<Connection> {
    let socket = TcpStream::from(socket.try_clone().ok()?);
    // IPv4 by way of an IPv6 socket is locked as IPv4.
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    Some((plain(socket.local_addr().ok()?), plain(socket.peer_addr().ok()?)))
}

impl NetworkLock {
    /// Remembers the tree's network namespace, and what it has to do with it.
    ///
    /// # Errors
    /// `NotFound` if the tree is gone.
    pub fn of(tree: &ProcessTree) -> io::Result<Self> {
        let mut lock = Self::around(tree)?;
        for (inode, socket) in tree.tasks.iter().flat_map(sockets) {
            lock.connections.extend(connection(&socket));
            if matches!(getsockopt(&socket, sockopt::ReuseAddr), Ok(true)) {
                lock.reusing.insert(inode);
            }
        }
        Ok(lock)
    }

    /// The lock around a tree whose network was locked by another process; `reusing` is what it said of it.
    ///
    /// # Errors
    /// `NotFound` if the tree is gone.
    pub fn resumed(tree: &ProcessTree, reusing: BTreeSet<String>) -> io::Result<Self> {
        let mut lock = Self { reusing, ..Self::around(tree)? };
        lock.note_connections(tree);
        Ok(lock)
    }

    fn around(tree: &ProcessTree) -> io::Result<Self> {
        let root = tree.root().pid;
        let (reusing, connections) = (BTreeSet::new(), BTreeSet::new());
        Ok(Self { namespace: crate::dump::other_network(root)?, reusing, connections, run: root.to_string() })
    }

    /// Notes which connections the tree has; those that it had before stay noted.
    pub fn note_connections(&mut self, tree: &ProcessTree) {
        let sockets = tree.tasks.iter().flat_map(sockets);
        self.connections.extend(sockets.filter_map(|(_, socket)| connection(&socket)));
    }

    /// Notes the id of the CRIU that has locked it; older ones have none, and go by the pid of the root.
    pub fn note_run(&mut self, id: Option<&str>) {
        if let Some(id) = id {
            id.clone_into(&mut self.run);
        }
    }

    /// Sockets, by inode, that had `SO_REUSEADDR` set before the freeze.
    #[must_use]
    pub const fn reusing(&self) -> &BTreeSet<String> {
        &self.reusing
    }

    /// Takes every TCP socket of the tree out of repair mode, and notes its connection; returns how many there were.
    #[must_use]
    pub fn end_repair(&mut self, tree: &ProcessTree) -> usize {
        let mut ended = 0;
        for (inode, socket) in tree.tasks.iter().flat_map(sockets) {
            self.connections.extend(connection(&socket));
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

    /// Removes CRIU's rules for the connections that were noted; returns what could not be removed.
    #[must_use]
    pub fn unlock(&self) -> Vec<String> {
        let mut failed = Vec::new();
        for tool in ["iptables", "ip6tables"] {
            let Some(rules) = self.output(&format!("{tool}-save"), &[]) else { continue };
            let ours = |rule: &&str| locked(rule).is_some_and(|locked| self.is_of_tree(locked));
            for rule in rules.lines().filter(ours) {
                let mut words = vec!["-w"];
                words.extend(rule.split_whitespace());
                words[1] = "-D";
                if self.output(tool, &words).is_none() {
                    failed.push(format!("{tool} {}", words.join(" ")));
                }
            }
        }
        let tables = self.output("nft", &["list", "tables"]).unwrap_or_default();
        for (table, run) in tables.lines().filter_map(lock_table) {
            // One that holds no connection is known by its name only.
            let named = run == self.run || (run.len() >= RUN_ID_MIN && self.run.starts_with(run));
            let holds = || {
                let listed = self.output("nft", &["--numeric", "list", "table", "inet", table]);
                listed.is_some_and(|listed| held(&listed).any(|held| self.is_of_tree(held)))
            };
            if !named && !holds() {
                continue;
            }
            let words = ["delete", "table", "inet", table];
            if self.output("nft", &words).is_none() {
                failed.push(format!("nft {}", words.join(" ")));
            }
        }
        failed
    }

    /// Whether packets from one of these to the other are of a connection that was noted.
    fn is_of_tree(&self, (from, to): Connection) -> bool {
        self.connections.contains(&(from, to)) || self.connections.contains(&(to, from))
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

/// From where and to where a rule of `iptables-save` stops packets, if CRIU made it to lock one connection.
fn locked(rule: &str) -> Option<Connection> {
    let words: Vec<&str> = rule.split_whitespace().collect();
    if words.first() != Some(&"-A") || !words.ends_with(&["-j", "DROP"]) || !words.contains(&CRIU_MARK) {
        return None;
    }
    let behind = |option| words.iter().skip_while(|word| **word != option).nth(1);
    let end = |address, port| {
        let (address, _) = behind(address)?.split_once('/')?;
        Some(SocketAddr::new(address.parse().ok()?, behind(port)?.parse().ok()?))
    };
    Some((end("-s", "--sport")?, end("-d", "--dport")?))
}

/// The table that CRIU made, in a line of `nft list tables`: its name, and after what it is named.
fn lock_table(line: &str) -> Option<(&str, &str)> {
    let name = line.strip_prefix("table inet ")?.trim();
    let run = name.strip_prefix("CRIU-")?;
    let plain = run.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    (!run.is_empty() && plain).then_some((name, run))
}

/// The connections in the sets of a table, as `nft list table` shows them: `{ address . port . address . port, ... }`.
fn held(listed: &str) -> impl Iterator<Item = Connection> + '_ {
    listed.split(['{', '}', ',', '=']).filter_map(|element| {
        let [from, from_port, to, to_port] =
            <[&str; 4]>::try_from(element.split(" . ").map(str::trim).collect::<Vec<_>>()).ok()?;
        let end =
            |address: &str, port: &str| Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?));
        Some((end(from, from_port)?, end(to, to_port)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(from: &str, to: &str) -> Connection {
        (from.parse().unwrap(), to.parse().unwrap())
    }

    #[test]
    fn only_crius_own_rules_are_taken() {
        let lock = "-A INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 1 --dport 2 -j DROP";
        assert_eq!(locked(lock), Some(pair("10.0.0.1:1", "10.0.0.2:2")));
        let lock = lock.replace("10.0.0.1/32", "fd00::1/128").replace("10.0.0.2/32", "fd00::2/128");
        assert_eq!(locked(&lock), Some(pair("[fd00::1]:1", "[fd00::2]:2")));
        for other in [lock.replace("0xc114", "0xc115"), lock.replace("DROP", "ACCEPT"), format!("#{lock}")] {
            assert_eq!(locked(&other), None);
        }
        assert_eq!(locked("-A INPUT -p tcp -j DROP"), None);
        assert_eq!(locked("-A INPUT -m mark ! --mark 0xc114 -j DROP"), None, "not of one connection");
    }

    #[test]
    fn only_crius_own_tables_are_taken() {
        assert_eq!(lock_table("table inet CRIU-123"), Some(("CRIU-123", "123")));
        let cut_off = "CRIU-21327b36-5d81-4f09-b5";
        assert_eq!(lock_table(&format!("table inet {cut_off}")), Some((cut_off, &cut_off[5..])));
        assert_eq!(lock_table("table inet filter"), None);
        assert_eq!(lock_table("table inet CRIU-1; flush"), None);
    }

    #[test]
    fn a_table_says_which_connections_it_holds() {
        let listed = "table inet CRIU-1 {
            set conns4 {
                type ipv4_addr . inet_service . ipv4_addr . inet_service
                elements = { 10.0.0.2 . 7 . 10.0.0.1 . 4711,
                             10.0.0.1 . 4711 . 10.0.0.2 . 7 }
            }
            set conns6 {
                type ipv6_addr . inet_service . ipv6_addr . inet_service
                elements = { fd00::1 . 1 . fd00::2 . 2 }
            }
            chain output {
                type filter hook output priority filter; policy accept;
                meta mark 0x0000c114 accept
                ip saddr . tcp sport . ip daddr . tcp dport @conns4 drop
            }
        }";
        let there = pair("10.0.0.1:4711", "10.0.0.2:7");
        let found: Vec<_> = held(listed).collect();
        assert_eq!(found, [(there.1, there.0), there, pair("[fd00::1]:1", "[fd00::2]:2")]);
    }
}
