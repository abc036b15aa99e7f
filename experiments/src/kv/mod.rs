//! A load client for redis that knows what every key must hold, over one TCP connection.
//!
//! The value of a key follows from the key and its version, and the client remembers the versions: it can say of
//! every reply whether it is right, and at the end of every key whether its last write is there. It never connects
//! again: a connection that ends is what a move must not cause, so it is reported and that is that.

mod process;
mod report;
mod resp;

use std::io::{BufReader, BufWriter, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hdrhistogram::Histogram;

pub use process::{Handle, Options, Summary, run};
pub use report::{KvReport, Stall};

use crate::clock::monotonic_ns;
use crate::random::{Random, mix};
use crate::report::Latency;
use report::{STALL_US_MIN, STALLS_MAX};
use resp::{Reply, read_reply, write_command};

/// Commands sent before their replies are read, while loading and verifying.
const PIPELINE: u32 = 128;
/// How long one reply may take before the connection counts as lost: longer than any blackout, so that a slow move
/// is measured and not reported as a failure.
const REPLY_LIMIT: Duration = Duration::from_secs(120);

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct Load {
    /// Keys to load
    #[arg(long, default_value_t = 100_000)]
    pub keys: u32,
    /// Number of the first key: clients of one redis need keys of their own
    #[arg(long, default_value_t = 0)]
    pub first_key: u32,
    /// Bytes of each value
    #[arg(long, default_value_t = 1000)]
    pub value_bytes: usize,
    /// Requests per second, sent on time or as soon as the one before was answered; 0: as many as possible
    #[arg(long, default_value_t = 0)]
    pub rate: u64,
    /// How many requests in a hundred write
    #[arg(long, default_value_t = 20)]
    pub set_percent: usize,
}

impl Default for Load {
    fn default() -> Self {
        Self { keys: 100_000, first_key: 0, value_bytes: 1000, rate: 0, set_percent: 20 }
    }
}

/// Counters that can be read while the client runs.
#[derive(Debug, Default)]
pub struct KvProgress {
    /// Requests answered.
    pub ops: AtomicU64,
    /// Wrong values.
    pub wrong: AtomicU64,
    /// The longest request so far, in microseconds.
    pub longest_us: AtomicU64,
}

/// When a request was sent, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timed {
    /// By `CLOCK_MONOTONIC`: a client is not moved.
    pub at_ns: u64,
    /// Until its reply was read.
    pub took_ns: u64,
}

/// A client with its one connection.
#[derive(Debug)]
pub struct KvClient {
    load: Load,
    replies: BufReader<TcpStream>,
    commands: BufWriter<TcpStream>,
    versions: Vec<u32>,
    expected: Vec<u8>,
    random: Random,
    latency_ns: Histogram<u64>,
    times: Option<Vec<Timed>>,
    report: KvReport,
    progress: Arc<KvProgress>,
}

