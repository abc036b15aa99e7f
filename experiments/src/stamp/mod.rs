//! The stamping workload: a process that knows, for every page of its memory, what must be there.
//!
//! ```text
//! arena   | written by N threads | fixed | scratch | slices |
//!                                  `--- --fork ---'  `--- --churn
//! ```
//!
//! It says what it finds in its status file, one line each:
//!
//! ```text
//! READY id=0 pid=1234 pages=131072
//! BEAT id=0 t_ms=.. ops=.. pages=.. churn=.. forks=.. shared=.. wrong=0 gap_us=.. place=..     every 100 ms
//! WRONG page=0/Writers/77 expected=5 found=4 kind=stale t=..                          as it is found
//! CHECK 3 pages=.. wrong=..                                                           answer to `check 3`
//! DONE 4 pages=.. wrong=..                                                            answer to `quit 4`, the last line
//! ```
//!
//! `wrong` counts everything wrong since the start, in all processes; `gap_us` is the longest time one thread
//! needed from one operation to the next since the last heartbeat; `place` is the inode of the PID namespace that the
//! process is in, so two copies of it can be told apart. Kinds: `zero`, `stale`, `ahead`, `torn`, `alien`
//! (see [`page::Wrong`]), `ledger` (what the process remembers is damaged), `failed` (a system call or child failed).
//!
//! Nothing here ends or fails because of the time that passes: its life is counted in rounds of the control
//! thread, so a process that was frozen for an hour, or whose clock jumped, goes on where it was.

mod churn;
mod forks;
mod gate;
mod handle;
mod journal;
mod ledger;
pub mod page;
mod slice;
mod tree;
mod writers;

use std::process::{ExitCode, id};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use kernel::arena::Region;

pub use handle::{Beat, Checked, Handle};

use crate::clock::monotonic_ms;
use crate::workload::{self, ControlFile, Files, Order, Poll, StatusLog};
use churn::Churn;
use forks::{Forker, SCRATCH_PAGES};
use gate::{Gate, Work};
use journal::{Journal, Progress};
use page::{Part, Place};
use tree::{Answer, PROCESSES_MAX, Tree};
use writers::{Share, Writer};

/// Period of the control thread: how often it looks for orders.
const TICK: Duration = Duration::from_millis(20);
const TICKS_PER_SECOND: u64 = 50;
const TICKS_PER_BEAT: u64 = 5;
/// One page in so many is fixed (with `--fork`) or in slices (with `--churn`).
const FIXED_PART: usize = 8;
const SLICES_PART: usize = 4;
/// Exit status of a process that nobody steers any more.
const EXIT_ABANDONED: u8 = 4;

/// What the stamping workload is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Size of the arena of each process
    #[arg(long, default_value_t = 512)]
    pub mib: usize,
    /// Threads that write to the arena, in each process
    #[arg(long, default_value_t = 4)]
    pub threads: usize,
    /// Run a thread that maps, unmaps, moves, resizes and drops memory
    #[arg(long)]
    pub churn: bool,
    /// Run a thread that forks children which check their copy of the memory
    #[arg(long)]
    pub fork: bool,
    /// Processes in the tree; they share a file mapping and anonymous memory
    #[arg(long, default_value_t = 1)]
    pub tree: u16,
    /// Pause of a writing thread after each page, in microseconds
    #[arg(long, default_value_t = 0)]
    pub rate_us: u64,
    /// Run a thread that spins with its stack pointer on the first byte of a page (x86-64)
    #[arg(long)]
    pub aligned_stack: bool,
    /// How long to live, not counting the time frozen
    #[arg(long, default_value_t = 600)]
    pub seconds: u64,
    /// Where it reports and is told what to do
    #[command(flatten)]
    pub files: Files,
}

impl Options {
    /// The defaults of the command line.
    #[must_use]
    pub const fn new(files: Files) -> Self {
        Self {
            mib: 512,
            threads: 4,
            churn: false,
            fork: false,
            tree: 1,
            rate_us: 0,
            aligned_stack: false,
            seconds: 600,
            files,
        }
    }
}

