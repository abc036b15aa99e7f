//! The threads that serve a session's lanes: a fault loop for each fault lane, one thread for each push lane.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};

use host::mailbox::{Mailbox, Post, mailbox};
use kernel::uffd::Uffd;
use protocol::bitmap::Bitmap;
use protocol::link::Stream;
use protocol::units::pages_to_bytes;
use protocol::wire::control::PageCounts;

use super::ByteCount;
use super::arrivals::Lanes;
use crate::fault::{Command, FaultLoop, LatencyHistogram, Notice, held_by, latency_histogram};
use crate::keeper::KeeperHandle;
use crate::push::{PushError, PushLane};
use crate::takeover::ServedSpace;
use crate::tree::Tree;
use crate::upstream::FaultLane;

/// The threads, and what they tell.
pub(super) struct LaneThreads {
    tree: Arc<Tree>,
    keeper: KeeperHandle,
    pub(super) latency: LatencyHistogram,
    pub(super) notices: Mailbox<Notice>,
    notice_post: Post<Notice>,
    pub(super) pushed: Mailbox<Result<(), PushError>>,
    push_post: Post<Result<(), PushError>>,
    /// The first reads always, the others assist it.
    loops: Vec<(Post<Command<FaultLane>>, JoinHandle<()>)>,
    /// Of the push lanes, so that they can be ended.
    pushes: Vec<Stream>,
    push_threads: Vec<JoinHandle<()>>,
    fault_bytes: ByteCount,
    /// Bytes of the push lanes that are no page.
    push_heads: ByteCount,
}

impl LaneThreads {
    /// The first fault loop; it has no lane yet.
    pub(super) fn start(tree: Arc<Tree>, keeper: KeeperHandle) -> io::Result<Self> {
        let (notice_post, notices) = mailbox()?;
        let (push_post, pushed) = mailbox()?;
        let mut this = Self {
            tree,
            keeper,
            latency: latency_histogram(),
            notices,
            notice_post,
            pushed,
            push_post,
            loops: Vec::new(),
            pushes: Vec::new(),
            push_threads: Vec::new(),
            fault_bytes: Arc::new(AtomicU64::new(0)),
            push_heads: Arc::new(AtomicU64::new(0)),
        };
        this.start_loop()?;
        Ok(this)
    }

    fn start_loop(&mut self) -> io::Result<()> {
        let (post, commands) = mailbox()?;
        let keep = Some(held_by(self.keeper.clone()));
        let (notices, latency) = (self.notice_post.clone(), self.latency.clone());
        let mut fault_loop = FaultLoop::new(self.tree.clone(), None, commands, notices, keep, latency);
        if let Some((first, _)) = self.loops.first() {
            fault_loop = fault_loop.assisting(self.loops.len(), first.clone());
        }
        let thread = Builder::new().name("fault".into()).spawn(move || drop(fault_loop.run()))?;
        if let Some((first, _)) = self.loops.first() {
            first.send(Command::Join(post.clone()));
        }
        self.loops.push((post, thread));
        Ok(())
    }

    /// Number of fault loops.
    pub(super) fn loops(&self) -> usize {
        self.loops.len()
    }

    fn tell_all(&self, command: impl Fn() -> Command<FaultLane>) {
        self.loops.iter().for_each(|(post, _)| post.send(command()));
    }

    /// What the restore hands over goes to the first loop, which tells the others.
    pub(super) fn first(&self) -> Option<Post<Command<FaultLane>>> {
        self.loops.first().map(|(post, _)| post.clone())
    }

    /// These spaces were served by another daemon, and their tasks run.
    pub(super) fn adopt(&self, spaces: &[ServedSpace<Arc<Uffd>>]) {
        if let Some((first, _)) = self.loops.first() {
            spaces.iter().cloned().for_each(|space| first.send(Command::Adopt(space)));
        }
        self.set_running();
    }

    /// The tasks run: each loop looks whether everything is settled and all that it asked answered, and says so.
    pub(super) fn set_running(&self) {
        self.tell_all(|| Command::Running);
    }

    /// Serves faults over these lanes: whatever was asked is asked again. What is pushed waits for
    /// [`LaneThreads::start_push`].
    pub(super) fn attach(&mut self, lanes: Lanes<Stream>) -> io::Result<()> {
        if lanes.faults.len() < self.loops.len() {
            // What a loop without a lane has asked for would never be answered.
            return Err(io::Error::other("the source has fewer fault lanes than before"));
        }
        while self.loops.len() < lanes.faults.len() {
            self.start_loop()?;
            // Which changes nothing for those that know.
            if self.tree.journal().is_some_and(crate::journal::Journal::is_running) {
                self.set_running();
            }
        }
        for ((post, _), stream) in self.loops.iter().zip(lanes.faults) {
            post.send(Command::Attach(FaultLane::new(stream, self.fault_bytes.clone())));
        }
        self.pushes = lanes.pushes;
        Ok(())
    }

    /// As [`LaneThreads::attach`] in place of lanes that were lost. Returns what is settled by now, which counts as
    /// acknowledged from here on.
    pub(super) fn attach_anew(&mut self, lanes: Lanes<Stream>) -> io::Result<Bitmap> {
        self.attach(lanes)?;
        let settled = self.tree.report_settled();
        self.start_push()?;
        Ok(settled)
    }

    /// Starts to install what is pushed.
    pub(super) fn start_push(&mut self) -> io::Result<()> {
        for stream in &self.pushes {
            let lane = PushLane::new(stream.try_clone()?, self.tree.clone(), self.push_heads.clone());
            let post = self.push_post.clone();
            let thread = Builder::new().name("push".into()).spawn(move || post.send(lane.run()))?;
            self.push_threads.push(thread);
        }
        Ok(())
    }

    /// Number of push lanes.
    pub(super) fn pushes(&self) -> usize {
        self.pushes.len()
    }

    /// Lets go of all lanes. Faults wait from here on; events are read, and present pages work.
    pub(super) fn detach(&mut self) {
        self.tell_all(|| Command::Detach);
        self.end_push();
        // What they ended with is no news.
        drop(self.pushed.empty());
    }

    fn end_push(&mut self) {
        self.pushes.drain(..).for_each(|lane| lane.shutdown());
        for thread in self.push_threads.drain(..) {
            let _ = thread.join();
        }
    }

    /// Ends every thread; `behind_push` between those of the push and the fault loops.
    pub(super) fn stop(&mut self, behind_push: impl FnOnce()) {
        // Whoever installs may wait for an event that a fault loop reads: the loops end behind them.
        self.pushes.iter().for_each(Stream::shutdown);
        behind_push();
        self.end_push();
        self.tell_all(|| Command::Stop);
        for (_, thread) in self.loops.drain(..) {
            let _ = thread.join();
        }
    }

    /// The account, and the bytes of the push lanes that are in it.
    pub(super) fn account(&self) -> (PageCounts, u64) {
        let (counts, pushed) = self.tree.account();
        // Read last: no page is without the head of its frame.
        (counts, self.push_heads.load(Ordering::Relaxed) + pages_to_bytes(pushed))
    }

    /// Bytes received on the fault lanes.
    pub(super) fn fault_bytes(&self) -> u64 {
        self.fault_bytes.load(Ordering::Relaxed)
    }
}
