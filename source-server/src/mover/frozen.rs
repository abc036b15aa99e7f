//! From the freeze to the switchover. Everything here can be undone.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::criu::Criu;
use host::hooks::HookPhase;
use host::mailbox::{Mailbox, Post, mailbox};
use host::placement::threads_of;
use host::workdir::WorkDir;
use protocol::bitmap::Bitmap;
use protocol::criu::checkpoint::Checkpoint;
use protocol::lazy_map::LazyMap;
use protocol::link::{ControlError, Stream};
use protocol::wire::control::{Control, Dumped};
use protocol::wire::switchover::source::{Action, Ending, Event, Switchover};

use super::session::{Next, Session};
use super::{Mover, StoreKind};
use crate::dump::{Dump, DumpError};
use crate::fence::{self, Fence};
use crate::kept::{Fenced, Holder, Word};
use crate::lanes::{
    Aside, CALLING_THREAD, LaneError, Lanes, Pace, Pushing, acknowledgements, push, serve_faults,
};
use crate::limits;
use crate::netlock::NetworkLock;
use crate::precopy::Copied;
use crate::process::ProcessTree;
use crate::store::{FrozenStore, PageStore, PipeStore, StoreError, TaskMemory};

/// What the threads of a move tell its main one.
#[derive(Debug)]
pub(super) enum Notice {
    /// The drain is over.
    Drained(Result<(), StoreError>),
    /// A lane ended.
    Lane(Result<(), LaneError>),
    /// Every page was acknowledged.
    AllAcknowledged,
}

/// Tasks that stand still behind a fence, with their pages at hand.
pub(super) struct Frozen {
    pub(super) tasks: Tasks,
    pub(super) serving: Serving,
    pub(super) drained: bool,
    /// What a successor of this process finds; nothing if it could not be left.
    pub(super) word: Option<Word>,
    /// The lazy pages that the destination has from pre-copy.
    clean: Option<Bitmap>,
}

/// The tasks and who holds them.
pub(super) struct Tasks {
    pub(super) tree: ProcessTree,
    pub(super) network: NetworkLock,
    /// None if another process started it, which has ended with it.
    pub(super) dump: Option<Dump>,
    /// Who keeps CRIU from ending if this process is killed behind `Commit`.
    pub(super) holder: Option<Holder>,
    pub(super) fence: Fence,
    pub(super) pipes: Option<Arc<PipeStore>>,
    pub(super) drain: Option<JoinHandle<()>>,
    /// None if another process has frozen them.
    pub(super) frozen_at: Option<Instant>,
    /// What pre-copy has sent; the tree is disarmed when it is dropped.
    pub(super) copied: Option<Copied>,
    /// Gone with the move; holds images and CRIU's log.
    pub(super) _dir: WorkDir,
}

/// What the destination is served from.
pub(super) struct Serving {
    pub(super) map: Arc<LazyMap>,
    pub(super) lanes: Arc<Lanes>,
    pub(super) post: Post<Notice>,
    pub(super) notices: Mailbox<Notice>,
}

impl Serving {
    /// Starts the threads that serve the fault lanes.
    pub(super) fn serve_faults(&self, session: &Session) -> Result<Vec<JoinHandle<()>>, String> {
        let serve = |stream: &Stream| {
            let (lanes, post) = (self.lanes.clone(), self.post.clone());
            let stream = clone_stream(stream)?;
            std::thread::Builder::new()
                .name("fault".into())
                .spawn(move || post.send(Notice::Lane(serve_faults(&lanes, &stream))))
                .map_err(|error| format!("cannot start a thread: {error}"))
        };
        session.lanes.faults.iter().map(serve).collect()
    }

    /// Starts the threads of the push lanes.
    pub(super) fn push(&self, session: &Session, pace: Pace) -> Result<Vec<JoinHandle<()>>, String> {
        let pushing = Arc::new(Pushing::new(&self.lanes, pace));
        let told = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for stream in &session.lanes.pushes {
            let (out, back) = (clone_stream(stream)?, clone_stream(stream)?);
            let (lanes, post, pushing) = (self.lanes.clone(), self.post.clone(), pushing.clone());
            let thread = std::thread::Builder::new().name("push".into()).spawn(move || {
                post.send(Notice::Lane(push(&lanes, &out, &pushing)));
            });
            threads.push(thread.map_err(|error| format!("cannot start a thread: {error}"))?);
            let (lanes, post, told) = (self.lanes.clone(), self.post.clone(), told.clone());
            threads.push(std::thread::spawn(move || {
                post.send(match acknowledgements(&lanes, &back) {
                    // All lanes end when the last page is acknowledged, on whichever.
                    Ok(()) if told.swap(true, Ordering::Relaxed) => Notice::Lane(Ok(())),
                    Ok(()) => Notice::AllAcknowledged,
                    Err(error) => Notice::Lane(Err(error)),
                });
            }));
        }
        Ok(threads)
    }
}