/// Runs the workload in this process until it is told to quit; the exit status is 0 if nothing was ever wrong.
///
/// # Errors
/// If it cannot be set up.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let least = if options.churn || options.fork { 4 } else { 1 };
    ensure!(
        options.mib >= least && (1..=512).contains(&options.threads),
        "--mib of {least} or more, --threads of 1 to 512"
    );
    ensure!((1..=PROCESSES_MAX).contains(&options.tree), "--tree of 1 to {PROCESSES_MAX}");
    workload::detach()?;
    let files = options.files.absolute()?;
    let log = StatusLog::new(files.status.clone());
    workload::end_on_panic(log.clone());
    // Forks the other processes; from here on this is one of them.
    let tree = match options.tree {
        1 => None,
        processes => Some(Tree::grow(processes, &files.status.with_extension("shared"))?),
    };
    let journal = Arc::new(Journal::new(log));
    let team = Team::start(options, tree.as_ref(), Arc::clone(&journal)).context("setting up the arena")?;
    let mut process = Running { options, team, tree, journal };
    match process.team.process {
        0 => process.lead(&files),
        _ => process.follow(),
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::unnecessary_wraps, reason = "refused elsewhere")]
fn spin_on_page_boundary() -> anyhow::Result<()> {
    static NEVER: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    std::thread::spawn(|| kernel::stack::spin_on_page_boundary(&NEVER));
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn spin_on_page_boundary() -> anyhow::Result<()> {
    anyhow::bail!("--aligned-stack is made for x86-64 only")
}

/// The threads of one process and what they count.
struct Team {
    process: u16,
    pages: usize,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    writers: Vec<Arc<Progress>>,
    churn: Option<Arc<Progress>>,
    forks: Option<Arc<Progress>>,
    shared: Option<Arc<Progress>>,
}

impl Team {
    fn start(options: &Options, tree: Option<&Tree>, journal: Arc<Journal>) -> anyhow::Result<Self> {
        let process = tree.map_or(0, |tree| tree.process);
        let place = |part| Place { process, part, page: 0 };
        let pages = options.mib << 8;
        let mut arena = Region::anonymous(pages)?;
        let mut works: Vec<Box<dyn Work>> = Vec::new();
        let (mut churn, mut forks, mut shared) = (None, None, None);
        if options.churn {
            let work =
                Churn::new(process, arena.split_off(pages - pages / SLICES_PART), Arc::clone(&journal));
            churn = Some(work.progress());
            works.push(Box::new(work));
        }
        if options.fork {
            let scratch = arena.split_off(arena.pages() - SCRATCH_PAGES);
            let fixed = arena.split_off(arena.pages() - pages / FIXED_PART);
            let (fixed, scratch) = ((fixed, place(Part::Fixed)), (scratch, place(Part::Scratch)));
            let work = Forker::new(fixed, scratch, Arc::clone(&journal));
            forks = Some(work.progress());
            works.push(Box::new(work));
        }
        if let Some(tree) = tree {
            let work = tree.worker(Arc::clone(&journal));
            shared = Some(work.progress());
            works.push(Box::new(work));
        }
        let (arena, pause) = (Arc::new(arena), Duration::from_micros(options.rate_us));
        let mut writers = Vec::new();
        for index in 0..options.threads {
            let share = Share { index, of: options.threads };
            let (arena, journal) = (Arc::clone(&arena), Arc::clone(&journal));
            let work = Writer::new(arena, share, place(Part::Writers), pause, journal);
            writers.push(work.progress());
            works.push(Box::new(work));
        }
        let gate = Arc::new(Gate::new(works.len()));
        let threads = works.into_iter().map(|mut work| {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || gate.drive(work.as_mut()))
        });
        let threads = threads.collect();
        if options.aligned_stack {
            spin_on_page_boundary()?;
        }
        Ok(Self { process, pages, gate, threads, writers, churn, forks, shared })
    }

    fn beat(&self, wrong: u64) -> String {
        let sum =
            |count: fn(&Progress) -> u64| self.writers.iter().map(|progress| count(progress)).sum::<u64>();
        let ops = |progress: &Option<Arc<Progress>>| progress.as_ref().map_or(0, |progress| progress.ops());
        let gap_ns = self.writers.iter().map(|progress| progress.take_gap_ns()).max().unwrap_or(0);
        format!(
            "BEAT id={} t_ms={} ops={} pages={} churn={} forks={} shared={} wrong={wrong} gap_us={} place={}",
            self.process,
            monotonic_ms(),
            sum(Progress::ops),
            sum(Progress::pages),
            ops(&self.churn),
            ops(&self.forks),
            ops(&self.shared),
            gap_ns / 1000,
            place(),
        )
    }
}

