//! Hosts that are network namespaces: a source, a destination and a client on one switch.
//!
//! ```text
//!   source 10.77.0.1        destination 10.77.0.2        client 10.77.0.3
//!      eth0                     eth0                        eth0            one namespace each
//!       |                        |                            |
//!     source0 ------ br0 ---- destination0 ---------------- client0         the switch, a namespace too
//! ```
//!
//! Source and destination can have a second link of their own with delay and loss ([`Wire::Emulated`]).
//!
//! Nothing is in the namespace of the caller, so the addresses are the same in every lab and labs do not see each
//! other. Names carry the pid of the process that made them: what is left behind is found, and by whom. Dropping a
//! lab kills what still runs in its namespaces, which is what was started or restored there, and removes them.

mod listening;
mod outage;
mod shape;
mod tasks;
mod wire;

use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use anyhow::{Context, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub use listening::wait_listening;
pub use outage::Outage;
pub use shape::Rate;
pub use wire::Wire;

use crate::emulator::Emulator;

const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "postcopy";
const PREFIX_BITS: u8 = 24;
/// The interface of every host.
pub const INTERFACE: &str = "eth0";
/// An address for a service that moves from one host to another.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);

static LABS_MADE: AtomicU32 = AtomicU32::new(0);

/// A host of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Where the process is at first.
    Source,
    /// Where it is moved to.
    Destination,
    /// Where its clients are.
    Client,
}

impl Host {
    const ALL: [Self; 3] = [Self::Source, Self::Destination, Self::Client];

    const fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Client => "client",
        }
    }

    /// Its interface on the switch; at most 15 bytes.
    fn port(self) -> String {
        format!("{}0", self.word())
    }

    /// Its own address.
    #[must_use]
    pub const fn address(self) -> Ipv4Addr {
        match self {
            Self::Source => Ipv4Addr::new(10, 77, 0, 1),
            Self::Destination => Ipv4Addr::new(10, 77, 0, 2),
            Self::Client => Ipv4Addr::new(10, 77, 0, 3),
        }
    }
}

/// The hosts and the switch between them.
#[derive(Debug)]
pub struct Lab {
    name: String,
    emulator: Option<Emulator>,
}