/// Why the destination does not run, and what follows from it.
pub(super) struct Why {
    pub(super) reason: String,
    pub(super) then: Action,
}

impl From<String> for Why {
    /// Something failed where there is no way back.
    fn from(reason: String) -> Self {
        Self { reason, then: Action::End(Ending::Hold) }
    }
}

impl Why {
    /// Something failed here.
    pub(super) fn broken(switchover: &mut Switchover, reason: String) -> Self {
        Self { reason, then: switchover.step(Event::Broken) }
    }
}

impl Frozen {
    /// Freezes and dumps. On an error the tasks run again.
    pub(super) fn dump(
        mover: &mut Mover,
        tree: &ProcessTree,
        criu: &Criu,
        mut network: NetworkLock,
        mut copied: Option<Copied>,
    ) -> Result<Self, String> {
        not_interrupted(mover)?;
        let dir = WorkDir::create(mover.config.work_dir.as_deref(), "postcopy-source")
            .map_err(|error| format!("cannot make a working directory: {error}"))?;
        mover.recorder.phase("freeze");
        let mut tries = 0;
        let (mut dump, frozen_at) = loop {
            let mut dump = Dump::start(criu, mover.config.pid, dir.path(), &mover.config.criu_options)
                .map_err(|error| why_not_frozen(tree, &error))?;
            tries += 1;
            let last_try = tries == limits::ALIGNED_STACK_TRIES;
            let interrupt = mover.interrupt.as_fd();
            let root = tree.root().pid;
            let look_ahead = || look_ahead(copied.as_mut(), root);
            match dump.wait_ready(root, last_try, interrupt, limits::DUMP_TIMEOUT, look_ahead) {
                Ok(frozen_at) => break (dump, frozen_at),
                // The next freeze will find the thread elsewhere, unless it sleeps there.
                Err(error @ DumpError::AlignedStack(_)) => tracing::info!("{error}; trying again"),
                Err(error) => {
                    let undone = let_run(tree, &mut network, None);
                    return Err(and(why_not_frozen(tree, &error), undone));
                }
            }
        };
        mover.recorder.phase_at("dump", frozen_at);
        // Tasks come and go until the freeze: the images hold those of this moment.
        let raised = tree.as_frozen().map_err(|error| error.to_string()).and_then(|tree| {
            let fence = Fence::raise(&tree).map_err(|error| error.to_string())?;
            Ok((tree, fence))
        });
        let (tree, fence) = match raised {
            Ok(raised) => raised,
            Err(reason) => {
                dump.kill();
                return Err(and(reason, let_run(tree, &mut network, None)));
            }
        };
        let prepared = not_interrupted(mover)
            .and_then(|()| still_held(&dump))
            .and_then(|()| Self::prepare(mover, &tree, &dump, &mut network));
        match prepared.and_then(|parts| Ok((parts, mailbox().map_err(|error| error.to_string())?))) {
            Ok(((map, lanes, pipes), (post, notices))) => {
                let held = Fenced { tree: &tree, fence: &fence, network: &network, dump: &dump };
                let word = leave_word(mover, held, &map, dir.path());
                let (dump, frozen_at) = (Some(dump), Some(frozen_at));
                let (holder, drain) = (None, None);
                let tasks =
                    Tasks { tree, network, dump, holder, fence, pipes, drain, frozen_at, copied, _dir: dir };
                let serving = Serving { map, lanes, post, notices };
                let mut frozen = Self { tasks, serving, drained: true, word, clean: None };
                if let Err(error) = frozen.start_drain(criu) {
                    return Err(and(format!("cannot drain criu's page server: {error}"), frozen.roll_back()));
                }
                frozen.find_clean();
                Ok(frozen)
            }
            Err(reason) => {
                close(&mut dump);
                Err(and(reason, let_run(&tree, &mut network, Some(fence))))
            }
        }
    }

