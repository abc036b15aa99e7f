//! A tree that is being restored, and the threads that feed it.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::mailbox::{Mailbox, mailbox};
use host::waiting;
use host::workdir::WorkDir;
use kernel::uffd::{Probe, Uffd};
use protocol::criu::checkpoint::Checkpoint;
use protocol::lazy_map::LazyMap;
use protocol::link::{ControlChannel, ControlError, Stream};
use protocol::units::TaskId;
use protocol::wire::control::Control;
use protocol::wire::switchover::destination::Event;

use super::arrivals::Lanes;
use super::lanes::LaneThreads;
use super::let_go::{finish_word, whether_they_run};
use super::precopy::{Precopied, Prefill};
use super::standby::{Parts, Standby};
use super::{IMAGES, SessionConfig, StateConfig};
use crate::barrier::{self, Report};
use crate::cache::{Installing, Milestone};
use crate::fault::Command;
use crate::handover::ReceiveError;
use crate::journal::Journal;
use crate::keeper::{KeeperHandle, Owner};
use crate::limits;
use crate::push::PushError;
use crate::restore::Restore;
use crate::steering::Steering;
use crate::takeover::{Description, SOCKET, Taken};
use crate::tree::Tree;

/// A failure behind the switchover.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) event: Event,
}

impl Failure {
    pub(super) const fn broken(reason: String) -> Self {
        Self { reason, event: Event::Broken }
    }

    /// A connection that is lost; a source that does not keep to the protocol is not.
    pub(super) fn lost(error: &ControlError) -> Self {
        let event = match error {
            ControlError::Closed | ControlError::Io(_) => Event::Lost,
            ControlError::Malformed(_) | ControlError::OutOfOrder { .. } => Event::Broken,
        };
        Self { reason: format!("lost the source: {error}"), event }
    }

    /// A push lane that has ended, by itself or because of what came over it.
    pub(super) fn push(error: &PushError) -> Self {
        let event = if error.is_link() { Event::Lost } else { Event::Broken };
        Self { reason: error.to_string(), event }
    }

    pub(super) fn io(error: std::io::Error) -> Self {
        Self::broken(error.to_string())
    }
}

/// What a restore begins with.
pub(super) struct Images {
    /// As the source counts them.
    pub(super) lazy_pages: u64,
    pub(super) precopied: Option<Precopied>,
}

/// A tree that is being restored, and the threads that feed it.
pub(super) struct BroughtUp {
    pub(super) tree: Arc<Tree>,
    pub(super) map: LazyMap,
    pub(super) lanes: LaneThreads,
    pub(super) frozen_at: Option<Instant>,
    steering: Option<Steering>,
    /// Installs what pre-copy brought.
    installing: Option<Installing>,
    handed_over: Mailbox<Result<(), ReceiveError>>,
    handover_thread: Option<JoinHandle<()>>,
    cancel_handover: Option<UnixStream>,
    keeper: KeeperHandle,
    restore: Option<Restore>,
    /// Gone with the move; holds images, logs and the barrier's socket.
    dir: WorkDir,
}

