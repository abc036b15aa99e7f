//! What outlives the destination's program: its host, with the restored tasks and the keeper.

use std::fs::File;
use std::sync::{Arc, Mutex};

use uffd_daemon::keeper::Owner;

use super::kernel::Mm;
use super::tasks::Tasks;

/// The keeper: a process of its own.
#[derive(Debug)]
pub struct Keeper {
    /// The userfaultfds.
    pub held: Arc<Mutex<Vec<(Owner, Mm)>>>,
    /// The journal.
    pub journal: File,
}

/// What a destination says of its tasks for as long as they have not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Word {
    /// Nothing.
    #[default]
    None,
    /// They never will.
    NeverRan,
    /// CRIU says whether they do.
    Lifted,
}

/// What is left at the destination's host when its program is killed.
#[derive(Debug, Default)]
pub struct Host {
    /// The restored tree.
    pub tasks: Tasks,
    /// Who holds its userfaultfds.
    pub keeper: Option<Keeper>,
    /// The tasks have been let run.
    pub has_run: bool,
    /// What is left for a program that follows one which was killed.
    pub word: Word,
    /// They have everything and are left to themselves.
    pub finished: bool,
    /// How many programs have served them.
    pub generation: u32,
    /// The kernel's state of a page was not what the daemon made of it.
    pub wrong: Option<String>,
}

impl Host {
    /// CRIU lets the tasks run, and says so.
    pub fn let_run(&mut self) {
        (self.tasks.running, self.has_run) = (true, true);
        if self.word == Word::Lifted {
            self.word = Word::None;
        }
    }

    /// The program is killed. Where the tasks do not run yet CRIU kills what it has restored, unless `goes_on`: it had heard all that it
    /// waits for.
    pub fn program_is_killed(&mut self, goes_on: bool) {
        if self.word == Word::Lifted && goes_on {
            self.let_run();
        } else if !self.tasks.running {
            self.tasks.kill();
            self.keeper = None;
            if self.word == Word::Lifted {
                self.word = Word::NeverRan;
            }
        }
    }
}