    #[allow(clippy::type_complexity)]
    fn prepare(
        mover: &Mover,
        tree: &ProcessTree,
        dump: &Dump,
        network: &mut NetworkLock,
    ) -> Result<(Arc<LazyMap>, Arc<Lanes>, Option<Arc<PipeStore>>), String> {
        let checkpoint = Checkpoint::open(&dump.images).map_err(|error| error.to_string())?;
        network.note_run(checkpoint.inventory.dump_criu_run_id.as_deref());
        let live = checkpoint.tasks.iter().filter(|task| task.alive);
        let map = LazyMap::new(live.map(|task| (task.id, task.lazy_runs())));
        let map = Arc::new(map.map_err(|error| error.to_string())?);
        let memory = memory_of(tree, &map)?;
        let (store, pipes): (Arc<dyn PageStore>, _) = match mover.config.store {
            StoreKind::Frozen => (Arc::new(FrozenStore::new(map.clone(), memory)), None),
            StoreKind::Pipes => {
                let pipes = PipeStore::new(map.clone(), memory, descriptors_for_pipes());
                let pipes = Arc::new(pipes.map_err(|error| error.to_string())?);
                (pipes.clone(), Some(pipes))
            }
        };
        let lanes = Lanes::new(map.clone(), store);
        Ok((map, lanes, pipes))
    }

    fn start_drain(&mut self, criu: &Criu) -> std::io::Result<()> {
        let Some(pipes) = self.tasks.pipes.clone() else { return Ok(()) };
        let Some(dump) = &self.tasks.dump else { return Ok(()) };
        let (server, criu, layout) = (dump.server.try_clone()?, dump.pid(), criu.layout);
        let (post, lanes) = (self.serving.post.clone(), self.serving.lanes.clone());
        let drain = std::thread::Builder::new().name("drain".into()).spawn(move || {
            let mut aside = Aside::new();
            let make_way = || aside.follow(&lanes, threads_of(criu).chain([CALLING_THREAD]));
            post.send(Notice::Drained(pipes.drain(&server, layout, make_way)));
        })?;
        (self.tasks.drain, self.drained) = (Some(drain), false);
        Ok(())
    }

    /// The last scan: what pre-copy has sent and nobody has written since need not be sent again. CRIU itself writes a page
    /// for each thread while it dumps, so it comes behind that.
    fn find_clean(&mut self) {
        let Some(copied) = &mut self.tasks.copied else { return };
        let began = Instant::now();
        let found = copied.last_scan(&self.tasks.tree, &self.serving.map);
        let clean = found.clean.count();
        self.serving.lanes.copied_ahead(&found.clean, &found.hot);
        self.clean = (clean > 0).then_some(found.clean);
        let (lazy, written, us) = (self.serving.map.pages(), found.written, began.elapsed().as_micros());
        tracing::info!(lazy, clean, written, us, "last scan");
    }

    /// Ships the images, waits for the restore, and commits. Returns when the destination runs, or when the
    /// connections are lost and it may.
    pub(super) fn reach_commit(
        &mut self,
        mover: &mut Mover,
        session: &Session,
        switchover: &mut Switchover,
    ) -> Result<Commit, Why> {
        let mut commit = self.ship(mover, session).map_err(|reason| Why::broken(switchover, reason))?;
        let prepared = Awaited::new("prepared", limits::RESTORE_TIMEOUT, limits::REASON_PATIENCE);
        self.wait(mover, session, switchover, &mut commit, prepared)?;
        let stands = fence::stands(&self.tasks.tree);
        if stands {
            self.promise().map_err(|error| {
                Why::broken(switchover, format!("cannot write down that it commits: {error}"))
            })?;
        }
        let then = switchover.step(Event::Fence { stands });
        if then != Action::SendCommit {
            return Err(Why { reason: "a task of the source moves although it was stopped".into(), then });
        }
        let mut awaited = Awaited::new("running", limits::RUNNING_TIMEOUT, limits::ROLLED_BACK_TIMEOUT);
        if let Err(error) = session.control.send(&Control::Commit) {
            // Perhaps it arrived; or the destination had given up before, and its word that it is clean is here.
            let then = switchover.step(Event::Failing);
            if then != Action::AwaitReason {
                return Err(Why { reason: lost(&error), then });
            }
            awaited.within = awaited.patience;
            awaited.failure = Some(lost(&error));
        }
        self.wait(mover, session, switchover, &mut commit, awaited)?;
        Ok(commit)
    }

