//! The stamping workload before, during and after a move.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use experiments::stamp::{Handle, Options};
use experiments::workload::Files;
use source_server::stacks::sleeps_on_page_border;

use crate::accounts::Memory;

use crate::moves::{Ended, Plan};

use crate::site::Site;

use crate::{STEP, processes, programs};

/// A running stamping workload and its files.
#[derive(Debug)]
pub struct Stamp {
    handle: Handle,
    status: PathBuf,
}

/// A workload of `mib` for a move that is about something else than its size.
#[must_use]
pub fn small(site: &Site, mib: usize) -> Options {
    Options { mib, threads: 2, ..options(site, "stamp") }
}

/// How often a workload is begun anew to get one whose memory is lazy.
const TRIES: usize = 5;
/// Looks at a workload's stacks.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// Moves a workload once, lazily, and judges everything about it: every page of it, both reports, and what is left.
/// Where chance has CRIU copy all of it, that move is judged as well, and another workload is moved.
///
/// # Panics
/// If anything is not as it should be.
#[track_caller]
pub fn move_once(site: &Site, plan: &Plan<'_>, options: &Options, memory: Memory) -> Ended {
    let ended = (0..TRIES).find_map(|_| moves_lazily(site, plan, options, memory));
    ended.unwrap_or_else(|| panic!("hardly any page was lazy, {TRIES} times in a row"))
}

/// Moves a workload and judges it; how it ended, if its memory was lazy.
#[track_caller]
fn moves_lazily(site: &Site, plan: &Plan<'_>, options: &Options, memory: Memory) -> Option<Ended> {
    let mut stamp = Stamp::start(options);
    let ended = plan.run(site, stamp.pid());
    ended.assert_released(memory);
    let lazy = ended.destination.report().pages.lazy;
    let arena = u64::try_from((options.mib << 8) * usize::from(options.tree)).expect("a size");
    let is_lazy = lazy > arena / 10 * 9;
    let copied = ended.source.said().contains("copies all memory before it resumes");
    assert!(is_lazy || copied, "hardly any of {arena} pages was lazy: {:#?}", ended.destination);
    let tasks = ended.destination.report().tasks.len();
    // A child that was just forked moves, too.
    assert!(tasks >= usize::from(options.tree) && (tasks == usize::from(options.tree) || options.fork));
    let pid = stamp.pid();
    stamp.mark_moved();
    let root = site.moved(pid).expect("the moved root");
    stamp.assert_unharmed();
    let tree: Vec<u32> = processes::below(root).into_iter().map(|entry| entry.pid).collect();
    let init = processes::Entry::of(root).expect("the moved root").parent;
    site.assert_clean(&[&tree[..], &[root, init]].concat());
    stamp.quit();
    site.assert_clean(&[]);
    println!("{}{}", ended.source.report(), ended.destination.report());
    is_lazy.then_some(ended)
}

/// The defaults of the workload, its files in the test's directory.
#[must_use]
pub fn options(site: &Site, name: &str) -> Options {
    Options::new(Files::in_dir(&site.path(""), name))
}

impl Drop for Stamp {
    fn drop(&mut self) {
        // A CRIU that still holds it would keep it from ending, and the handle waits for its end.
        if std::thread::panicking() {
            processes::kill_below(std::process::id());
        }
    }
}

impl Stamp {
    /// Starts it, and has its memory verified once.
    ///
    /// # Panics
    /// If it does not start or does not work where it is.
    #[track_caller]
    pub fn start(options: &Options) -> Self {
        for _ in 0..TRIES {
            let stamp = Self::start_as(Command::new(programs::program("experiments")), options);
            if options.aligned_stack || !stamp.sleeps_on_page_border() {
                return stamp;
            }
            println!("a thread sleeps where CRIU would make all memory non-lazy: another stack");
            stamp.quit();
        }
        panic!("threads that sleep on a page border, {TRIES} times in a row");
    }

    /// Chance puts one stack in 256 there. Threads that work now and then are seen asleep in most of so many looks, also where
    /// they wait for a processor for some milliseconds between two sleeps. One process of a tree may do so: the others are lazy.
    fn sleeps_on_page_border(&self) -> bool {
        (0..LOOKS).any(|_| {
            std::thread::sleep(BETWEEN_LOOKS);
            sleeps_on_page_border(self.pid())
        })
    }

