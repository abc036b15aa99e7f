//! Both engines in one world, with a clock and dice that come from a seed: a whole move, with whatever can go wrong, in some
//! milliseconds. The same seed is the same move.
//!
//! ```text
//!   source                                   way                       destination
//!   Switchover, Record, Ledger, Order   ──▶  control  loses,     ──▶   Switchover, PageCache, Kept, Tree of Families
//!   Answers, acknowledgements           ◀──  faults   delays,    ◀──   FaultLoop, InFlight, Streams, Intake
//!   chunks of pages, a holder           ──▶  push     cuts       ──▶   Journal, rebuild; a keeper
//!        ▲                                                                  ▼
//!   tasks that write                                                  Mm: a model of the kernel, and tasks that read, write,
//!                                                                     drop, unmap, move, protect, fork and end
//! ```
//!
//! What is named there is the product's own code, driven with bytes of its own encoders; modelled are sockets ([`wire`],
//! [`net`]), threads and the waits of both programs ([`source`], [`destination`], which say what they stand for), and the
//! kernel ([`kernel`], [`store`]). The images, CRIU, the hello of a connection and what a program does on its host
//! (hooks, network lock, fence) are left out; so are a daemon that is killed between reading an event and recording it
//! (`Journal::half_read` says so), and a keeper that is killed. The `frozen` store is that of a source that follows one which was
//! killed before it had killed its tasks.
//!
//! Looked at in each step: never two running copies; what a page reads as, is given, or is left with, is what the task has written
//! there; no page is installed twice by one daemon; no thread waits for a page that is not missing. At the end: the
//! account adds up, and the move is released, rolled back, or waits for pages that somebody still has.

pub mod chance;
pub mod destination;
pub mod host;
pub mod kernel;
pub mod lane;
pub mod net;
pub mod pages;
pub mod precopy;
pub mod source;
pub mod store;
pub mod tasks;
pub mod wire;
pub mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use self::world::World;

/// How a move ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It runs at the destination, which has everything.
    Released,
    /// The same, after a program of one side took the place of one that had ended.
    Completed,
    /// It runs at the source.
    RolledBack,
    /// It stands still at the source, with all its memory: the source cannot know what the destination has done.
    Stopped,
    /// It waits at the destination, for pages of a source that nobody can take the place of.
    Waits,
}

/// What came of a move.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps that were taken.
    pub steps: u64,
    /// Microseconds that it took.
    pub us: u64,
    /// Programs that were started again.
    pub restarts: u32,
}

/// Something that the world can have done wrong, to show that it would be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// Wakes without a page are forgotten.
    ForgetWakes,
    /// On new connections, something that was installed is installed once more.
    ReplayInstalled,
    /// What was written after the last copy counts as clean.
    SkipStale,
    /// Whoever takes over knows nothing of what tasks did to their address spaces.
    ForgetChanges,
    /// The source frees what it has sent.
    FreeUnacknowledged,
    /// The destination does not wait for `Commit`.
    RunUncommitted,
    /// A daemon that follows one says that the tasks never ran, although that one has let them.
    DenyRunning,
}

/// All of them.
pub const DEFECTS: [Defect; 7] = [
    Defect::ForgetWakes,
    Defect::ReplayInstalled,
    Defect::SkipStale,
    Defect::ForgetChanges,
    Defect::FreeUnacknowledged,
    Defect::RunUncommitted,
    Defect::DenyRunning,
];

/// The move of a seed.
///
/// # Errors
/// What is wrong, and how to see it again.
pub fn simulate(seed: u64, defect: Option<Defect>) -> Result<Report, String> {
    // What fails is looked at a second time, with every decision noted.
    let result = caught(|| World::new(seed, defect).run());
    let result = result.or_else(|_| caught(|| World::new(seed, defect).traced().run()));
    result.map_err(|wrong| {
        format!("seed {seed}: {wrong}\nagain: cargo run --release -p tests --bin simulate -- --seed {seed}")
    })
}

fn caught(run: impl FnOnce() -> Result<Report, String>) -> Result<Report, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
    })
}

/// What came of many moves.
#[derive(Debug, Default)]
pub struct Sum {
    /// How many ended how.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Steps of all.
    pub steps: u64,
    /// Programs that were started again.
    pub restarts: u64,
}

/// The moves of these seeds.
///
/// # Errors
/// The first that fails.
pub fn simulate_all(seeds: impl IntoIterator<Item = u64>) -> Result<Sum, String> {
    let mut sum = Sum::default();
    for seed in seeds {
        let report = simulate(seed, None)?;
        *sum.outcomes.entry(report.outcome).or_default() += 1;
        sum.steps += report.steps;
        sum.restarts += u64::from(report.restarts);
    }
    Ok(sum)
}
