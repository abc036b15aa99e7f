//! A link as it is between two places: delayed, lossy, limited. In user space, because not every kernel has netem.
//!
//! ```text
//!   host A                                                      host B
//!   wan0 (TUN) --receive--> Line: lost? queue, rate, delay --send--> wan0 (TUN)
//!        <-----send-- Line <--receive-----
//! ```
//!
//! One thread per direction takes whole IP packets out of one device and has them arrive at the other when they are due.
//! There are no offloads: a packet is at most the MTU long, so loss hits what it would hit on a wire. The devices
//! belong to this process: they are gone when it is, however it ends.
//!
//! What it adds of its own is the time that two threads take to wake (some 20 to 100 us on an idle virtual machine):
//! an experiment measures the round trip that came of it and says so.

mod line;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use kernel::tun::Tun;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use nix::unistd::pipe2;

pub use line::{Fate, Line};

use crate::clock::monotonic_ns;

/// Packets taken at a time before what is due is sent: bounds how late a packet becomes because others arrive.
const TAKEN_AT_ONCE: usize = 32;

/// What a link does to what passes, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// Added to the way in each direction.
    pub delay: Duration,
    /// Probability that a packet is lost, each by itself.
    pub loss: f64,
    /// Bits per second; none: as fast as it goes.
    pub rate_bit: Option<u64>,
    /// What may wait for a limited rate; more is dropped.
    pub queue_bytes: usize,
    /// Longest packet.
    pub mtu: usize,
    /// Where the losses start; the same seed loses the same packets of a sequence.
    pub seed: u64,
}

impl Default for Model {
    /// Nothing lost, nothing delayed, no limit; an Ethernet's packets; a queue of 1 MiB, as switches have.
    fn default() -> Self {
        Self { delay: Duration::ZERO, loss: 0.0, rate_bit: None, queue_bytes: 1 << 20, mtu: 1500, seed: 1 }
    }
}

/// What passed in one direction.
#[derive(Debug, Default)]
struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
    lost: AtomicU64,
    dropped: AtomicU64,
}

/// What passed in one direction so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets that arrived.
    pub packets: u64,
    /// Their bytes, IP headers included.
    pub bytes: u64,
    /// Packets lost on purpose.
    pub lost: u64,
    /// Packets for which there was no room, or that the other end refused.
    pub dropped: u64,
}

impl Counters {
    fn read(&self) -> Traffic {
        let Self { packets, bytes, lost, dropped } = self;
        Traffic {
            packets: packets.load(Relaxed),
            bytes: bytes.load(Relaxed),
            lost: lost.load(Relaxed),
            dropped: dropped.load(Relaxed),
        }
    }
}

/// A link between two devices. Dropping it ends it and removes them.
#[derive(Debug)]
pub struct Emulator {
    stop: Option<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
    counters: [Arc<Counters>; 2],
}

impl Emulator {
    /// Joins two devices, each made in the namespace where it is.
    ///
    /// # Errors
    /// If there can be no more descriptors or threads.
    pub fn start(ends: [Tun; 2], model: Model) -> io::Result<Self> {
        let ends = ends.map(Arc::new);
        // Nothing is ever written: the threads see the end of the pipe when this value drops. A program that is
        // started meanwhile must not have the other end.
        let (stopped, stop) = pipe2(OFlag::O_CLOEXEC)?;
        let stopped = Arc::new(stopped);
        let mut emulator = Self { stop: Some(stop), threads: Vec::new(), counters: Default::default() };
        for direction in [0, 1] {
            let way = Way {
                from: Arc::clone(&ends[direction]),
                to: Arc::clone(&ends[1 - direction]),
                stopped: Arc::clone(&stopped),
                line: Line::new(model, model.seed.wrapping_add(direction as u64)),
                counters: Arc::clone(&emulator.counters[direction]),
            };
            let thread = std::thread::Builder::new().name(format!("link-{direction}"));
            emulator.threads.push(thread.spawn(move || way.run())?);
        }
        Ok(emulator)
    }

    /// What passed from the first device to the second, and the other way.
    #[must_use]
    pub fn traffic(&self) -> [Traffic; 2] {
        self.counters.each_ref().map(|counters| counters.read())
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.stop = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic was printed where it happened
        }
    }
}

/// One direction, on its thread.
struct Way {
    from: Arc<Tun>,
    to: Arc<Tun>,
    stopped: Arc<OwnedFd>,
    line: Line,
    counters: Arc<Counters>,
}

impl Way {
    fn run(mut self) {
        // The default slack of 50 us would be added to every delay.
        let _ = nix::sys::prctl::set_timerslack(1);
        while let Ok(true) = self.wait() {
            if self.forward().is_err() {
                return; // the device is gone: so is its host
            }
        }
    }

    /// Waits for a packet to take or to send; `false` when it is to end.
    fn wait(&self) -> nix::Result<bool> {
        let mut fds = [
            PollFd::new(self.from.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
        ];
        let left = self.line.next_due().map(|due| Duration::from_nanos(due.saturating_sub(monotonic_ns())));
        match ppoll(&mut fds, left.map(TimeSpec::from_duration), None) {
            Ok(_) => Ok(!fds[1].any().unwrap_or(true)),
            Err(nix::Error::EINTR) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Takes what has come, a bounded number, and sends what is due.
    fn forward(&mut self) -> io::Result<()> {
        for _ in 0..TAKEN_AT_ONCE {
            let mut packet = self.line.buffer();
            let Some(len) = self.from.receive(&mut packet)? else {
                self.line.give_back(packet);
                break;
            };
            packet.truncate(len);
            match self.line.enter(monotonic_ns(), packet) {
                Fate::Waits => {}
                Fate::Lost => drop(self.counters.lost.fetch_add(1, Relaxed)),
                Fate::Dropped => drop(self.counters.dropped.fetch_add(1, Relaxed)),
            }
        }
        while let Some(packet) = self.line.leave(monotonic_ns()) {
            if self.to.send(&packet)? {
                self.counters.packets.fetch_add(1, Relaxed);
                self.counters.bytes.fetch_add(packet.len() as u64, Relaxed);
            } else {
                self.counters.dropped.fetch_add(1, Relaxed);
            }
            self.line.give_back(packet);
        }
        Ok(())
    }
}