impl BroughtUp {
    /// Starts everything that a restore needs, and the restore.
    pub(super) fn start(
        config: &SessionConfig,
        standby: Standby,
        images: Images,
        lanes: Lanes<Stream>,
    ) -> Result<Self, String> {
        let Images { lazy_pages, precopied } = images;
        let failed = |what: &'static str| move |error: std::io::Error| format!("cannot {what}: {error}");
        let checkpoint = Checkpoint::open(&standby.dir().join(IMAGES)).map_err(|error| error.to_string())?;
        let live = checkpoint.tasks.iter().filter(|task| task.alive);
        let map = LazyMap::new(live.map(|task| (task.id, task.lazy_runs())));
        let map = map.map_err(|error| error.to_string())?;
        if map.pages() != lazy_pages {
            let ours = map.pages();
            return Err(format!("the images hold {ours} lazy pages, the source counts {lazy_pages}"));
        }
        let every_task: Vec<TaskId> = checkpoint.tasks.iter().map(|task| task.id).collect();
        // Those of the offer, made before the freeze, lack what was forked until then.
        let threads = checkpoint.tasks.iter().flat_map(|task| task.threads.iter().copied());
        let pids: Vec<u32> = every_task.iter().map(|id| id.0).chain(threads).collect();
        let tree = Tree::new(&map);
        let mut installing = None;
        if let Some(Precopied { cache, clean }) = precopied {
            let (kept, unneeded) = cache.into_clean(&map, &clean).map_err(|error| error.to_string())?;
            tree.keep(kept);
            let start = Installing::start(tree.clone(), unneeded, config.prefill != Prefill::None);
            installing = Some(start.map_err(failed("start a thread"))?);
        }

        let mut threads = LaneThreads::start(tree.clone(), standby.keeper().clone())
            .map_err(failed("start the fault loop"))?;
        threads.attach(lanes).map_err(failed("serve the lanes"))?;
        let (cancel_handover, cancelled) = UnixStream::pair().map_err(failed("make a socket pair"))?;
        let (handed, handed_over) = mailbox().map_err(failed("make a mailbox"))?;
        let Parts { dir, keeper, socket, restore } = standby.take(config, &pids)?;
        let handover_thread = {
            let (tree, first, keeper) = (tree.clone(), threads.first(), keeper.clone());
            std::thread::spawn(move || {
                let result = socket.receive(every_task, cancelled.as_fd(), |task, uffd| {
                    let owner = tree.position(task).map_or(Owner::NOBODY, |family| Owner::new(family, 0));
                    keeper.hold(owner, uffd.as_fd());
                    // A task without lazy pages may still fault on fresh memory.
                    if let (Some(family), Some(first)) = (tree.position(task), &first) {
                        first.send(Command::Serve { family, uffd: Arc::new(Uffd::from(uffd)) });
                    }
                    ControlFlow::Continue(())
                });
                handed.send(result.map(drop));
            })
        };
        let mut this = Self {
            tree,
            map,
            lanes: threads,
            frozen_at: None,
            steering: None,
            installing,
            handed_over,
            handover_thread: Some(handover_thread),
            cancel_handover: Some(cancel_handover),
            keeper,
            restore: Some(restore),
            dir,
        };
        match this.begin_restore().and_then(|()| this.describe(config)) {
            Ok(()) => Ok(this),
            Err(reason) => {
                this.tear_down();
                Err(reason)
            }
        }
    }

    fn begin_restore(&mut self) -> Result<(), String> {
        let images = self.dir.path().join(IMAGES);
        let begun = self.restore.as_mut().map_or(Ok(()), |restore| restore.begin(&images));
        begun.map_err(|error| format!("cannot begin the restore: {error}"))
    }

    /// Tells the keeper what whoever takes over has to know.
    fn describe(&self, config: &SessionConfig) -> Result<(), String> {
        let Some(StateConfig { dir, listen, link, session }) = &config.state else { return Ok(()) };
        let (Some(session), Some(restore)) = (*session, &self.restore) else { return Ok(()) };
        let at = (listen.clone(), link.clone());
        let description =
            Description::new(session, at, (restore.proc_dir(), self.dir.path().to_owned()), &self.map);
        Journal::create(self.map.pages())
            .and_then(|(journal, file)| {
                self.tree.keep_journal(journal);
                self.keeper.describe(
                    &UnixListener::bind(dir.file(session.0, SOCKET))?,
                    &file,
                    &description.write()?,
                )
            })
            .map_err(|error| format!("cannot leave word for a daemon that takes over: {error}"))
    }

    /// A move that another daemon has brought up: its tasks run, and wait for a source.
    pub(super) fn adopt(taken: Taken) -> std::io::Result<Self> {
        let (_, handed_over) = mailbox()?;
        let lanes = LaneThreads::start(taken.tree.clone(), taken.keeper.clone())?;
        lanes.adopt(&taken.served);
        taken.wake_all();
        let proc = &taken.description.proc_dir;
        let processes = taken.map.tasks().iter().map(|task| proc.join(task.id.to_string())).collect();
        Ok(Self {
            steering: Some(Steering::start(taken.tree.clone(), processes)),
            installing: None,
            tree: taken.tree,
            map: taken.map,
            lanes,
            frozen_at: None,
            handed_over,
            handover_thread: None,
            cancel_handover: None,
            keeper: taken.keeper,
            restore: None,
            dir: WorkDir::adopt(taken.description.work_dir),
        })
    }