impl KvClient {
    /// Connects.
    ///
    /// # Errors
    /// If nobody answers within `limit`.
    pub fn connect(address: SocketAddr, load: Load, limit: Duration) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, limit)
            .with_context(|| format!("connecting to redis at {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REPLY_LIMIT))?;
        stream.set_write_timeout(Some(REPLY_LIMIT))?;
        Ok(Self {
            load,
            replies: BufReader::new(stream.try_clone()?),
            commands: BufWriter::new(stream),
            versions: vec![0; usize::try_from(load.keys)?],
            expected: Vec::new(),
            random: Random::new(0xca),
            latency_ns: Histogram::new(3)?,
            times: None,
            report: KvReport::default(),
            progress: Arc::default(),
        })
    }

    /// Counters that can be read while the client runs.
    #[must_use]
    pub fn progress(&self) -> Arc<KvProgress> {
        Arc::clone(&self.progress)
    }

    /// Requests per second from now on; 0: as many as possible.
    pub const fn set_rate(&mut self, rate: u64) {
        self.load.rate = rate;
    }

    /// From now on keeps the time of every request, of at most so many.
    pub fn keep_times(&mut self, at_most: usize) {
        self.times = Some(Vec::with_capacity(at_most));
    }

    /// The times kept; none are kept any more.
    pub fn take_times(&mut self) -> Vec<Timed> {
        self.times.take().unwrap_or_default()
    }

    /// Writes every key in its first version.
    ///
    /// # Errors
    /// If the connection ends or a write is refused.
    pub fn load(&mut self) -> anyhow::Result<()> {
        self.pipelined(|client, key| {
            client.versions[index(key)] = 1;
            client.send_set(key, 1)
        })?;
        self.report.keys = self.load.keys.into();
        Ok(())
    }

    /// Reads every key. What is not as it was last written is counted as wrong.
    ///
    /// # Errors
    /// If the connection ends.
    pub fn verify_all(&mut self) -> anyhow::Result<()> {
        self.pipelined(|client, key| client.send_get(key))?;
        self.report.verified += u64::from(self.load.keys);
        Ok(())
    }

    /// Sends one command per key and checks the replies.
    fn pipelined(&mut self, send: fn(&mut Self, u32) -> std::io::Result<()>) -> anyhow::Result<()> {
        for first in (0..self.load.keys).step_by(index(PIPELINE)) {
            let keys = first..first.saturating_add(PIPELINE).min(self.load.keys);
            for key in keys.clone() {
                send(self, key).context("sending a command")?;
            }
            self.commands.flush().context("sending commands")?;
            for key in keys {
                self.receive(key)?;
            }
        }
        Ok(())
    }

    fn send_set(&mut self, key: u32, version: u32) -> std::io::Result<()> {
        fill_value(&mut self.expected, key, version, self.load.value_bytes);
        let name = self.key_name(key);
        write_command(&mut self.commands, &[b"SET", name.as_bytes(), &self.expected])
    }

    fn send_get(&mut self, key: u32) -> std::io::Result<()> {
        let name = self.key_name(key);
        write_command(&mut self.commands, &[b"GET", name.as_bytes()])
    }

    fn key_name(&self, key: u32) -> String {
        format!("key:{:08}", u64::from(self.load.first_key) + u64::from(key))
    }

    /// Reads the reply to a command about `key`.
    fn receive(&mut self, key: u32) -> anyhow::Result<()> {
        let right = match read_reply(&mut self.replies)? {
            Reply::Status(status) if status == "OK" => true,
            Reply::Bulk(value) => {
                fill_value(&mut self.expected, key, self.versions[index(key)], self.load.value_bytes);
                value == self.expected
            }
            Reply::Nil => false,
            other => bail!("reply {other:?} to a GET or SET"),
        };
        if !right {
            self.report.wrong += 1;
            self.progress.wrong.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// One request under load, timed from the moment it is handed to the kernel to the moment its reply was read.
    fn request(&mut self) -> anyhow::Result<()> {
        let key = u32::try_from(self.random.below(self.versions.len()))?;
        let (at_ns, begun) = (monotonic_ns(), Instant::now());
        if self.random.below(100) < self.load.set_percent {
            let version = self.versions[index(key)].wrapping_add(1);
            self.versions[index(key)] = version;
            self.send_set(key, version)?;
            self.report.sets += 1;
        } else {
            self.send_get(key)?;
            self.report.gets += 1;
        }
        self.commands.flush().context("sending a request")?;
        self.receive(key)?;
        let took = begun.elapsed();
        self.report.ops += 1;
        let took_ns = u64::try_from(took.as_nanos())?;
        self.latency_ns.record(took_ns)?;
        if let Some(times) = self.times.as_mut().filter(|times| times.len() < times.capacity()) {
            times.push(Timed { at_ns, took_ns });
        }
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.progress.ops.fetch_add(1, Relaxed);
        self.progress.longest_us.fetch_max(us, Relaxed);
        let stall = Stall { at_ms: at_ns / 1_000_000, us };
        if us > self.report.longest_stall.us {
            self.report.longest_stall = stall;
        }
        if us >= STALL_US_MIN && self.report.stalls.len() < STALLS_MAX {
            self.report.stalls.push(stall);
        }
        Ok(())
    }

    /// Sends requests until `stop` is set or the connection ends, which is noted in the report.
    pub fn run(&mut self, stop: &AtomicBool) {
        let interval = Duration::from_secs(1).checked_div(u32::try_from(self.load.rate).unwrap_or(u32::MAX));
        let mut due = Instant::now();
        while !stop.load(Relaxed) && self.report.error.is_none() {
            if let Some(interval) = interval {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                // A stall is not made up for: what was not sent meanwhile is not sent.
                due = (due + interval).max(Instant::now());
            }
            if let Err(error) = self.request() {
                self.report.error = Some(format!("{error:#}"));
            }
        }
    }

    /// Runs on a thread of its own until `stop` is set; the thread gives the client back.
    #[must_use]
    pub fn run_until(mut self, stop: Arc<AtomicBool>) -> JoinHandle<Self> {
        std::thread::spawn(move || {
            self.run(&stop);
            self
        })
    }

    /// What it saw so far.
    #[must_use]
    pub fn report(&self) -> KvReport {
        KvReport { latency_us: Latency::of_ns(&self.latency_ns), ..self.report.clone() }
    }

    /// Notes that the connection ended.
    fn lost(&mut self, error: &anyhow::Error) {
        self.report.error = Some(format!("{error:#}"));
    }
}

fn index(key: u32) -> usize {
    usize::try_from(key).unwrap_or(usize::MAX)
}

/// The value of a key in a version: `bytes` bytes that look random.
fn fill_value(value: &mut Vec<u8>, key: u32, version: u32, bytes: usize) {
    value.clear();
    let mut salt = mix(u64::from(key) << 32 | u64::from(version));
    while value.len() < bytes {
        salt = salt.wrapping_add(0x9e37_79b9_7f4a_7c15);
        value.extend_from_slice(&mix(salt).to_le_bytes());
    }
    value.truncate(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_by_key_and_version_and_have_the_length_asked_for() {
        let value = |key, version, bytes| {
            let mut value = Vec::new();
            fill_value(&mut value, key, version, bytes);
            value
        };
        assert_eq!(value(1, 1, 100), value(1, 1, 100));
        assert_eq!(value(1, 1, 13).len(), 13);
        assert_ne!(value(1, 1, 100), value(1, 2, 100));
        assert_ne!(value(1, 1, 100), value(2, 1, 100));
    }
}
