//! Writes as the kernel notes them: userfaultfd write protection without anybody being asked, read with `PAGEMAP_SCAN`.
//!
//! Each address space gets a userfaultfd of its own, made inside of the task and taken out of it
//! ([`kernel::inject`]; the task is stopped for that once, for a fraction of a millisecond). From there on
//! everything happens from outside:
//!
//! ```text
//! each round, each area
//!   ours since the round before   scan: report what was written, and protect it again
//!   anything else                 register ── lift what protection its pages have ── scan: report all, and protect it
//! ```
//!
//! - Only an area that the round before has scanned at the same addresses, and that is still registered, is ours. One that the task
//!   has moved (`mremap`) is not registered any more, nor is a neighbour that it was merged with; but their pages can go
//!   on looking protected, written to or not, wherever they are moved next.
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
use std::io;

use kernel::inject::userfaultfd_of;
use kernel::maps::{Area, Maps};
use kernel::pagemap::{Categories, PageMap, Protect, Query, Region, Regions, ScanError};
use kernel::write_protect::{Registration, WriteTracker};
use protocol::units::{ImageAddr, PAGE_BYTES, PageRun, TaskId, bytes_to_pages, pages_to_bytes};

use super::areas::{self, Roomy};
use super::{Method, Pass, Round, Run, Stop, TaskRound, Tracker, empty_round};
use crate::process::{ProcessTree, Task, has_no_memory};

/// How often an area that changes is tried again before its pages are taken as they are.
const TRIES: usize = 3;
/// How many areas to each side of one are looked at: more than one only if the task changes it right now.
const NEIGHBOURS: usize = 2;
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
    armed: HashMap<u32, Armed>,
    room: Regions,
}

/// An address space with a userfaultfd.
#[derive(Debug)]
struct Armed {
    tracker: WriteTracker,
    /// What the last round has scanned and protected, by ascending address: whose pages tell the truth for as long as they are
    /// registered.
    ours: Vec<PageRun>,
}

impl Armed {
    /// The parts of an area: those that are ours, and the rest.
    fn parts(&self, area: PageRun) -> Vec<(PageRun, bool)> {
        let mut parts = Vec::new();
        let mut next = area.start;
        let mut add = |from: ImageAddr, to: ImageAddr, ours| {
            if from < to {
                parts.extend(PageRun::new(from, to.pages_since(from)).map(|part| (part, ours)));
            }
        };
        let first = self.ours.partition_point(|ours| ours.end() <= area.start);
        for ours in self.ours[first..].iter().take_while(|ours| ours.start < area.end()) {
            let (from, to) = (ours.start.max(next), ours.end().min(area.end()));
            add(next, from, false);
            add(from, to, true);
            next = to;
        }
        add(next, area.end(), false);
        parts
    }
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
        for (pid, armed) in self.armed.drain() {
            for area in areas::of(pid).unwrap_or_default() {
                lift(&armed.tracker, area);
            }
        }
    }
}