    /// Behind this a successor of this process does not let the tasks run by itself, and CRIU does not end with it.
    fn promise(&mut self) -> std::io::Result<()> {
        let (Some(word), Some(dump)) = (&self.word, &self.tasks.dump) else { return Ok(()) };
        let holder = Holder::of_dump(dump)?;
        let written = word.promise(&holder);
        self.tasks.holder = Some(holder);
        written
    }

    fn ship(&self, mover: &mut Mover, session: &Session) -> Result<Commit, String> {
        mover.hooks.run(HookPhase::PostDump).map_err(|error| error.to_string())?;
        mover.recorder.phase("ship");
        let failed = |error: ControlError| session.lost(&error);
        let Tasks { dump: Some(dump), frozen_at: Some(frozen_at), .. } = &self.tasks else {
            return Err("there is nothing to ship".into());
        };
        let (images, bytes) = session.ship(&dump.images).map_err(failed)?;
        let frozen_us = u64::try_from(frozen_at.elapsed().as_micros()).unwrap_or(u64::MAX);
        let clean_pages = self.clean.as_ref().map_or(0, Bitmap::count);
        let dumped = Dumped { images, frozen_us, lazy_pages: self.serving.map.pages(), clean_pages };
        let mut more = session.control.send(&Control::Dumped(dumped)).map_err(failed)?;
        if let Some(clean) = &self.clean {
            more += session.tell_clean(clean).map_err(failed)?;
        }
        mover.recorder.report().bytes.control += bytes + more;
        mover.recorder.phase("restore");
        let fault_lanes = self.serving.serve_faults(session)?;
        Ok(Commit { answer: Answer::Runs(Instant::now()), drained: self.drained, fault_lanes })
    }

    /// Waits until something is decided; anything but the awaited message is an error.
    fn wait(
        &self,
        mover: &Mover,
        session: &Session,
        switchover: &mut Switchover,
        commit: &mut Commit,
        mut awaited: Awaited,
    ) -> Result<(), Why> {
        let mut deadline = Instant::now() + awaited.within;
        let mut refusal = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (event, what) =
                match session.next([self.serving.notices.as_fd(), mover.interrupt.as_fd()], left) {
                    Ok(Next::Message(message)) => (Event::from(&message), awaited.not_this(message)),
                    Ok(Next::Other(0)) => match self.take_notices(commit) {
                        None => continue,
                        Some(failed) => failed,
                    },
                    Ok(Next::Other(_)) => (Event::Interrupted, "interrupted".into()),
                    Ok(Next::TimedOut) => (Event::Broken, awaited.missing()),
                    Err(error) => (error_event(&error), lost(&error)),
                };
            match switchover.step(event) {
                Action::CheckFence => return Ok(()),
                Action::Push => {
                    commit.answer = Answer::Runs(Instant::now());
                    return Ok(());
                }
                Action::Resume => {
                    commit.answer = Answer::Lost(what);
                    return Ok(());
                }
                Action::Wait => match event {
                    Event::Interrupted if mover.interrupt.take() => {
                        tracing::warn!("past the switchover: the move goes on");
                    }
                    Event::Undrained => goes_on_undrained(&what),
                    _ => {}
                },
                Action::AwaitReason => {
                    awaited.failure = Some(what);
                    deadline = deadline.min(Instant::now() + awaited.patience);
                }
                Action::AwaitRolledBack => {
                    refusal = Some(what);
                    deadline = deadline.min(Instant::now() + limits::REASON_PATIENCE);
                }
                then => {
                    let reason = match (event, refusal) {
                        (Event::Abort, None) => format!("destination: {what}"),
                        (Event::RolledBack, Some(refusal)) => format!("destination: {refusal}"),
                        (_, Some(refusal)) => {
                            format!("the destination failed after the switchover: {refusal}")
                        }
                        _ => what,
                    };
                    return Err(Why { reason, then });
                }
            }
        }
    }

    /// What has gone wrong, if anything has.
    fn take_notices(&self, commit: &mut Commit) -> Option<(Event, String)> {
        let mut failed = None;
        for notice in self.serving.notices.empty() {
            match notice {
                Notice::Drained(result) => {
                    commit.drained = true;
                    let why = self.tasks.why_undrained(result);
                    failed = failed.or(why.map(|why| (Event::Undrained, why)));
                }
                Notice::Lane(Ok(())) | Notice::AllAcknowledged => {}
                Notice::Lane(Err(error)) => failed = Some((Event::Failing, error.to_string())),
            }
        }
        failed
    }

    /// See [`Tasks::roll_back`].
    pub(super) fn roll_back(self) -> Result<(), String> {
        self.tasks.roll_back(&self.serving.lanes, self.word)
    }
}

