//! The thread that installs clean pages which nobody waits for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use host::mailbox::{Mailbox, Post, mailbox};

use super::Unneeded;
use super::kept::HOT_ROUND;
use crate::background::{Piece, install_slice};
use crate::limits;
use crate::pages::Arrival;
use crate::tree::Tree;

/// How far it is.
#[derive(Debug)]
pub enum Milestone {
    /// What was written while it was copied is installed.
    Hot,
    /// Everything is, or it was told to end.
    All,
    /// The kernel refused an install; the thread has ended.
    Broken(io::Error),
}

/// Installs clean pages in the background, hot ones first. Dropped, it ends.
#[derive(Debug)]
pub struct Installing {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
    /// What it has reached.
    pub milestones: Mailbox<Milestone>,
}

#[derive(Debug, Default)]
struct State {
    /// Everything is restored, and may be installed.
    begin: AtomicBool,
    end: AtomicBool,
    /// There is nothing left to install, or it cannot be.
    ended: AtomicBool,
}

impl Installing {
    /// A thread that gives back the memory of what is not clean, and waits for [`Installing::begin`]: in this order if what is
    /// clean is to be installed `before` the tasks run. Otherwise the processors are the restore's until then: there is a
    /// system call for each piece that is stale.
    ///
    /// # Errors
    /// The errno of making a thread or a mailbox.
    pub fn start(tree: Arc<Tree>, unneeded: Unneeded, before: bool) -> io::Result<Self> {
        let (post, milestones) = mailbox()?;
        let state = Arc::new(State::default());
        let thread = {
            let state = state.clone();
            std::thread::Builder::new().name("install".into()).spawn(move || {
                if !before {
                    state.wait_begun();
                }
                drop(unneeded);
                let result = run(&tree, &state, &post);
                state.ended.store(true, Ordering::Release);
                post.send(result.map_or_else(Milestone::Broken, |()| Milestone::All));
            })?
        };
        Ok(Self { state, thread: Some(thread), milestones })
    }

    /// Every lazy area is registered: installing begins.
    pub fn begin(&self) {
        self.state.begin.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Whether it does nothing any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.state.ended.load(Ordering::Acquire)
    }
}

impl State {
    fn wait_begun(&self) {
        while !self.begin.load(Ordering::Acquire) {
            std::thread::park();
        }
    }
}

impl Drop for Installing {
    fn drop(&mut self) {
        self.state.end.store(true, Ordering::Relaxed);
        self.begin();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(tree: &Arc<Tree>, state: &State, post: &Post<Milestone>) -> io::Result<()> {
    if let Err(error) = kernel::sched::set_batch(limits::SLICE_NS) {
        tracing::debug!("no short time slice for installing: {error}");
    }
    let ends = || state.end.load(Ordering::Relaxed);
    for position in 0..tree.len() {
        while !ends() && tree.lock_last(position).sort_out_kept() {}
    }
    state.wait_begun();
    // The fault loop may not have got to the last of them yet. Without its space a page is missing nowhere.
    while !ends() && !tree.is_restored() {
        std::thread::sleep(Duration::from_micros(100));
    }
    let _steered = tree.installing_thread.this_thread();
    for least in [HOT_ROUND, 0] {
        for position in 0..tree.len() {
            while !ends() {
                let next = tree.lock_last(position).next_kept(least);
                let Some(pages) = next else { break };
                install_slice(tree, position, |family| {
                    let arrival = family.arrived_kept(pages.start, pages.end)?;
                    // What is not kept here comes otherwise.
                    Ok(match (arrival, family.kept_in(pages.start, pages.end)) {
                        (Arrival::Blocked(why), Some((first, end))) => Piece::Blocked { why, first, end },
                        _ => Piece::Last,
                    })
                })?;
                if tree.lock_last(position).remote_pages() == 0 {
                    tree.check_settled();
                }
            }
        }
        if least == HOT_ROUND {
            post.send(Milestone::Hot);
        }
    }
    Ok(())
}
