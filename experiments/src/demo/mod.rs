//! The demo: a redis under load moves from one host to another while its client keeps its connection.
//!
//! ```text
//!   source                             destination                      client
//!   redis on 10.77.0.100                                                one connection to 10.77.0.100
//!   source-server move  ----------->   uffd-daemon serve --once
//!     post-dump: address removed         pre-restore: address added
//!                                        post-restore: address announced
//!   redis gone                         redis, its pages arriving        same connection, every key verified
//! ```
//!
//! The address is announced only after the restore: what the client sends again in between must reach nobody. The
//! destination would answer it with a reset for as long as it has the address and not yet the socket.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use host::criu::Criu;
use tempfile::TempDir;

use crate::cli::Common;
use crate::crossing::Crossing;
use crate::kv::{self, KvReport, Load};
use crate::lab::{Host, Lab, SERVICE};
use crate::redis::Redis;
use crate::report::MoveReport;
use crate::workload::Files;

/// Limits, each several times what the step takes on a slow machine. A demo that hangs ends by itself.
const LOAD_LIMIT: Duration = Duration::from_secs(120);
const MOVE_LIMIT: Duration = Duration::from_secs(300);
const AFTERWARDS_LIMIT: Duration = Duration::from_secs(120);
/// Requests before and after the move that show the client at work.
const REQUESTS_BEFORE: u64 = 5000;
const REQUESTS_AFTER: u64 = 5000;
const CLIENT_SECONDS: u64 = 900;

/// What the demo is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Data in redis
    #[arg(long, default_value_t = 256)]
    pub mib: u32,
    /// Bytes of each value
    #[arg(long, default_value_t = 1000)]
    pub value_bytes: u32,
    /// Requests per second of the client; 0: as many as possible
    #[arg(long, default_value_t = 0)]
    pub rate: u64,
    /// Pre-copy rounds; 0 is pure post-copy
    #[arg(long, default_value_t = 0)]
    pub precopy_rounds: u32,
    /// The link between the hosts
    #[arg(long, default_value = "tcp")]
    pub link: String,
}

/// Runs the demo and prints what happened. The exit status is 0 if everything it shows came true.
///
/// # Errors
/// If it cannot be set up, or a step of it does not end in time.
pub fn run(options: &Options, common: &Common) -> anyhow::Result<ExitCode> {
    let criu = Criu::find(common.criu.as_deref())?;
    common.sweep_labs();
    Lab::remove_on_signal()?;
    let work = WorkDir::new(common.work_dir.as_deref())?;
    // Made first and so dropped last: with it ends whatever still runs in the hosts, the moved redis included.
    let lab = Lab::new().context("making the hosts (this needs root)")?;
    lab.add_address(Host::Source, SERVICE)?;
    let mut redis = Redis::start(SERVICE, |program| lab.run_in(Host::Source, program))?;
    common.say(&format!("source: redis, pid {}, on {}", redis.pid(), redis.address()));
    let mut client = start_client(options, &lab, &redis, &work.path)?;
    common.say(&format!("client: {} MiB written, load runs on one connection", options.mib));
    client.wait_requests(REQUESTS_BEFORE, LOAD_LIMIT)?;

    let verbose = vec![OsString::from("-v"); common.verbose.into()];
    let rounds: [OsString; 2] = ["--precopy-rounds".into(), options.precopy_rounds.to_string().into()];
    let crossing = Crossing {
        lab: &lab,
        to: Host::Destination,
        link: &options.link,
        arguments: [[&verbose[..], &rounds[..]].concat(), verbose],
        with_service: true,
        criu: &criu.path,
        dir: &work.path,
    };
    common.say("moving");
    let mut moving = crossing.start(redis.pid())?;
    let source_status = moving.source.wait(MOVE_LIMIT)?;
    // After a move that was given up nobody connects to the daemon any more and the source stays: neither end is
    // waited for, but whether the client goes on is still of interest.
    let after = if source_status.success() { AFTERWARDS_LIMIT } else { Duration::ZERO };
    let destination_ended = moving.destination.wait(after).is_ok_and(|status| status.success());
    let source_gone = redis.wait_gone(after).is_ok();
    if !source_status.success() || !destination_ended {
        eprintln!("{}\n{}", moving.source.last_lines(), moving.destination.last_lines());
    }
    let went_on = client.wait_requests(REQUESTS_AFTER, AFTERWARDS_LIMIT);
    let client = client.quit(AFTERWARDS_LIMIT)?;
    let outcome = Outcome {
        source: MoveReport::read(&moving.reports[0]).unwrap_or_default(),
        destination: MoveReport::read(&moving.reports[1]).unwrap_or_default(),
        client,
        source_gone,
        destination_ended,
        went_on: went_on.is_ok(),
        on_destination: lab.pids_in(Host::Destination).len(),
    };
    println!("{outcome}");
    if outcome.is_good() {
        return Ok(ExitCode::SUCCESS);
    }
    work.keep();
    Ok(ExitCode::FAILURE)
}

