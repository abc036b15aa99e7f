//! A process that a test operates on while it waits in a system call, or writes to memory by order; and what it is
//! outside of itself, to be compared before and after.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kernel::arena::{Region, Target};
use kernel::write_protect::WriteTracker;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::time::{ClockId, ClockNanosleepFlags, clock_nanosleep};

use protocol::units::PAGE_SIZE;

use crate::{STEP, eventually, processes, programs};

/// How long a call with a timeout waits.
pub const WAIT: Duration = Duration::from_millis(700);

/// The calls that a subject can wait in, and what it has to say of each in the end.
pub const CALLS: [(&str, &str); 11] = [
    ("read", "1"),
    ("poll", "1"),
    ("epoll", "1"),
    ("epoll-timeout", "0"),
    ("nanosleep", "slept"),
    ("receive-timeout", "WouldBlock"),
    ("pause", "EINTR"),
    ("park", "unparked"),
    ("spin", "kept"),
    ("sequence", "Kept"),
    ("seccomp", "1"),
];

/// The program: waits as it is told, says `ready` before and what came of it after.
///
/// # Errors
/// If it cannot be set up.
pub fn main(arguments: &[String]) -> anyhow::Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["memory"] => obey(),
        ["tracker", pid] => track(pid.parse()?),
        ["guest", checks] => crate::guest::main(checks),
        [call] => {
            let result = wait_in(call)?;
            println!("{result}");
            Ok(())
        }
        _ => bail!("usage: subject CALL | memory | tracker PID | guest CHECKS"),
    }
}

/// Waits in a call; the result, and `early` if it was shorter than it should be.
fn wait_in(call: &str) -> anyhow::Result<String> {
    let stdin = io::stdin();
    let mut byte = [0];
    let begun = Instant::now();
    let timed = |result: String| if begun.elapsed() < WAIT { format!("{result} early") } else { result };
    let ready = || println!("ready");
    Ok(match call {
        "read" => {
            ready();
            outcome(nix::unistd::read(stdin.as_fd(), &mut byte))
        }
        "seccomp" => {
            ready();
            let allowed = [
                libc::SYS_read,
                libc::SYS_write,
                libc::SYS_exit_group,
                libc::SYS_munmap,
                libc::SYS_sigaltstack,
            ];
            kernel::seccomp::allow_only(&allowed, kernel::seccomp::Otherwise::Kill)?;
            outcome(nix::unistd::read(stdin.as_fd(), &mut byte))
        }
        "poll" => {
            ready();
            outcome(poll(&mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE))
        }
        "epoll" | "epoll-timeout" => {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            epoll.add(stdin.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            let timeout = match call {
                "epoll" => EpollTimeout::NONE,
                _ => EpollTimeout::try_from(WAIT)?,
            };
            ready();
            let result = outcome(epoll.wait(&mut [EpollEvent::empty()], timeout));
            if call == "epoll" { result } else { timed(result) }
        }
        "nanosleep" => {
            ready();
            let slept = clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::empty(), &WAIT.into());
            timed(slept.map_or_else(|errno| format!("{errno:?}"), |_| "slept".into()))
        }
        "receive-timeout" => {
            let (mut ours, _its) = UnixStream::pair()?;
            ours.set_read_timeout(Some(WAIT))?;
            ready();
            timed(
                ours.read(&mut byte)
                    .map_or_else(|error| format!("{:?}", error.kind()), |got| got.to_string()),
            )
        }
        "pause" => {
            let told = Arc::new(AtomicBool::new(false));
            signal_hook::flag::register(libc::SIGUSR1, Arc::clone(&told))?;
            ready();
            nix::unistd::pause();
            if told.load(Relaxed) { "EINTR".into() } else { "returned without a signal".into() }
        }
        "park" => {
            let (told, thread) = (Arc::new(AtomicBool::new(false)), std::thread::current());
            let teller = Arc::clone(&told);
            std::thread::spawn(move || {
                println!("ready");
                let _ = nix::unistd::read(io::stdin().as_fd(), &mut [0]);
                teller.store(true, Relaxed);
                thread.unpark();
            });
            while !told.load(Relaxed) {
                std::thread::park();
            }
            "unparked".into()
        }
        "spin" | "sequence" => {
            static STOP: AtomicBool = AtomicBool::new(false);
            std::thread::spawn(|| {
                println!("ready");
                let _ = nix::unistd::read(io::stdin().as_fd(), &mut [0]);
                STOP.store(true, Relaxed);
            });
            match call {
                "sequence" => format!("{:?}", kernel::rseq::spin_in_sequence(&STOP)),
                _ if spin(&STOP) => "kept".into(),
                _ => "lost".into(),
            }
        }
        other => bail!("unknown call {other:?}"),
    })
}

