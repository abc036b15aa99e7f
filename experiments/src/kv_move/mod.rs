//! `kv`: what the clients of a redis under load see of its move.
//!
//! ```text
//!   load the keys | peak: as many requests as possible | 70 % of the peak: before | move | after | check every key
//! ```
//!
//! Several clients, each with one connection and keys of its own, which waits for a reply before it sends the next
//! request. A latency is the time from sending a request to having read its reply. What a client did not send because
//! it waited is not sent later: the blackout is one long request per connection, and not a pile behind it.

mod analysis;
mod page;

use std::fmt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use host::criu::Criu;

pub use page::page;

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::clock::monotonic_ns;
use crate::crossing::{Crossing, Moved, service_obstacle};
use crate::kv::{KvClient, KvProgress, Load, Timed};
use crate::lab::{Host, Lab, SERVICE};
use crate::redis::Redis;
use crate::results::{Results, Row};
use crate::scenario::RunOptions;
use crate::tool;
use analysis::Seen;

/// What it is called.
pub const NAME: &str = "kv";
/// Connections: enough to keep the one thread of redis busy.
const CLIENTS: u32 = 4;
const VALUE_BYTES: usize = 1000;
/// Bytes of a value where there are many, so that they fit beside what was copied ahead of them.
const SMALL_VALUE_BYTES: usize = 100;
/// How many of those.
const MANY_KEYS: [usize; 3] = [1_000_000, 3_000_000, 10_000_000];
const SET_PERCENT: usize = 20;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const MOVE_LIMIT: Duration = Duration::from_secs(120);
/// The part of the peak that is the load.
const LOAD_PERCENT: u64 = 70;
/// Requests kept per client: a minute at 30 000 a second.
const TIMES_MAX: usize = 1_800_000;

/// A redis of some size, how it is moved, and how long it is looked at.
#[derive(Clone, Copy, Debug)]
struct Case {
    keys: usize,
    value_bytes: usize,
    /// `--precopy-rounds`
    rounds: &'static str,
    peak: Duration,
    before: Duration,
    after: Duration,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys, {} bytes each, pre-copy {}", self.keys, self.value_bytes, self.rounds)
    }
}

/// As many values as fit into so much memory.
const fn keys_in(mib: usize) -> usize {
    (mib << 20) / VALUE_BYTES
}

/// Runs the scenario.
///
/// # Errors
/// If nothing works, or the results cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let criu = Criu::find(common.criu.as_deref())?;
    let obstacle = service_obstacle(&criu)
        .or_else(|| (!tool::is_installed("redis-server")).then(|| "there is no redis-server".to_owned()));
    if let Some(reason) = obstacle {
        common.say(&format!("skipped: {reason}"));
        return Ok(ExitCode::SUCCESS);
    }
    common.sweep_labs();
    let seconds = Duration::from_secs;
    let [peak, before, after] = if options.smoke { [1, 1, 2] } else { [3, 3, 6] }.map(seconds);
    let case = |keys, value_bytes| Case { keys, value_bytes, rounds: "0", peak, before, after };
    let mib = options.mib.unwrap_or(if options.smoke { 64 } else { 1024 });
    let mut cases = vec![case(keys_in(mib), VALUE_BYTES)];
    if options.mib.is_none() && !options.smoke {
        cases.extend(MANY_KEYS.map(|keys| case(keys, SMALL_VALUE_BYTES)));
    }
    let groups: Vec<_> = cases.into_iter().map(|case| vec![case, Case { rounds: "auto", ..case }]).collect();
    let mut campaign = Campaign::begin(NAME, options, common, &[("criu", criu.version.clone())])?;
    campaign.measure(&groups, options.runs_or(5), |case, run, results| {
        measure(*case, run, &criu.path, results)
    })?;
    campaign.end()
}

fn measure(case: Case, run: usize, criu: &Path, results: &mut Results) -> anyhow::Result<String> {
    let dir = tempfile::Builder::new().prefix("postcopy-kv-").tempdir_in("/dev/shm")?;
    let lab = Lab::new().context("making the hosts (this needs root)")?;
    lab.add_address(Host::Source, SERVICE)?;
    let redis = Redis::start(SERVICE, |program| lab.run_in(Host::Source, program))?;
    let clients = on_each(connect(&lab, &redis, case)?, |client| client.load().context("loading keys"))?;

    let flock = Flock::start(clients, 0);
    let (begun, before) = (Instant::now(), flock.requests());
    flock.run_for(case.peak)?;
    let peak = per_second(flock.requests() - before, begun.elapsed());
    let clients = flock.stop()?;

    let rate = peak * LOAD_PERCENT / 100;
    let flock = Flock::start(clients, rate / u64::from(CLIENTS));
    flock.run_for(case.before)?;
    let move_ns = monotonic_ns();
    let crossing = Crossing {
        lab: &lab,
        to: Host::Destination,
        link: "tcp",
        arguments: [vec!["--precopy-rounds".into(), case.rounds.into()], Vec::new()],
        with_service: true,
        criu,
        dir: dir.path(),
    };
    let moved = crossing.start(redis.pid())?.wait(MOVE_LIMIT)?;
    flock.run_for(case.after)?;
    let mut clients = flock.stop()?;
    let mut times: Vec<Timed> = clients.iter_mut().flat_map(KvClient::take_times).collect();
    times.sort_unstable_by_key(|timed| timed.at_ns);
    let clients = on_each(clients, |client| client.verify_all().context("reading every key"))?;
    let wrong: u64 = clients.iter().map(|client| client.report().wrong).sum();
    ensure!(wrong == 0, "{wrong} values are wrong");

    let seen = Seen::of(&times, move_ns).context("too few requests around the move")?;
    let row = row(case, run, (peak, rate), &moved, &seen);
    results.timeline(&row.name(), &seen.csv())?;
    results.add(&row)?;
    Ok(format!(
        "{case} run {run}: {rate} requests/s of at most {peak}; p99 {:.0} us before, {:.0} us in the first second after \
         ({:.1} times), stall {:.0} ms, back after {}; every value right",
        seen.before.p99,
        seen.first_second.p99,
        seen.first_second.p99 / seen.before.p99,
        seen.stall_ms,
        seen.back_ms.map_or_else(|| "more than was looked at".to_owned(), |ms| format!("{ms:.0} ms")),
    ))
}

