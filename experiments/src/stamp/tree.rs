//! Several processes that share memory: a root and the children it forks before any of them has a second thread.
//!
//! ```text
//! shared anonymous memory   | fixed | own of 0 | own of 1 | ... | mail 0 | mail 1 | ...
//! shared file               | fixed | own of 0 | own of 1 | ...
//! ```
//!
//! The fixed pages are stamped once and checked by everybody; each process rewrites its own. Only the root reads
//! the control file: it passes orders on, and gets the answers, through the mail pages, whose words are flags and
//! counters instead of a stamp.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use anyhow::Context;
use kernel::arena::{Region, Side, fork_single_threaded};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};

use super::gate::Work;
use super::journal::{Journal, Progress};
use super::ledger::Ledger;
use super::page::{self, Part, Place};
use crate::random::Random;

/// Most processes in a tree: their number has to fit a place.
pub(super) const PROCESSES_MAX: u16 = 256;
const FIXED_PAGES: usize = 64;
const OWN_PAGES: usize = 64;

/// What a process and the root tell each other; one page per process.
#[derive(Clone, Copy)]
enum Mail {
    Ready,
    Order,
    Answered,
    Pages,
    Wrong,
}

/// An order as it is passed on: twice its number, plus one for the last.
fn encode(number: u64, last: bool) -> u64 {
    number << 1 | u64::from(last)
}

/// This process's view of its tree.
pub(super) struct Tree {
    /// 0 for the root.
    pub(super) process: u16,
    processes: u16,
    anonymous: Arc<Region>,
    file: Arc<Region>,
    parent: Pid,
    children: Vec<Pid>,
}

/// What all children together answered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answer {
    /// Pages verified.
    pub(super) pages: u64,
    /// Wrong since the start.
    pub(super) wrong: u64,
}

impl Tree {
    /// Maps the shared memory, `file` among it, and forks the children. Returns in every process of the tree.
    ///
    /// # Errors
    /// If the file, a mapping or a child cannot be made.
    pub(super) fn grow(processes: u16, file: &Path) -> anyhow::Result<Self> {
        let pages = FIXED_PAGES + usize::from(processes) * OWN_PAGES;
        let bytes = protocol::units::pages_to_bytes(u64::try_from(pages)?);
        let backing = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(file);
        let backing = backing.with_context(|| format!("creating {file:?}"))?;
        backing.set_len(bytes)?;
        let mut tree = Self {
            process: 0,
            processes,
            anonymous: Arc::new(Region::shared_anonymous(pages + usize::from(processes))?),
            file: Arc::new(Region::shared_file(&backing, pages)?),
            parent: getppid(),
            children: Vec::new(),
        };
        for (region, part) in tree.parts() {
            for page in 0..FIXED_PAGES {
                page::write(region.page(page), fixed_place(part).offset(page), 1, 0);
            }
        }
        for process in 1..processes {
            match fork_single_threaded().context("forking a process of the tree")? {
                Side::Parent { child } => tree.children.push(child),
                Side::Child => {
                    tree.process = process;
                    tree.parent = getppid();
                    tree.children.clear();
                    break;
                }
            }
        }
        Ok(tree)
    }

    fn parts(&self) -> [(Arc<Region>, Part); 2] {
        [(Arc::clone(&self.anonymous), Part::SharedAnonymous), (Arc::clone(&self.file), Part::SharedFile)]
    }

    /// The worker for the shared memory.
    #[must_use]
    pub(super) fn worker(&self, journal: Arc<Journal>) -> SharedWorker {
        SharedWorker::new(self, journal)
    }

    fn mail(&self, process: u16, word: Mail) -> &AtomicU64 {
        let first = FIXED_PAGES + usize::from(self.processes) * OWN_PAGES;
        &self.anonymous.page(first + usize::from(process))[word as usize]
    }

    /// Says that this process works.
    pub(super) fn announce(&self) {
        self.mail(self.process, Mail::Ready).store(1, SeqCst);
    }