/// While CRIU dumps: what was written since the last round. Whatever this does not find, the last scan does.
fn look_ahead(copied: Option<&mut Copied>, root: u32) {
    let began = Instant::now();
    let Some((copied, tree)) = copied.zip(ProcessTree::of(root).ok()) else { return };
    copied.look_ahead(&tree);
    tracing::debug!(us = began.elapsed().as_micros(), "look ahead");
}

impl Tasks {
    /// Lets the tasks run here again: CRIU's session ends, sockets leave repair mode, the network is
    /// unlocked, the fence comes down. What followed their writes is taken off them while they run: it takes a while.
    pub(super) fn roll_back(mut self, lanes: &Lanes, word: Option<Word>) -> Result<(), String> {
        self.end_dump(lanes);
        self.let_run(word)
    }

    /// As [`Tasks::roll_back`], where CRIU has ended.
    pub(super) fn let_run(mut self, word: Option<Word>) -> Result<(), String> {
        let result = let_run(&self.tree, &mut self.network, Some(self.fence));
        word.into_iter().for_each(Word::remove);
        result
    }

    /// Why the drain has failed, if it has.
    pub(super) fn why_undrained(&self, result: Result<(), StoreError>) -> Option<String> {
        let error = result.err()?;
        Some(match &self.dump {
            // Often CRIU's end: then its log says why.
            Some(dump) if dump.has_ended(limits::EXIT_PATIENCE) => {
                format!("criu ended while it was needed: {} ({error})", dump.complaint())
            }
            _ => error.to_string(),
        })
    }

    /// Whether the tasks themselves have pages that are nowhere else here.
    pub(super) fn are_needed(&self) -> bool {
        self.pipes.as_ref().is_none_or(|pipes| !pipes.is_drained())
    }

    /// Ends lanes, drain and CRIU, which holds the tasks by ptrace; they stay stopped.
    pub(super) fn end_dump(&mut self, lanes: &Lanes) {
        lanes.stop.store(true, Ordering::Relaxed);
        if let Some(pipes) = &self.pipes {
            pipes.give_up();
        }
        if let Some(drain) = self.drain.take() {
            let _ = drain.join();
        }
        if let Some(mut dump) = self.dump.take() {
            close(&mut dump);
        }
        self.holder.take().into_iter().for_each(Holder::end);
    }
}

/// The memory of every task that has lazy pages.
pub(super) fn memory_of(tree: &ProcessTree, map: &LazyMap) -> Result<Arc<TaskMemory>, String> {
    let hosts = tree.tasks.iter().filter(|task| map.task(task.id).is_some());
    let memory = TaskMemory::open(hosts.map(|task| (task.id, task.pid)))
        .map_err(|error| format!("cannot read the tasks' memory: {error}"))?;
    match map.tasks().iter().find(|task| !memory.has(task.id)) {
        Some(task) => Err(format!("task {} is in the images but not in the tree", task.id)),
        None => Ok(Arc::new(memory)),
    }
}

/// What a successor of this process needs. Without it the move goes on.
fn leave_word(mover: &Mover, tasks: Fenced<'_>, map: &LazyMap, dir: &Path) -> Option<Word> {
    let left = Word::leave(mover.config.state.as_ref()?, mover.kept_session(dir), map, tasks);
    left.map_err(|error| tracing::error!("nobody can take over from this process if it is killed: {error}"))
        .ok()
}

/// Without a drain more memory is needed here, nothing else.
pub(super) fn goes_on_undrained(why: &str) {
    tracing::warn!("{why}: pages stay in the stopped tasks until the destination has them");
}

/// Ends CRIU's page server.
fn close(dump: &mut Dump) {
    if let Err(error) = dump.close(limits::CRIU_CLOSE_TIMEOUT) {
        // Killed: the tasks are behind the fence all the same.
        tracing::debug!("{error}");
    }
}