fn row(case: Case, run: usize, (peak, rate): (u64, u64), moved: &Moved, seen: &Seen) -> Row {
    let columns = vec![
        ("keys", case.keys.to_string()),
        ("value_bytes", case.value_bytes.to_string()),
        ("precopy", case.rounds.to_owned()),
    ];
    let mut row = Row::new(columns, run);
    #[expect(clippy::cast_precision_loss, reason = "requests per second")]
    for (column, value) in [
        ("peak_requests_s", peak as f64),
        ("load_requests_s", rate as f64),
        ("before_requests_s", seen.before_requests_s),
        ("before_p50_us", seen.before.p50),
        ("before_p99_us", seen.before.p99),
        ("first_second_p50_us", seen.first_second.p50),
        ("first_second_p99_us", seen.first_second.p99),
        ("first_second_max_us", seen.first_second.max),
        ("after_p99_us", seen.after.p99),
        ("p99_ratio", seen.first_second.p99 / seen.before.p99),
        ("stall_ms", seen.stall_ms),
        ("blackout_ms", moved.source.blackout_ms),
        ("brownout_ms", moved.destination.brownout_ms),
    ] {
        row.push(column, value);
    }
    row.push("back_ms", seen.back_ms);
    row
}

fn per_second(requests: u64, time: Duration) -> u64 {
    let nanoseconds = time.as_nanos().max(1);
    u64::try_from(u128::from(requests) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// Clients that share the keys evenly.
fn connect(lab: &Lab, redis: &Redis, case: Case) -> anyhow::Result<Vec<KvClient>> {
    let keys = u32::try_from(case.keys).context("too many keys")? / CLIENTS;
    let client = |number| {
        let load = Load {
            keys,
            first_key: number * keys,
            value_bytes: case.value_bytes,
            rate: 0,
            set_percent: SET_PERCENT,
        };
        lab.inside(Host::Client, || KvClient::connect(redis.address(), load, CONNECT_LIMIT))?
    };
    (0..CLIENTS).map(client).collect()
}

/// Does something with each client at the same time.
fn on_each(
    clients: Vec<KvClient>,
    task: impl Fn(&mut KvClient) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<Vec<KvClient>> {
    let task = &task;
    std::thread::scope(|scope| {
        let with = |mut client: KvClient| scope.spawn(move || task(&mut client).map(|()| client));
        let threads: Vec<_> = clients.into_iter().map(with).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))?).collect()
    })
}

/// Clients at work, each on its thread.
struct Flock {
    stop: Arc<AtomicBool>,
    progress: Vec<Arc<KvProgress>>,
    threads: Vec<JoinHandle<KvClient>>,
}

impl Flock {
    /// Starts them with `rate` requests per second each; 0: as many as possible. Times are kept with a rate only.
    fn start(mut clients: Vec<KvClient>, rate: u64) -> Self {
        for client in &mut clients {
            client.set_rate(rate);
            if rate > 0 {
                client.keep_times(TIMES_MAX);
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        Self {
            progress: clients.iter().map(KvClient::progress).collect(),
            threads: clients.into_iter().map(|client| client.run_until(Arc::clone(&stop))).collect(),
            stop,
        }
    }

    fn requests(&self) -> u64 {
        self.progress.iter().map(|progress| progress.ops.load(Relaxed)).sum()
    }

    /// Lets them work for a while.
    fn run_for(&self, time: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < time {
            if self.threads.iter().any(JoinHandle::is_finished) {
                bail!("a client lost its connection");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Stops them; every one must still have its connection.
    fn stop(mut self) -> anyhow::Result<Vec<KvClient>> {
        self.stop.store(true, Relaxed);
        let threads = std::mem::take(&mut self.threads);
        let clients: Vec<KvClient> = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a client panicked")))
            .collect::<anyhow::Result<_>>()?;
        match clients.iter().find_map(|client| client.report().error) {
            Some(error) => bail!("a client lost its connection: {error}"),
            None => Ok(clients),
        }
    }
}

impl Drop for Flock {
    /// Clients do not outlive the run, whatever became of it: they end with their next reply or its time limit, or
    /// with their server.
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}
