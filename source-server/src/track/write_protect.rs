//! Writes as the kernel notes them: userfaultfd write protection without anybody being asked, read with `PAGEMAP_SCAN`.
//!
//! Each address space gets a userfaultfd of its own, made inside of the task and taken out of it
//! ([`kernel::inject`]; the task is stopped for that once, for a fraction of a millisecond). From there on
//! everything happens from outside:
//!
//! ```text
//! each round, each area:  register (nothing if it is) ── scan: report what was written, and protect it again
//! ```
//!
//! - A new area counts as written as a whole: its pages were never protected.
//! - An area that is not ours to register (the task has a userfaultfd of its own there, or shares its memory
//!   with a task that is armed) is reported as a whole in every round, and never protected.
//! - An area that changes between being listed and being scanned is reported as a whole once.
//! - After `exec` the userfaultfd belongs to an address space that is gone: the task is armed anew.
//! - After `fork` the child is a task that was not armed; the parent goes on.
//!
//! If this process dies, the kernel closes the descriptors, unregisters the areas and lifts the protection. What a
//! write through a pin that existed before the protection changes (`io_uring` buffers, `O_DIRECT` into memory
//! that is being protected) is not noted.

use std::collections::HashMap;

use kernel::inject::userfaultfd_of;
use kernel::pagemap::{Categories, PageMap, Protect, Query, Region, Regions, ScanError};
use kernel::write_protect::{Registration, WriteTracker};
use protocol::units::{ImageAddr, PageRun, TaskId, bytes_to_pages, pages_to_bytes};

use super::areas::{self, Roomy};
use super::{Method, Pass, Round, Run, Stop, TaskRound, Tracker, empty_round};
use crate::process::{ProcessTree, Task, has_ended};

/// How often an area that changes is tried again before its pages are taken as they are.
const TRIES: usize = 3;
/// Bytes whose protection is lifted at a time: the task waits that long if it wants to change its memory.
const DISARM_BYTES: u64 = 16 << 20;

/// Pages that are there.
const THERE: Query = Query {
    all: Categories::NONE,
    any: Categories::PRESENT_OR_SWAPPED,
    report: Categories::ZERO,
    protect: Protect::Nothing,
};
/// Pages that were written.
const WRITTEN: Query = Query { all: Categories::WRITTEN, ..THERE };

/// The tracker.
#[derive(Debug, Default)]
pub struct WriteProtect {
    armed: HashMap<u32, WriteTracker>,
    room: Regions,
}

/// Why a task's tracking cannot go on as it is.
enum Broken {
    /// The userfaultfd belongs to another address space than the task has now.
    OtherSpace,
    /// Anything else.
    Failed(String),
}

impl Tracker for WriteProtect {
    fn method(&self) -> Method {
        Method::WriteProtect
    }

    fn scan(&mut self, tree: &ProcessTree, pass: Pass) -> Round {
        self.armed.retain(|pid, _| tree.tasks.iter().any(|task| task.pid == *pid));
        let mut round = Round::default();
        for task in &tree.tasks {
            let found = self.scan_task(task, pass, &mut round.stops);
            round.tasks.extend(found);
        }
        round
    }

    fn copied(&mut self, _task: TaskId, _start: ImageAddr, _pages: &[u8]) {}

    fn disarm(mut self: Box<Self>) {
        for (pid, tracker) in self.armed.drain() {
            for area in areas::of(pid).unwrap_or_default() {
                lift(&tracker, area);
            }
        }
    }
}

impl WriteProtect {
    /// The round of one task; `None` if it has ended.
    fn scan_task(&mut self, task: &Task, pass: Pass, stops: &mut Vec<Stop>) -> Option<TaskRound> {
        let mut round = empty_round(task);
        for _ in 0..TRIES {
            if self.armed.get(&task.pid).is_some_and(WriteTracker::is_orphaned) {
                self.armed.remove(&task.pid);
                round.starts_again = true;
            }
            if pass == Pass::Round && !self.armed.contains_key(&task.pid) {
                match arm(task.pid) {
                    Ok((tracker, stopped)) => {
                        stops.push(stopped);
                        self.armed.insert(task.pid, tracker);
                    }
                    Err(why) => round.untracked = Some(why),
                }
            }
            match self.look(&mut round, pass) {
                Ok(()) => return Some(round),
                Err(Broken::OtherSpace) => {
                    self.armed.remove(&task.pid);
                    round.starts_again = true;
                }
                Err(Broken::Failed(why)) => round.untracked = Some(why),
            }
            if has_ended(task.pid) {
                return None;
            }
        }
        // It executes one program after the other, or cannot be read: nothing of it is known in this round.
        self.armed.remove(&task.pid);
        round.starts_again = true;
        round.untracked.get_or_insert_with(|| "its address space changes all the time".into());
        (round.areas, round.runs) = (Vec::new(), Vec::new());
        Some(round)
    }

