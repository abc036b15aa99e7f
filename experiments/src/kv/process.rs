//! The load client as a process of its own, to be started in the client's namespace.
//!
//! ```text
//! READY id=0 pid=.. keys=..            connected, every key written, load runs
//! BEAT t_ms=.. ops=.. wrong=.. longest_us=..          every 100 ms
//! CHECK 1 keys=.. wrong=.. longest_us=..              answer to `check 1`: every key read on the same connection
//! DONE 2 keys=.. wrong=.. longest_us=..               answer to `quit 2`, after the report was written
//! LOST reason                                         the connection ended; also then the report is written
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode, id};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow};

use super::{KvClient, KvProgress, KvReport, Load};
use crate::clock::monotonic_ms;
use crate::workload::{self, ControlFile, Files, Order, Poll, Process, StatusLog, field};

const TICK: Duration = Duration::from_millis(20);
const TICKS_PER_SECOND: u64 = 50;
const TICKS_PER_BEAT: u64 = 5;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What the client process is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Address and port of redis
    #[arg(long)]
    pub addr: SocketAddr,
    /// What to load it with
    #[command(flatten)]
    pub load: Load,
    /// How long to run
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// Where the report goes at the end
    #[arg(long)]
    pub report: PathBuf,
    /// Where it reports and is told what to do
    #[command(flatten)]
    pub files: Files,
}

/// Runs the client in this process; the exit status is 0 if the connection held and no value was wrong.
///
/// # Errors
/// If it cannot connect, or not write its report.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let log = StatusLog::new(options.files.status.clone());
    workload::end_on_panic(log.clone());
    let mut client = KvClient::connect(options.addr, options.load, CONNECT_LIMIT)?;
    client.load().context("loading keys")?;
    log.line(&format!("READY id=0 pid={} keys={}", id(), options.load.keys));
    let mut control = ControlFile::new(options.files.control.clone());
    let mut running = Running::start(client);
    let mut number = 0;
    for tick in 0..options.seconds.saturating_mul(TICKS_PER_SECOND) {
        match control.poll() {
            Poll::Command(command) if command.order == Order::Quit => {
                number = command.number;
                break;
            }
            Poll::Command(command) if command.order == Order::Check => {
                let mut client = running.stop()?;
                client.verify_all().unwrap_or_else(|error| client.lost(&error));
                log.line(&answer("CHECK", command.number, &client.report()));
                running = Running::start(client);
            }
            Poll::Abandoned => break,
            Poll::Command(_) | Poll::Nothing => {}
        }
        if running.thread.is_finished() {
            break; // the connection ended: nothing else ends it
        }
        if tick % TICKS_PER_BEAT == 0 {
            log.line(&running.beat());
        }
        std::thread::sleep(TICK);
    }
    let mut client = running.stop()?;
    if client.report.error.is_none() {
        client.verify_all().unwrap_or_else(|error| client.lost(&error));
    }
    let report = client.report();
    report.write(&options.report)?;
    match &report.error {
        Some(error) => log.line(&format!("LOST {error}")),
        None => log.line(&answer("DONE", number, &report)),
    }
    Ok(ExitCode::from(u8::from(!report.is_good())))
}

fn answer(word: &str, number: u64, report: &KvReport) -> String {
    let KvReport { keys, wrong, longest_stall, .. } = report;
    format!("{word} {number} keys={keys} wrong={wrong} longest_us={}", longest_stall.us)
}

/// The client while it is on its thread.
struct Running {
    stop: Arc<AtomicBool>,
    progress: Arc<KvProgress>,
    thread: JoinHandle<KvClient>,
}

impl Running {
    fn start(client: KvClient) -> Self {
        let (stop, progress) = (Arc::new(AtomicBool::new(false)), client.progress());
        Self { progress, thread: client.run_until(Arc::clone(&stop)), stop }
    }

    /// Stops it after the request at hand.
    fn stop(self) -> anyhow::Result<KvClient> {
        self.stop.store(true, Relaxed);
        self.thread.join().map_err(|_| anyhow!("the client's thread panicked"))
    }

    fn beat(&self) -> String {
        let KvProgress { ops, wrong, longest_us } = &*self.progress;
        format!(
            "BEAT t_ms={} ops={} wrong={} longest_us={}",
            monotonic_ms(),
            ops.load(Relaxed),
            wrong.load(Relaxed),
            longest_us.load(Relaxed)
        )
    }
}

/// A running client process.
#[derive(Debug)]
pub struct Handle {
    process: Process,
    report: PathBuf,
}

/// The answer to a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Keys read.
    pub keys: u64,
    /// Wrong values since the start.
    pub wrong: u64,
    /// The longest request since the start.
    pub longest_us: u64,
}

impl Handle {
    /// Starts the client and waits until every key is loaded, for at most `limit`. `program` runs the `experiments`
    /// binary, usually in a namespace.
    ///
    /// # Errors
    /// If it cannot connect or load.
    pub fn start(mut program: Command, options: &Options, limit: Duration) -> anyhow::Result<Self> {
        program.args(["workload", "kv-client"]);
        for (name, value) in [
            ("--addr", options.addr.to_string()),
            ("--keys", options.load.keys.to_string()),
            ("--first-key", options.load.first_key.to_string()),
            ("--value-bytes", options.load.value_bytes.to_string()),
            ("--rate", options.load.rate.to_string()),
            ("--set-percent", options.load.set_percent.to_string()),
            ("--seconds", options.seconds.to_string()),
        ] {
            program.arg(name).arg(value);
        }
        program.arg("--report").arg(&options.report);
        program.arg("--status").arg(&options.files.status).arg("--control").arg(&options.files.control);
        let mut process = Process::start(program, &options.files)?;
        process.wait_line("READY", None, limit).context("starting kv-client")?;
        Ok(Self { process, report: options.report.clone() })
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Has every key read, on the same connection; the load goes on afterwards.
    ///
    /// # Errors
    /// If there is no answer within `limit`, or the connection ended.
    pub fn check(&mut self, limit: Duration) -> anyhow::Result<Summary> {
        self.ask(Order::Check, "CHECK", limit)
    }

    /// Has every key read for the last time and the report written.
    ///
    /// # Errors
    /// If there is no report within `limit`. A connection that was lost is in the report.
    pub fn quit(&mut self, limit: Duration) -> anyhow::Result<KvReport> {
        // A client that has lost its connection has ended and needs no order.
        match self.ask(Order::Quit, "DONE", limit) {
            Err(error) if self.process.lines("LOST").is_empty() => Err(error),
            _ => KvReport::read(&self.report),
        }
    }

    fn ask(&mut self, order: Order, word: &str, limit: Duration) -> anyhow::Result<Summary> {
        let number = self.process.order(order)?;
        let line = self.process.wait_line(word, Some(number), limit)?;
        let count = |key| field(&line, key).with_context(|| format!("no {key} in {line:?}"));
        Ok(Summary { keys: count("keys")?, wrong: count("wrong")?, longest_us: count("longest_us")? })
    }

    /// Waits until so many more requests were answered than by now.
    ///
    /// # Errors
    /// If they are not within `limit`.
    pub fn wait_requests(&mut self, more: u64, limit: Duration) -> anyhow::Result<()> {
        self.process.catch_up()?;
        let target = self.process.highest("BEAT", "ops").unwrap_or(0) + more;
        self.process.wait_for(limit, |line| {
            let ops: u64 = line.starts_with("BEAT").then(|| field(line, "ops"))??;
            (ops >= target).then_some(())
        })
    }
}