    /// Where its programs leave what is said of it.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn restore(&mut self) -> Result<&mut Restore, Failure> {
        self.restore.as_mut().ok_or_else(|| Failure::broken("the restore has ended".into()))
    }

    /// Readable when CRIU has ended.
    pub(super) fn restore_ended_fd(&self) -> Option<BorrowedFd<'_>> {
        self.restore.as_ref().map(Restore::ended_fd)
    }

    /// Waits until the tree is restored and held, and checks that its lazy areas are ours to fill.
    pub(super) fn wait_held(
        &mut self,
        control: &ControlChannel,
        interrupt: &UnixStream,
    ) -> Result<(), String> {
        let deadline = Instant::now() + limits::RESTORE_TIMEOUT;
        loop {
            let restore = self.restore.as_mut().ok_or("the restore has ended")?;
            let fds = [restore.reports_fd(), restore.ended_fd(), interrupt.as_fd()];
            let ready = waiting::link_or(control, fds, Some(deadline));
            match ready.map_err(|error| error.to_string())? {
                (_, [_, _, true]) => return Err("interrupted at the destination".into()),
                (true, _) => {
                    return Err(match control.receive() {
                        Ok(Control::Abort(reason)) => format!("the source called it off: {reason}"),
                        Ok(other) => other.out_of_order("nothing").to_string(),
                        Err(error) => format!("lost the source: {error}"),
                    });
                }
                (_, [true, ..]) => {
                    if restore.report().map_err(|error| error.to_string())? == Some(Report::Held) {
                        return self.check_registered();
                    }
                }
                (_, [_, true, _]) => {
                    restore.end();
                    let mut reason = format!("criu restore failed: {}", restore.complaint());
                    for error in self.handed_over.empty().into_iter().filter_map(Result::err) {
                        reason.push_str(&format!(" ({error})"));
                    }
                    return Err(reason);
                }
                _ => return Err(format!("criu restore took longer than {:?}", limits::RESTORE_TIMEOUT)),
            }
        }
    }

    /// CRIU leaves an area unregistered when it happens to be mapped where it belongs at once; its missing
    /// pages would read as zero. Refused while it can still be undone.
    fn check_registered(&self) -> Result<(), String> {
        for position in 0..self.tree.len() {
            let family = self.tree.lock(position);
            if family.map().pages == 0 {
                continue;
            }
            let Some(unregistered) = family.first_unregistered(|uffd: &Arc<Uffd>, at| {
                matches!(uffd.probe(at.get()), Ok(Probe::Unregistered))
            }) else {
                continue;
            };
            let task = family.task();
            return Err(format!(
                "criu restore left lazy memory of task {task} at {unregistered} unregistered; try again"
            ));
        }
        Ok(())
    }

    /// Lets the tasks run; returns when they did.
    pub(super) fn run(&mut self) -> Result<Instant, Failure> {
        // Lifted by a daemon that is killed right behind this, the barrier fails, or the tasks run.
        if let Some(journal) = self.tree.journal() {
            journal.set_running();
        }
        self.restore()?.run().map_err(Failure::io)?;
        let mut deadline = Instant::now() + limits::RESTORE_TIMEOUT;
        let mut resumed = None;
        // Before the finish word of the hand-over no task is let go.
        let (mut finished, mut ended_early) = (false, false);
        loop {
            let restore =
                self.restore.as_mut().ok_or_else(|| Failure::broken("the restore has ended".into()))?;
            let fds = [restore.reports_fd(), restore.ended_fd(), self.handed_over.as_fd()];
            let ready = waiting::readable(fds, Some(deadline)).map_err(Failure::io)?;
            match ready {
                [true, ..] => match restore.report().map_err(Failure::io)? {
                    Some(Report::Resumed) => resumed = resumed.or(Some(Instant::now())),
                    Some(Report::Held) | None => {}
                },
                [_, true, _] => {
                    let status = restore.end();
                    if status != 0 && resumed.is_none() {
                        if !finished && !ended_early {
                            (finished, ended_early) = finish_word(&self.handed_over);
                        }
                        let word = barrier::word(self.dir.path());
                        let runs =
                            whether_they_run(word, finished, ended_early, &restore.proc_dir(), &self.map);
                        if runs != Some(true) {
                            let complaint = restore.complaint();
                            let reason =
                                format!("criu restore failed behind the switchover ({status}): {complaint}");
                            let event = if runs.is_some() { Event::NeverRan } else { Event::RestoreFailed };
                            return Err(Failure { reason, event });
                        }
                    }
                    if status != 0 {
                        tracing::warn!("criu restore ended with {status}; the tasks run");
                    }
                    resumed = resumed.or(Some(Instant::now()));
                }
                [_, _, true] => {
                    for result in self.handed_over.empty() {
                        match result {
                            Ok(()) => finished = true,
                            Err(error) if error.is_early_end() => {
                                ended_early = true;
                                deadline = deadline.min(Instant::now() + limits::RESUME_PATIENCE);
                            }
                            Err(error) => return Err(Failure::broken(error.to_string())),
                        }
                    }
                }
                _ => return Err(Failure::broken("criu restore did not let the tasks run".into())),
            }
            if let (Some(at), true) = (resumed, finished) {
                if let Some(journal) = self.tree.journal() {
                    journal.set_run();
                }
                let proc = restore.proc_dir();
                let processes = self.map.tasks().iter().map(|task| proc.join(task.id.to_string())).collect();
                self.steering = Some(Steering::start(self.tree.clone(), processes));
                self.lanes.set_running();
                return Ok(at);
            }
        }
    }

    /// Begins to install what pre-copy brought, if there was any.
    pub(super) fn begin_installing(&self) -> Option<&Installing> {
        self.installing.as_ref().inspect(|installing| installing.begin())
    }

    /// Says whether installing what pre-copy brought has failed.
    pub(super) fn check_installing(&self) -> Result<(), Failure> {
        let milestones = self.installing.iter().flat_map(|installing| installing.milestones.empty());
        for milestone in milestones {
            if let Milestone::Broken(error) = milestone {
                return Err(Failure::broken(format!("cannot install: {error}")));
            }
        }
        Ok(())
    }

    /// What pre-copy brought needs no source: before a pause it is installed, as nobody is left to do it later.
    pub(super) fn finish_installing(&self) {
        let Some(installing) = self.begin_installing() else { return };
        let deadline = Instant::now() + limits::INSTALLING_PATIENCE;
        while !installing.has_ended() {
            // Each milestone rings, and the last one behind the end.
            let ready = waiting::readable([installing.milestones.as_fd()], Some(deadline));
            drop(installing.milestones.empty());
            if !matches!(ready, Ok([true])) {
                return;
            }
        }
    }

    fn stop_threads(&mut self) {
        self.steering = None;
        self.cancel_handover = None;
        let Self { lanes, installing, .. } = self;
        lanes.stop(|| *installing = None);
        if let Some(thread) = self.handover_thread.take() {
            let _ = thread.join();
        }
    }

    /// Before the switchover: nothing of the tree is left.
    pub(super) fn tear_down(&mut self) {
        if let Some(mut restore) = self.restore.take() {
            restore.abort();
        }
        self.stop_threads();
        self.keeper.dismiss();
    }

    /// Every page has arrived: the userfaultfds are closed, the tree is left to itself.
    pub(super) fn finish(mut self) {
        self.stop_threads();
        self.keeper.dismiss();
        if let Some(mut restore) = self.restore.take() {
            // With --restore-detached CRIU ends by itself right behind the resume.
            let ends = || waiting::readable_within(restore.ended_fd(), Duration::from_secs(10));
            if !restore.has_ended() && ends().unwrap_or(false) {
                restore.end();
            }
            restore.leave();
        }
    }

    /// Behind the switchover, without the source: the keeper goes on holding the userfaultfds, so tasks that
    /// touch a missing page wait. Returns what to tell the operator.
    pub(super) fn pause(mut self, reason: &str) -> String {
        self.stop_threads();
        if let Some(restore) = self.restore.take() {
            restore.leave();
        }
        let missing = self.tree.remote_pages();
        let keeper = self.keeper.pid();
        format!(
            "{reason}\nThe switchover was passed: the process belongs here, and {missing} of its {} pages have not \
             arrived. Its threads wait where they touch one; process {keeper} keeps them from reading zeros. \
             Killing the tasks ends it. `uffd-daemon takeover` goes on as long as the source has its pages; \
             `uffd-daemon abandon` gives the missing ones up: who touches one gets SIGBUS.",
            self.tree.pages()
        )
    }
}

impl Drop for BroughtUp {
    /// Whichever way a move ends, also by a panic, no thread goes on without it.
    fn drop(&mut self) {
        self.stop_threads();
    }
}