impl Lab {
    /// Makes the namespaces, the switch and the links.
    ///
    /// # Errors
    /// If that is not allowed (it needs root) or `ip` is missing; nothing is left behind then.
    pub fn new() -> anyhow::Result<Self> {
        let name = format!("{PREFIX}{}-{}", std::process::id(), LABS_MADE.fetch_add(1, Relaxed));
        let lab = Self { name, emulator: None }; // dropping it on an error below removes what was made until then
        let switch = lab.switch();
        ip(["netns", "add", &switch])?;
        ip(["-n", &switch, "link", "add", "name", "br0", "type", "bridge"])?;
        ip(["-n", &switch, "link", "set", "br0", "up"])?;
        for host in Host::ALL {
            let (namespace, port) = (lab.namespace(host), host.port());
            ip(["netns", "add", &namespace])?;
            ip(["-n", &namespace, "link", "set", "lo", "up"])?;
            let pair = ["type", "veth", "peer", "name", INTERFACE, "netns", &namespace];
            ip(["-n", &switch, "link", "add", "name", &port].into_iter().chain(pair))?;
            ip(["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
            ip(["-n", &namespace, "link", "set", INTERFACE, "up"])?;
            lab.add_address(host, host.address())?;
        }
        Ok(lab)
    }

    /// The name of a host's namespace, as `ip -n` takes it.
    #[must_use]
    pub fn namespace(&self, host: Host) -> String {
        format!("{}-{}", self.name, host.word())
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    /// The file that a host's namespace is entered by, as `nsenter --net=` takes it.
    #[must_use]
    pub fn path(&self, host: Host) -> PathBuf {
        Path::new(NAMESPACES).join(self.namespace(host))
    }

    /// `program` in a host: `nsenter` becomes it, so the pid is that of the program. Only the network namespace is
    /// entered: with another mount namespace CRIU could not dump what runs there.
    #[must_use]
    pub fn run_in(&self, host: Host, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let mut net = std::ffi::OsString::from("--net=");
        net.push(self.path(host));
        command.arg(net).arg("--").arg(program);
        command
    }

    /// Runs `body` on a thread that is in a host. Sockets made there stay there when they are handed out.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or `body` panicked.
    pub fn inside<T: Send>(&self, host: Host, body: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let namespace = fs::File::open(self.path(host)).context("opening a host's namespace")?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET).context("entering a host's namespace")?;
                Ok(body())
            });
            thread.join().map_err(|_| anyhow!("a thread inside {host:?} panicked"))?
        })
    }

    /// Gives a host one more address; what the others remember about who has it is dropped.
    ///
    /// # Errors
    /// If the host has it already.
    pub fn add_address(&self, host: Host, address: Ipv4Addr) -> anyhow::Result<()> {
        sh(&format!("ip -n {} {}", self.namespace(host), add_address(address)))?;
        self.forget_neighbour(address)
    }

    /// Takes an address from a host. Connections to it stay open but are not answered.
    ///
    /// # Errors
    /// If the host does not have it.
    pub fn remove_address(&self, host: Host, address: Ipv4Addr) -> anyhow::Result<()> {
        sh(&format!("ip -n {} {}", self.namespace(host), remove_address(address)))
    }

    /// Moves an address: removed first, so that two hosts never answer for it.
    ///
    /// # Errors
    /// If `from` does not have it or `to` has.
    pub fn move_address(&self, address: Ipv4Addr, from: Host, to: Host) -> anyhow::Result<()> {
        self.remove_address(from, address)?;
        self.add_address(to, address)
    }

    /// What [`remove_address`](Self::remove_address) does, as a shell command to run in the host itself: a hook.
    #[must_use]
    pub fn remove_address_command(&self, address: Ipv4Addr) -> String {
        format!("ip {}", remove_address(address))
    }

    /// The first half of [`add_address`](Self::add_address), as a shell command to run in the host itself: a hook for
    /// before the restore. The others do not learn of it yet: what they send still goes to the host that had the
    /// address, and is lost. Sent here it would be answered with a reset, as there is no socket yet.
    #[must_use]
    pub fn add_address_command(&self, address: Ipv4Addr) -> String {
        format!("ip {}", add_address(address))
    }

    /// The second half, for after the restore: the others forget who had the address. That is done to them, which only
    /// a lab can; it stands for the gratuitous ARP of a real host, and takes effect at once and for certain.
    #[must_use]
    pub fn announce_command(&self, address: Ipv4Addr) -> String {
        let flush = |host| format!("ip -n {} neigh flush to {address}", self.namespace(host));
        Host::ALL.map(flush).join(" && ")
    }

    fn forget_neighbour(&self, address: Ipv4Addr) -> anyhow::Result<()> {
        let made = Host::ALL.into_iter().filter(|host| self.path(*host).exists());
        made.into_iter().try_for_each(|host| {
            ip(["-n", &self.namespace(host), "neigh", "flush", "to", &address.to_string()])
        })
    }

    /// Pulls a host's cable: nothing passes, in either direction, and nothing is told to either end.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn cut(&self, host: Host) -> anyhow::Result<()> {
        ip(["-n", &self.switch(), "link", "set", &host.port(), "nomaster"])
    }

    /// Plugs it in again.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn restore(&self, host: Host) -> anyhow::Result<()> {
        ip(["-n", &self.switch(), "link", "set", &host.port(), "master", "br0"])
    }

    /// Namespaces that exist although they belong to a lab of `pid` (for a leak check: this process, after its labs
    /// were dropped).
    #[must_use]
    pub fn leftovers(pid: u32) -> Vec<String> {
        namespaces().into_iter().filter(|name| owner(name) == Some(pid)).collect()
    }

    /// From now on SIGINT and SIGTERM end this process by way of removing its labs, with what runs in them.
    ///
    /// # Errors
    /// If the handler cannot be installed.
    pub fn remove_on_signal() -> anyhow::Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM]).context("handling signals")?;
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                Self::leftovers(std::process::id()).iter().for_each(|name| remove(name));
                std::process::exit(128 + signal);
            }
        });
        Ok(())
    }

    /// Removes the namespaces of labs whose process is gone, with what runs in them; says which.
    pub fn sweep() -> Vec<String> {
        let gone =
            |name: &String| owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        let stale: Vec<String> = namespaces().into_iter().filter(gone).collect();
        stale.iter().for_each(|name| remove(name));
        stale
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // First, as its devices would keep the namespaces alive.
        self.emulator = None;
        let all = Host::ALL.map(|host| self.namespace(host)).into_iter().chain([self.switch()]);
        all.for_each(|name| remove(&name));
    }
}

fn namespaces() -> Vec<String> {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// The pid in the name of a lab's namespace.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

fn remove(namespace: &str) {
    let path = Path::new(NAMESPACES).join(namespace);
    if path.exists() {
        tasks::end_all_in(&path);
        let _ = ip(["netns", "delete", namespace]);
    }
}

fn add_address(address: Ipv4Addr) -> String {
    format!("addr add {address}/{PREFIX_BITS} dev {INTERFACE}")
}

fn remove_address(address: Ipv4Addr) -> String {
    format!("addr del {address}/{PREFIX_BITS} dev {INTERFACE}")
}

fn ip<'a>(arguments: impl IntoIterator<Item = &'a str>) -> anyhow::Result<()> {
    run(Command::new("ip").args(arguments))
}

fn sh(command: &str) -> anyhow::Result<()> {
    run(Command::new("sh").args(["-c", command]))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