    /// As [`Stamp::start`], by a command that becomes the workload.
    ///
    /// # Panics
    /// If it does not start or does not work where it is.
    #[track_caller]
    pub fn start_as(command: Command, options: &Options) -> Self {
        let handle = Handle::start(command, options, STEP).unwrap_or_else(|error| panic!("{error:#}"));
        let mut stamp = Self { handle, status: options.files.status.clone() };
        stamp.assert_unharmed();
        stamp
    }

    /// The pid of its root.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.handle.pid()
    }

    /// The workload runs elsewhere from now on.
    ///
    /// # Panics
    /// If it is still here.
    #[track_caller]
    pub fn mark_moved(&mut self) {
        self.handle.mark_moved();
        self.handle.wait_gone(STEP).unwrap_or_else(|error| panic!("the source is still there: {error:#}"));
    }

    /// From now on the process that was started here may end: the test ends it, or a move broke.
    pub const fn give_up(&mut self) {
        self.handle.mark_moved();
    }

    /// It works: operations go on, nothing was ever wrong, and neither is it now.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_unharmed(&mut self) {
        self.assert_works();
        let checked = self.handle.check(STEP).unwrap_or_else(|error| panic!("{error:#}"));
        assert!(checked.wrong == 0 && checked.pages > 0, "{checked:?}: {:#?}", self.wrong_lines());
        self.assert_works();
        self.assert_alone();
    }

    /// Its writing threads go on.
    ///
    /// # Panics
    /// If they do not.
    #[track_caller]
    pub fn assert_works(&mut self) {
        let before = self.ops();
        let went_on = self.handle.wait_beat(STEP, |beat| beat.ops > before);
        went_on.unwrap_or_else(|error| panic!("the workload stands still: {error:#}"));
    }

    /// Waits until its writing threads have done `more` operations.
    ///
    /// # Panics
    /// If they do not.
    #[track_caller]
    pub fn wait_ops(&mut self, more: u64) {
        let before = self.ops();
        let went_on = self.handle.wait_beat(STEP, |beat| beat.ops > before + more);
        went_on.unwrap_or_else(|error| panic!("the workload stands still: {error:#}"));
    }

    /// Ends it: the last check of everything finds nothing wrong.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn quit(mut self) {
        let done = self.handle.quit(STEP).unwrap_or_else(|error| panic!("{error:#}"));
        assert!(done.wrong == 0 && done.pages > 0, "{done:?}: {:#?}", self.wrong_lines());
        self.assert_alone();
    }

    /// What it has found wrong so far: read from the file, whether it still runs or not.
    #[must_use]
    pub fn wrong_lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.status).unwrap_or_default();
        text.lines().filter(|line| line.starts_with("WRONG")).map(str::to_owned).collect()
    }

    /// Two running copies would both write into its status file: the counters of one would be behind the other's.
    ///
    /// # Panics
    /// If they are.
    #[track_caller]
    pub fn assert_alone(&self) {
        let beats = self.handle.beats();
        for id in beats.iter().map(|beat| beat.id).collect::<std::collections::BTreeSet<_>>() {
            let ops: Vec<u64> = beats.iter().filter(|beat| beat.id == id).map(|beat| beat.ops).collect();
            assert!(ops.is_sorted(), "process {id} ran twice: {ops:?}");
        }
    }

    /// It ran here, and then in another PID namespace or not: heartbeats of both that take turns are two copies at
    /// once. Says whether it has run elsewhere.
    ///
    /// # Panics
    /// If it ever ran here again.
    #[track_caller]
    pub fn assert_ran_in_turn(&self) -> bool {
        let beats = self.handle.beats();
        let mut places: Vec<u64> = beats.iter().filter(|beat| beat.id == 0).map(|beat| beat.place).collect();
        assert!(!places.contains(&0), "a heartbeat that does not say from where");
        places.dedup();
        assert!(places.len() <= 2, "two copies took turns: {places:?}");
        places.len() == 2
    }

    fn ops(&self) -> u64 {
        self.handle.beats().iter().filter(|beat| beat.id == 0).map(|beat| beat.ops).max().unwrap_or(0)
    }

    /// The workload as its author gives it to tests.
    pub const fn handle(&mut self) -> &mut Handle {
        &mut self.handle
    }
}