fn start_client(options: &Options, lab: &Lab, redis: &Redis, work: &Path) -> anyhow::Result<kv::Handle> {
    let bytes = u64::from(options.mib) << 20;
    let keys = u32::try_from(bytes / u64::from(options.value_bytes.max(1))).context("too many keys")?;
    let load = Load {
        keys: keys.max(1),
        value_bytes: usize::try_from(options.value_bytes)?,
        rate: options.rate,
        ..Load::default()
    };
    let client = kv::Options {
        addr: redis.address(),
        load,
        seconds: CLIENT_SECONDS,
        report: work.join("client.json"),
        files: Files::in_dir(work, "client"),
    };
    let program = lab.run_in(Host::Client, std::env::current_exe()?);
    kv::Handle::start(program, &client, LOAD_LIMIT)
}

/// Where logs and reports go: the directory asked for, or one that is removed unless something failed.
struct WorkDir {
    path: PathBuf,
    temporary: Option<TempDir>,
}

impl WorkDir {
    fn new(asked: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(path) = asked {
            fs::create_dir_all(path).with_context(|| format!("creating {path:?}"))?;
            return Ok(Self { path: std::path::absolute(path)?, temporary: None });
        }
        let temporary = tempfile::Builder::new().prefix("postcopy-demo").tempdir()?;
        Ok(Self { path: temporary.path().to_owned(), temporary: Some(temporary) })
    }

    fn keep(self) {
        if let Some(directory) = self.temporary {
            eprintln!("logs and reports are in {:?}", directory.keep());
        }
    }
}

/// What came of it.
struct Outcome {
    source: MoveReport,
    destination: MoveReport,
    client: KvReport,
    source_gone: bool,
    destination_ended: bool,
    went_on: bool,
    on_destination: usize,
}

impl Outcome {
    /// What the demo promises, each with whether it came true.
    fn promises(&self) -> [(&'static str, bool); 8] {
        [
            ("the client kept its one connection", self.client.error.is_none()),
            ("it went on after the move", self.went_on),
            ("every value was right", self.client.wrong == 0 && self.client.verified >= self.client.keys),
            ("the source released everything", self.source.outcome == "released"),
            ("the source process is gone", self.source_gone),
            (
                "the destination has everything",
                self.destination.outcome == "released" && self.destination_ended,
            ),
            ("every lazy page is accounted for", self.destination.pages.adds_up()),
            ("redis runs on the destination", self.on_destination > 0),
        ]
    }

    fn is_good(&self) -> bool {
        self.promises().iter().all(|promise| promise.1)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}{}{}", self.source, self.destination, self.client)?;
        for (promise, true_) in self.promises() {
            writeln!(f, "  [{}] {promise}", if true_ { "ok" } else { "NO" })?;
        }
        Ok(())
    }
}