    fn look(&mut self, round: &mut TaskRound, pass: Pass) -> Result<(), Broken> {
        let failed = |what: &str, error: &dyn std::fmt::Display| Broken::Failed(format!("{what}: {error}"));
        let map = PageMap::open(round.pid).map_err(|error| failed("open page map", &error))?;
        let areas = areas::with_room(round.pid).map_err(|error| failed("list areas", &error))?;
        round.areas = areas.iter().map(|found| found.area).collect();
        round.runs.clear();
        let tracker = self.armed.get(&round.pid);
        for found in areas {
            let mut look = Look { map: &map, tracker, room: &mut self.room, runs: &mut round.runs };
            match pass {
                Pass::Round => look.round(found)?,
                Pass::Last => look.last(found.area)?,
            }
        }
        Ok(())
    }
}

/// One look at the areas of one task.
struct Look<'a> {
    map: &'a PageMap,
    tracker: Option<&'a WriteTracker>,
    room: &'a mut Regions,
    runs: &'a mut Vec<Run>,
}

impl Look<'_> {
    /// An area of a task that runs. It is registered with the room around it: one that has grown since it was listed would become
    /// two areas otherwise, and the task's `mremap` of both fail.
    fn round(&mut self, Roomy { area, room }: Roomy) -> Result<(), Broken> {
        let Some(tracker) = self.tracker else { return self.everything(area) };
        let before = self.runs.len();
        let mut query = Query { protect: Protect::Matching, ..WRITTEN };
        let mut registered = Ok(Registration::Refused);
        for _ in 0..TRIES {
            registered = tracker.register(room.start.get(), pages_to_bytes(room.pages));
            if !matches!(registered, Ok(Registration::Done)) {
                // Something that cannot be registered is there by now.
                registered = tracker.register(area.start.get(), pages_to_bytes(area.pages));
            }
            if !matches!(registered, Ok(Registration::Done)) {
                break;
            }
            match self.scan(area, &query) {
                Ok(()) => return Ok(()),
                // What was protected on the way to the error was not reported: everything is, now.
                Err(ScanError::Untracked) => query.all = Categories::NONE,
                Err(error) => return Err(broken(&error)),
            }
            self.runs.truncate(before);
        }
        match registered {
            // It can be registered and is not: that was in another address space.
            Ok(Registration::Done | Registration::TaskGone) => Err(Broken::OtherSpace),
            // Somebody else's, or not there any more as a whole.
            Ok(Registration::Taken | Registration::Refused) => self.everything(area),
            Err(error) => Err(Broken::Failed(format!("register area: {error}"))),
        }
    }

    /// An area of a task that stands still.
    fn last(&mut self, area: PageRun) -> Result<(), Broken> {
        let is_tracked = self.map.is_tracked(area.start.get()).map_err(|error| broken(&error))?;
        let ours = |tracker: &WriteTracker| {
            tracker.register(area.start.get(), pages_to_bytes(area.pages)).ok() == Some(Registration::Done)
        };
        // Of what is registered by somebody else it is not known what was written; what is not registered counts as
        // written as a whole.
        if is_tracked && !self.tracker.is_some_and(ours) {
            return self.everything(area);
        }
        self.scan(area, &WRITTEN).map_err(|error| broken(&error))
    }

    /// Reports every page that is there.
    fn everything(&mut self, area: PageRun) -> Result<(), Broken> {
        self.scan(area, &THERE).map_err(|error| broken(&error))
    }

    fn scan(&mut self, area: PageRun, query: &Query) -> Result<(), ScanError> {
        let runs = &mut *self.runs;
        self.map.scan(area.start.get()..area.end().get(), query, self.room, |region| {
            runs.extend(run_of(region));
        })
    }
}

fn broken(error: &ScanError) -> Broken {
    match error {
        ScanError::Gone => Broken::OtherSpace,
        other => Broken::Failed(other.to_string()),
    }
}

fn run_of(region: Region) -> Option<Run> {
    let start = ImageAddr::aligned(region.start)?;
    let pages = PageRun::new(start, bytes_to_pages(region.end.checked_sub(region.start)?))?;
    Some(Run { pages, zero: region.categories.contains(Categories::ZERO) })
}

/// A tracker for the address space that a process has now, and how long the process was stopped for it.
fn arm(pid: u32) -> Result<(WriteTracker, Stop), String> {
    let taken = userfaultfd_of(pid).map_err(|error| error.to_string())?;
    let tracker = WriteTracker::from_fresh(taken.fd).map_err(|error| format!("negotiate: {error}"))?;
    Ok((tracker, Stop { stood: taken.stood, waited: taken.waited }))
}

/// Lifts the protection of an area in steps. What is left to do when the descriptor is closed, with the address
/// space locked, is little then.
fn lift(tracker: &WriteTracker, area: PageRun) {
    let (mut next, end) = (area.start.get(), area.end().get());
    while next < end {
        let len = DISARM_BYTES.min(end - next);
        // An area that is gone or not ours needs nothing.
        if tracker.unprotect(next, len).is_err() {
            return;
        }
        next += len;
    }
}