/// Lets the tasks of a dump that is over run: sockets leave repair mode, the network is unlocked, the fence comes
/// down.
fn let_run(tree: &ProcessTree, network: &mut NetworkLock, fence: Option<Fence>) -> Result<(), String> {
    let mut failed = Vec::new();
    let sockets = network.end_repair(tree);
    let rules = network.unlock();
    if !rules.is_empty() {
        failed.push(format!("rules of criu's network lock are left: {}", rules.join("; ")));
    }
    match fence.map(|fence| fence.lower(tree)) {
        Some(Ok(())) => {}
        Some(Err(error)) => failed.push(format!("{error}: continue it with kill -CONT")),
        // CRIU has let the tasks go by itself; one that was killed may have left some stopped.
        None => resume(tree),
    }
    tracing::info!(sockets, "rolled back: the source runs on");
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}

/// A reason, and what else went wrong on the way back.
pub(super) fn and(reason: String, also: Result<(), String>) -> String {
    match also {
        Ok(()) => reason,
        Err(also) => format!("{reason}; and {also}"),
    }
}

/// Tasks whose CRIU ends before the fence stands have run since it dumped them.
fn still_held(dump: &Dump) -> Result<(), String> {
    if !dump.has_ended(Duration::ZERO) {
        return Ok(());
    }
    Err(format!("criu ended as soon as it had dumped: {}", dump.complaint()))
}

fn not_interrupted(mover: &Mover) -> Result<(), String> {
    if mover.interrupt.is_pending() { Err("interrupted".into()) } else { Ok(()) }
}

/// A process that ended makes a dump fail in many ways; the one reason that helps is that it ended.
fn why_not_frozen(tree: &ProcessTree, error: &DumpError) -> String {
    let root = tree.root();
    // One that is being killed has yet to give its memory back.
    match host::waiting::readable_within(root.handle.as_fd(), limits::EXIT_PATIENCE) {
        Ok(true) => format!("process {} ended before it was frozen", root.pid),
        _ => error.to_string(),
    }
}

/// What is waited for, and what has gone wrong meanwhile.
struct Awaited {
    message: &'static str,
    within: Duration,
    /// How long to wait for the destination's own reason once something has failed.
    patience: Duration,
    failure: Option<String>,
}

impl Awaited {
    const fn new(message: &'static str, within: Duration, patience: Duration) -> Self {
        Self { message, within, patience, failure: None }
    }

    /// Why a message is not good news, if it is none.
    fn not_this(&self, message: Control) -> String {
        match (message, &self.failure) {
            (Control::Abort(reason), _) => reason,
            (Control::Prepared | Control::Running, Some(failure)) => failure.clone(),
            (other, _) => other.out_of_order(self.message).to_string(),
        }
    }

    fn missing(&self) -> String {
        let late = || format!("the destination was not {} within {:?}", self.message, self.within);
        self.failure.clone().unwrap_or_else(late)
    }
}

pub(super) fn lost(error: &ControlError) -> String {
    format!("lost the destination: {error}")
}

/// Whether a control connection that fails is lost, or the destination does not keep to the protocol.
pub(super) const fn error_event(error: &ControlError) -> Event {
    match error {
        ControlError::Closed | ControlError::Io(_) => Event::Lost,
        ControlError::Malformed(_) | ControlError::OutOfOrder { .. } => Event::Broken,
    }
}

/// What came of a commit.
pub(super) enum Answer {
    /// The destination runs; since when, as far as can be told from here.
    Runs(Instant),
    /// The connections are lost, for this reason: it may run.
    Lost(String),
}

/// The destination was told to run.
pub(super) struct Commit {
    pub(super) answer: Answer,
    /// Whether the pages are in the store.
    pub(super) drained: bool,
    /// The threads that serve faults.
    pub(super) fault_lanes: Vec<JoinHandle<()>>,
}

fn clone_stream(stream: &Stream) -> Result<Stream, String> {
    stream.try_clone().map_err(|error| format!("cannot duplicate a socket: {error}"))
}

fn descriptors_for_pipes() -> u64 {
    let limit = host::facts::raise_open_files_limit();
    limit.saturating_sub(limits::SPARE_DESCRIPTORS)
}

/// Continues tasks that a fence may have left stopped.
fn resume(tree: &ProcessTree) {
    for task in tree.tasks.iter().filter(|task| !task.was_stopped) {
        let _ = task.handle.signal(nix::libc::SIGCONT);
    }
}