/// The inode of the PID namespace that this process is in, 0 if it cannot be told.
fn place() -> u64 {
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let digits: String = namespace.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// One process of the workload at work.
struct Running<'a> {
    options: &'a Options,
    team: Team,
    tree: Option<Tree>,
    journal: Arc<Journal>,
}

impl Running<'_> {
    /// The root's control thread.
    fn lead(&mut self, files: &Files) -> anyhow::Result<ExitCode> {
        if let Some(tree) = &mut self.tree {
            tree.wait_ready(&self.journal);
        }
        self.journal.line(&format!("READY id=0 pid={} pages={}", id(), self.team.pages));
        let mut control = ControlFile::new(files.control.clone());
        for tick in 0..self.options.seconds.saturating_mul(TICKS_PER_SECOND) {
            match control.poll() {
                Poll::Command(command) if command.order == Order::Quit => {
                    return Ok(self.quit(command.number));
                }
                Poll::Command(command) if command.order == Order::Check => {
                    let answer = self.round(command.number, false);
                    self.answer("CHECK", command.number, answer);
                }
                Poll::Command(_) | Poll::Nothing => {}
                Poll::Abandoned => return Ok(ExitCode::from(EXIT_ABANDONED)),
            }
            if let Some(tree) = &mut self.tree {
                tree.bury_dead(&self.journal);
            }
            self.tick(tick);
        }
        Ok(self.quit(0))
    }

    /// The control thread of any other process of the tree.
    fn follow(&mut self) -> anyhow::Result<ExitCode> {
        let tree = self.tree.take().context("only a process of a tree follows")?;
        self.journal.line(&format!("READY id={} pid={} pages={}", tree.process, id(), self.team.pages));
        tree.announce();
        let mut tick = 0;
        while !tree.is_orphan() {
            if let Some(order) = tree.order() {
                let answer = self.round(order.0, order.1);
                tree.answer(order, answer);
                if order.1 {
                    self.join();
                    return Ok(ExitCode::from(u8::from(answer.wrong > 0)));
                }
            }
            self.tick(tick);
            tick += 1;
        }
        Ok(ExitCode::from(EXIT_ABANDONED))
    }

    fn tick(&self, tick: u64) {
        if tick % TICKS_PER_BEAT == 0 {
            self.journal.line(&self.team.beat(self.journal.wrong_count()));
        }
        std::thread::sleep(TICK);
    }

    /// One check of everything this process answers for: the root for the whole tree.
    fn round(&mut self, number: u64, last: bool) -> Answer {
        if let Some(tree) = &self.tree {
            tree.tell(number, last);
        }
        let pages = if last { self.team.gate.check_and_end() } else { self.team.gate.check() };
        let others = self.tree.as_mut().map(|tree| tree.collect(&self.journal)).unwrap_or_default();
        Answer { pages: pages + others.pages, wrong: self.journal.wrong_count() + others.wrong }
    }

    fn quit(&mut self, number: u64) -> ExitCode {
        let Answer { pages, wrong } = self.round(number, true);
        self.join();
        let before = self.journal.wrong_count();
        if let Some(tree) = &mut self.tree {
            tree.wait_end(&self.journal);
        }
        let wrong = wrong + (self.journal.wrong_count() - before);
        self.answer("DONE", number, Answer { pages, wrong });
        ExitCode::from(u8::from(wrong > 0))
    }

    fn join(&mut self) {
        for thread in self.team.threads.drain(..) {
            let _ = thread.join(); // a panic has ended the process already
        }
    }

    fn answer(&self, word: &str, number: u64, answer: Answer) {
        self.journal.line(&format!("{word} {number} pages={} wrong={}", answer.pages, answer.wrong));
    }
}