    /// Root: waits until every child works. Returns early if one has died.
    pub(super) fn wait_ready(&mut self, journal: &Journal) {
        for child in 1..self.processes {
            while self.mail(child, Mail::Ready).load(SeqCst) == 0 && !self.bury_dead(journal) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Root: passes an order on.
    pub(super) fn tell(&self, number: u64, last: bool) {
        self.mail(0, Mail::Order).store(encode(number, last), SeqCst);
    }

    /// Root: the answers of all children to the order told last. A child that died has no answer and is reported.
    pub(super) fn collect(&mut self, journal: &Journal) -> Answer {
        let order = self.mail(0, Mail::Order).load(SeqCst);
        let mut sum = Answer::default();
        for child in 1..self.processes {
            while self.mail(child, Mail::Answered).load(SeqCst) != order && !self.bury_dead(journal) {
                std::thread::sleep(Duration::from_millis(1));
            }
            sum.pages += self.mail(child, Mail::Pages).load(SeqCst);
            sum.wrong += self.mail(child, Mail::Wrong).load(SeqCst);
        }
        sum
    }

    /// Root: reports children that ended without having been told to; says whether any child is missing now.
    pub(super) fn bury_dead(&mut self, journal: &Journal) -> bool {
        let told_to_end = self.mail(0, Mail::Order).load(SeqCst) & 1 == 1;
        if !told_to_end {
            self.children.retain(|&child| match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => true,
                other => {
                    journal.failed("tree-child", &format!("{child}:{other:?}"));
                    false
                }
            });
        }
        self.children.len() + 1 < usize::from(self.processes)
    }

    /// Root: waits for the children after the last order; one that did not exit with 0 is reported.
    pub(super) fn wait_end(&mut self, journal: &Journal) {
        for child in self.children.drain(..) {
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, 0 | 1)) => {} // 1: it found something wrong, and its answer said so
                other => journal.failed("tree-child-end", &format!("{child}:{other:?}")),
            }
        }
    }

    /// Child: an order that was not answered yet: its number and whether it is the last.
    #[must_use]
    pub(super) fn order(&self) -> Option<(u64, bool)> {
        let order = self.mail(0, Mail::Order).load(SeqCst);
        let answered = self.mail(self.process, Mail::Answered).load(SeqCst);
        (order != answered).then_some((order >> 1, order & 1 == 1))
    }

    /// Child: answers the order.
    pub(super) fn answer(&self, order: (u64, bool), answer: Answer) {
        self.mail(self.process, Mail::Pages).store(answer.pages, SeqCst);
        self.mail(self.process, Mail::Wrong).store(answer.wrong, SeqCst);
        self.mail(self.process, Mail::Answered).store(encode(order.0, order.1), SeqCst);
    }

    /// Child: whether the root is gone.
    #[must_use]
    pub(super) fn is_orphan(&self) -> bool {
        getppid() != self.parent
    }
}

fn fixed_place(part: Part) -> Place {
    Place { process: 0, part, page: 0 }
}

/// One process's pages in one of the shared mappings.
struct Own {
    region: Arc<Region>,
    part: Part,
    start: usize,
    ledger: Ledger,
}

/// The thread that works on shared memory.
pub(super) struct SharedWorker {
    process: u16,
    parts: Vec<Own>,
    random: Random,
    journal: Arc<Journal>,
    progress: Arc<Progress>,
}

impl SharedWorker {
    fn new(tree: &Tree, journal: Arc<Journal>) -> Self {
        let process = tree.process;
        let start = FIXED_PAGES + usize::from(process) * OWN_PAGES;
        let own = |(region, part)| Own { region, part, start, ledger: Ledger::filled(OWN_PAGES, 1) };
        let parts: Vec<Own> = tree.parts().map(own).into();
        for own in &parts {
            for page in 0..OWN_PAGES {
                let place = Place { process, part: own.part, page: 0 }.offset(start + page);
                page::write(own.region.page(start + page), place, 1, process.into());
            }
        }
        Self {
            process,
            parts,
            random: Random::new(0x5a + u64::from(process)),
            journal,
            progress: Arc::default(),
        }
    }

    /// Where it counts what it does.
    #[must_use]
    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    fn check_own(&self, part: &Own, page: usize) {
        let place = Place { process: self.process, part: part.part, page: 0 }.offset(part.start + page);
        self.journal.check(part.region.page(part.start + page), place, part.ledger.get(page));
    }
}

impl Work for SharedWorker {
    fn step(&mut self) {
        for index in 0..self.parts.len() {
            let (page, fixed) = (self.random.below(OWN_PAGES), self.random.below(FIXED_PAGES));
            self.check_own(&self.parts[index], page);
            let part = &mut self.parts[index];
            let generation = part.ledger.get(page).wrapping_add(1).max(1);
            let place = Place { process: self.process, part: part.part, page: 0 }.offset(part.start + page);
            page::write(part.region.page(part.start + page), place, generation, self.process.into());
            part.ledger.set(page, generation);
            self.journal.check(part.region.page(fixed), fixed_place(part.part).offset(fixed), 1);
        }
        self.progress.operation(4);
        std::thread::sleep(Duration::from_millis(1));
    }

    fn verify(&mut self) -> u64 {
        for part in &self.parts {
            for page in 0..OWN_PAGES {
                self.check_own(part, page);
            }
            for page in 0..FIXED_PAGES {
                self.journal.check(part.region.page(page), fixed_place(part.part).offset(page), 1);
            }
        }
        u64::try_from(self.parts.len() * (OWN_PAGES + FIXED_PAGES)).unwrap_or(0)
    }
}