#[cfg(target_arch = "x86_64")]
fn spin(stop: &AtomicBool) -> bool {
    kernel::stack::spin_with_patterns(stop)
}

#[cfg(not(target_arch = "x86_64"))]
fn spin(stop: &AtomicBool) -> bool {
    while !stop.load(Relaxed) {
        std::hint::spin_loop();
    }
    true
}

fn outcome<T: std::fmt::Display>(result: nix::Result<T>) -> String {
    result.map_or_else(|errno| format!("{errno:?}"), |value| value.to_string())
}

/// Obeys orders about memory, a line each: `map PAGES`, `huge PAGES`, `write REGION PAGE…`, `read REGION PAGE…`,
/// `claim REGION` (for a userfaultfd of its own), `drop REGION FROM TO`, `move REGION`, `grow REGION PAGES`, `unmap REGION`. A new region gets the lowest free number. Answers each with the address of the region.
fn obey() -> anyhow::Result<()> {
    let mut regions: BTreeMap<usize, Region> = BTreeMap::new();
    let mut claims = Vec::new();
    println!("ready");
    for line in io::stdin().lines() {
        let line = line?;
        let (order, rest) = line.split_once(' ').context("an order")?;
        let numbers = rest.split(' ').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
        let index = match order {
            "map" | "huge" => (0..).find(|index| !regions.contains_key(index)).unwrap_or(0),
            _ => numbers[0],
        };
        if matches!(order, "map" | "huge") {
            let region = Region::anonymous(numbers[0])?;
            if order == "huge" {
                region.prefer_huge_pages()?;
            }
            regions.insert(index, region);
        }
        let region = regions.get_mut(&index).context("a region")?;
        let address = region.address();
        match order {
            "write" => numbers[1..].iter().for_each(|&page| {
                region.page(page)[3].fetch_add(1, Relaxed);
            }),
            "read" => numbers[1..].iter().for_each(|&page| {
                let _ = std::hint::black_box(region.page(page)[3].load(Relaxed));
            }),
            "claim" => {
                let claim = WriteTracker::of_self()?;
                claim.register(address as u64, (region.pages() * PAGE_SIZE) as u64)?;
                claims.push(claim);
            }
            "drop" => region.discard(numbers[1]..numbers[2])?,
            "move" => region.relocate(Target::Anywhere)?,
            "grow" => region.resize(numbers[1])?,
            "unmap" => drop(regions.remove(&index)),
            _ => {}
        }
        println!("{:x}", regions.get(&index).map_or(address, Region::address));
    }
    Ok(())
}

/// Arms and disarms a process until it is killed.
fn track(pid: u32) -> anyhow::Result<()> {
    println!("ready");
    loop {
        let (mut tracker, _) = source_server::track::choice::choose();
        let tree = source_server::process::ProcessTree::of(pid)?;
        for _ in 0..3 {
            tracker.scan(&tree, source_server::track::Pass::Round);
        }
        tracker.disarm();
    }
}

