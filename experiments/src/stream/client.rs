//! The other end of the stream: reads as fast as it goes, checks every byte, and notes when how many came.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use super::content;
use crate::clock::monotonic_ns;

const BUFFER: usize = 256 << 10;
/// No byte for so long: the stream is dead. Longer than any blackout.
const READ_LIMIT: Duration = Duration::from_secs(30);
/// Notes kept: what 4 Gbit/s make in a minute and a half when each read brings one segment of 64 KiB.
const ARRIVALS_MAX: usize = 1 << 20;

/// Bytes that were there at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arrival {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`: the client is not moved.
    pub(super) at_ns: u64,
    /// How many.
    pub(super) bytes: usize,
}

/// All that came.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) arrivals: Vec<Arrival>,
    pub(super) bytes: u64,
    pub(super) wrong: u64,
}

/// A connected client.
pub(super) struct Client {
    stream: TcpStream,
    length: u64,
}

/// A client at work, on a thread of its own.
pub(super) struct Running {
    bytes: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<Received>>,
}

impl Client {
    /// Connects to a server that sends so many MiB round and round.
    pub(super) fn connect(address: SocketAddr, mib: usize, limit: Duration) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, limit).context("connecting to the stream")?;
        stream.set_read_timeout(Some(READ_LIMIT))?;
        Ok(Self { stream, length: (mib as u64) << 20 })
    }

    /// Starts to read.
    pub(super) fn start(self) -> Running {
        let bytes = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&bytes);
        Running { bytes, thread: std::thread::spawn(move || self.read_all(&counter)) }
    }

    fn read_all(mut self, counter: &AtomicU64) -> anyhow::Result<Received> {
        let mut received = Received::default();
        let (mut buffer, mut expected) = (vec![0; BUFFER], vec![0; BUFFER]);
        loop {
            let count = self.stream.read(&mut buffer).context("reading the stream")?;
            if count == 0 {
                return Ok(received);
            }
            let arrival = Arrival { at_ns: monotonic_ns(), bytes: count };
            ensure!(received.arrivals.len() < ARRIVALS_MAX, "the stream does not end");
            received.arrivals.push(arrival);
            content::fill(&mut expected[..count], received.bytes, self.length);
            if buffer[..count] != expected[..count] {
                let wrong = buffer[..count].iter().zip(&expected).filter(|(a, b)| a != b).count();
                received.wrong += wrong as u64;
            }
            received.bytes += count as u64;
            counter.store(received.bytes, Relaxed);
        }
    }
}

impl Running {
    /// Lets it run for `time`, and until it has received something in that time.
    pub(super) fn wait_streaming(&self, time: Duration, limit: Duration) -> anyhow::Result<()> {
        let (begun, before) = (Instant::now(), self.bytes.load(Relaxed));
        while begun.elapsed() < time || self.bytes.load(Relaxed) == before {
            ensure!(!self.thread.is_finished(), "the stream ended early");
            ensure!(begun.elapsed() < time + limit, "nothing came for {limit:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for the end of the stream.
    pub(super) fn finish(self, limit: Duration) -> anyhow::Result<Received> {
        let deadline = Instant::now() + limit;
        while !self.thread.is_finished() {
            ensure!(Instant::now() < deadline, "the stream does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.thread.join().map_err(|_| anyhow!("the client's thread panicked"))?
    }
}