impl WriteProtect {
    /// The round of one task; `None` if it has ended.
    fn scan_task(&mut self, task: &Task, pass: Pass, stops: &mut Vec<Stop>) -> Option<TaskRound> {
        let mut round = empty_round(task);
        for _ in 0..TRIES {
            if self.armed.get(&task.pid).is_some_and(|armed| armed.tracker.is_orphaned()) {
                self.armed.remove(&task.pid);
                round.starts_again = true;
            }
            if pass == Pass::Round && !self.armed.contains_key(&task.pid) {
                match arm(task.pid) {
                    Ok((tracker, stopped)) => {
                        stops.push(stopped);
                        self.armed.insert(task.pid, Armed { tracker, ours: Vec::new() });
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
            if has_no_memory(task.pid) {
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
        let armed = self.armed.get(&round.pid);
        // Without it areas are armed as they were listed.
        let now = Maps::open(round.pid).ok();
        let mut ours = Vec::new();
        for found in areas {
            let (now, runs) = (now.as_ref(), &mut round.runs);
            let mut look = Look { map: &map, now, armed, room: &mut self.room, runs };
            match pass {
                Pass::Round if look.round(found)? => ours.push(found.area),
                Pass::Round => {}
                Pass::Ahead => look.ahead(found.area, &mut ours)?,
                Pass::Last => look.last(found.area)?,
            }
        }
        if let (Some(armed), Pass::Round | Pass::Ahead) = (self.armed.get_mut(&round.pid), pass) {
            armed.ours = ours;
        }
        Ok(())
    }
}

/// One look at the areas of one task.
struct Look<'a> {
    map: &'a PageMap,
    now: Option<&'a Maps>,
    armed: Option<&'a Armed>,
    room: &'a mut Regions,
    runs: &'a mut Vec<Run>,
}

impl Look<'_> {
    /// An area of a task that runs; says whether it is ours from now on.
    fn round(&mut self, found: Roomy) -> Result<bool, Broken> {
        let Some(armed) = self.armed else { return self.everything(found.area).map(|()| false) };
        let mut all_ours = true;
        for (part, ours) in armed.parts(found.area) {
            all_ours &= ours && self.again(part)? || self.anew(&armed.tracker, part, found)?;
        }
        Ok(all_ours)
    }

    /// A part that was ours: reports what was written since, unless it is not what it was. It is not registered here: something
    /// else that has come to the same addresses must not pass for it.
    fn again(&mut self, part: PageRun) -> Result<bool, Broken> {
        let before = self.runs.len();
        match self.scan(part, &Query { protect: Protect::Matching, ..WRITTEN }) {
            Ok(()) => Ok(true),
            // What was protected on the way to the error was not reported: everything is, now.
            Err(ScanError::Untracked) => {
                self.runs.truncate(before);
                Ok(false)
            }
            Err(error) => Err(broken(&error)),
        }
    }

    /// A part that was not ours: reports all of it; whether it is from now on.
    fn anew(&mut self, tracker: &WriteTracker, part: PageRun, found: Roomy) -> Result<bool, Broken> {
        let before = self.runs.len();
        let (start, len) = (part.start.get(), pages_to_bytes(part.pages));
        let (mut registered, mut untracked) = (Ok(Registration::Refused), false);
        for _ in 0..TRIES {
            registered = self.register(tracker, part, found);
            if !matches!(registered, Ok(Registration::Done)) {
                break;
            }
            // A page that looks protected is not protected again; this one may be writable.
            if tracker.unprotect(start, len).is_err() {
                continue;
            }
            match self.scan(part, &Query { protect: Protect::Matching, ..THERE }) {
                Ok(()) => return Ok(true),
                Err(ScanError::Untracked) => {
                    self.runs.truncate(before);
                    untracked = true;
                }
                Err(error) => return Err(broken(&error)),
            }
        }
        match registered {
            // It can be registered and is not: that was in another address space.
            Ok(Registration::Done) if untracked => Err(Broken::OtherSpace),
            Ok(Registration::TaskGone) => Err(Broken::OtherSpace),
            // Somebody else's, or not there any more as a whole.
            Ok(Registration::Done | Registration::Taken | Registration::Refused) => {
                self.everything(part).map(|()| false)
            }
            Err(error) => Err(Broken::Failed(format!("register area: {error}"))),
        }
    }

    /// Registers the area of a part, as a whole: an area that is registered in part becomes two, and the task's `mremap` of both
    /// fails, or moves one of them and not the other.
    fn register(
        &self,
        tracker: &WriteTracker,
        part: PageRun,
        Roomy { area, room }: Roomy,
    ) -> io::Result<Registration> {
        // A thread of low priority may lose the processor in between, for longer than the task leaves its areas alone.
        let registered = kernel::sched::urgently(|| match self.now?.at(part.start.get()) {
            Ok(Some(now)) if now.is_private_anonymous => Some(self.register_now(tracker, now)),
            Ok(_) => Some(Ok(Registration::Refused)),
            Err(_) => None,
        });
        if let Some(registered) = registered {
            return registered;
        }
        // It may have grown since it was listed.
        match tracker.register(room.start.get(), pages_to_bytes(room.pages)) {
            Ok(Registration::Done) => Ok(Registration::Done),
            // Something that cannot be registered is there by now.
            _ => tracker.register(area.start.get(), pages_to_bytes(area.pages)),
        }
    }

    /// Registers what was an area a microsecond ago, and what has been cut off it by that.
    fn register_now(&self, tracker: &WriteTracker, now: Area) -> io::Result<Registration> {
        let registered = tracker.register(now.start, now.end - now.start)?;
        let (mut from, mut to) = (now.start, now.end);
        for _ in 0..NEIGHBOURS {
            let beside = |address: u64| {
                let area = self.now.and_then(|maps| maps.at(address).ok().flatten());
                area.filter(|area| area.is_private_anonymous)
            };
            // What is there and was an area of its own is registered a moment earlier than it would be.
            let (before, behind) = (beside(from.saturating_sub(PAGE_BYTES)), beside(to));
            for area in [before, behind].into_iter().flatten() {
                // Somebody else's, or gone again: then it was not cut off.
                let _ = tracker.register(area.start, area.end - area.start)?;
                (from, to) = (from.min(area.start), to.max(area.end));
            }
            if before.is_none() && behind.is_none() {
                break;
            }
        }
        Ok(registered)
    }

    /// An area of a task before the last look: what is ours and still registered stays so. Of the rest the last look reports all.
    fn ahead(&mut self, area: PageRun, ours: &mut Vec<PageRun>) -> Result<(), Broken> {
        let Some(armed) = self.armed else { return Ok(()) };
        for (part, _) in armed.parts(area).into_iter().filter(|(_, ours)| *ours) {
            if self.again(part)? {
                ours.push(part);
            }
        }
        Ok(())
    }

    /// An area of a task that stands still. What is not ours, or not registered any more, counts as written as a whole.
    fn last(&mut self, area: PageRun) -> Result<(), Broken> {
        let Some(armed) = self.armed else { return self.everything(area) };
        for (part, ours) in armed.parts(area) {
            // An area is registered as a whole or not at all.
            if ours && self.map.is_tracked(part.start.get()).map_err(|error| broken(&error))? {
                self.scan(part, &WRITTEN).map_err(|error| broken(&error))?;
            } else {
                self.everything(part)?;
            }
        }
        Ok(())
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