/// A subject of this test.
#[derive(Debug)]
pub struct Subject {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Subject {
    /// Starts one, as another user if one is given, and waits until it is where it is to be.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(arguments: &[&str], user: Option<u32>) -> Self {
        let mut command = Command::new(programs::program("subject"));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(user) = user {
            std::os::unix::process::CommandExt::uid(&mut command, user);
        }
        let mut child = command.spawn().expect("a subject");
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().expect("its output"));
        let mut subject = Self { child, stdin, stdout: BufReader::new(stdout) };
        assert_eq!(subject.line(), "ready");
        subject
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it sleeps in its call, and every other thread of it, too.
    pub fn wait_asleep(&self, call: &str) {
        let pid = self.pid();
        eventually("the subject in its call", STEP, || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
            let mut threads = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
            let sleeps = |tid| matches!(source_server::process::thread_state(pid, tid), Ok('S'));
            threads
                .all(|tid: u32| sleeps(tid) || (matches!(call, "spin" | "sequence") && tid == pid))
                .then_some(())
        });
    }

    /// Has an order about memory obeyed; the address that it answers with.
    ///
    /// # Panics
    /// If it does not answer.
    #[track_caller]
    pub fn order(&mut self, order: &str) -> u64 {
        writeln!(self.stdin.as_mut().expect("its input"), "{order}").expect("an order");
        u64::from_str_radix(&self.line(), 16).expect("an address")
    }

    /// Lets the call that it waits in come to its end, and returns what it says of it.
    ///
    /// # Panics
    /// If it does not end well.
    #[track_caller]
    pub fn release(mut self, call: &str) -> String {
        if call == "pause" {
            processes::signal(self.pid(), nix::sys::signal::SIGUSR1);
        } else if !matches!(call, "nanosleep" | "epoll-timeout" | "receive-timeout") {
            self.stdin.as_mut().expect("its input").write_all(b"x").expect("a byte");
        }
        self.line()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    #[track_caller]
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a line");
        assert!(!line.is_empty(), "the subject ended: {:?}", self.child.wait());
        line.trim().to_owned()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What can be seen of a process from outside, and must not change.
#[derive(Debug, PartialEq, Eq)]
pub struct Appearance {
    maps: String,
    flags: Vec<String>,
    descriptors: Vec<String>,
    status: Vec<String>,
}

impl Appearance {
    /// That of a process now.
    ///
    /// # Panics
    /// If it is gone.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).expect("a file of /proc");
        let kept = [
            "Tgid",
            "TracerPid",
            "Uid",
            "FDSize",
            "Threads",
            "SigPnd",
            "ShdPnd",
            "SigBlk",
            "SigIgn",
            "SigCgt",
            "CapEff",
            "NoNewPrivs",
            "Seccomp",
        ];
        let status = read("status");
        let kept = status.lines().filter(|line| kept.iter().any(|key| line.starts_with(key)));
        let smaps = read("smaps");
        let flags = smaps.lines().filter(|line| line.starts_with("VmFlags")).map(str::to_owned).collect();
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").flatten();
        let mut descriptors: Vec<String> = entries
            .map(|entry| format!("{:?} {:?}", entry.file_name(), fs::read_link(entry.path()).ok()))
            .collect();
        descriptors.sort();
        Self { maps: read("maps"), flags, descriptors, status: kept.map(str::to_owned).collect() }
    }

    /// Whether an area of it is registered with a userfaultfd for write protection.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.flags.iter().any(|flags| flags.split(' ').any(|flag| flag == "uw"))
    }

    /// Whether it has a descriptor whose name has `words` in it.
    #[must_use]
    pub fn has_descriptor(&self, words: &str) -> bool {
        self.descriptors.iter().any(|descriptor| descriptor.contains(words))
    }

    /// Whether somebody traces it.
    #[must_use]
    pub fn is_traced(&self) -> bool {
        !self.status.iter().any(|line| line.split_whitespace().eq(["TracerPid:", "0"]))
    }
}
