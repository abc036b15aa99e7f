//! Behind the switchover: the destination runs, the source lets go page by page.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use host::hooks::HookPhase;
use host::placement::threads_of;
use host::progress::mib;
use host::report::Recorder;
use host::waiting;
use protocol::wire::control::{Control, Summary};
use protocol::wire::switchover::source::{Action, Ending, Event, Switchover};

use super::frozen::{Answer, Commit, Frozen, Notice, Serving, Tasks, error_event, lost};
use super::session::{Next, Session};
use super::{MoveError, Mover};
use crate::kept::Holder;
use crate::lanes::Aside;
use crate::limits;

/// A move whose tasks run at the destination, or are about to.
pub(super) struct Committed<'a> {
    /// None if another process has killed them.
    tasks: Option<Tasks<'a>>,
    serving: Serving,
    /// Who keeps the pages if this process is killed.
    holder: Option<Holder>,
    session: Session,
    switchover: Switchover,
    /// What came of the commit, until it was looked at.
    answer: Option<Answer>,
    /// Whether the destination has said that it runs.
    runs: bool,
    /// The pages are in the store, but the destination has not said yet that it runs.
    drained: bool,
    /// The threads of the lanes.
    threads: Vec<JoinHandle<()>>,
    complete: Option<Summary>,
    /// By when something must have come, and what it means if it has not.
    due: Option<(Instant, &'static str)>,
}

impl<'a> Committed<'a> {
    pub(super) fn new(frozen: Frozen<'a>, session: Session, commit: Commit, switchover: Switchover) -> Self {
        let Commit { answer, drained, fault_lanes: threads } = commit;
        let Frozen { tasks, serving, .. } = frozen;
        Self {
            tasks: Some(tasks),
            serving,
            holder: None,
            session,
            switchover,
            answer: Some(answer),
            runs: false,
            drained,
            threads,
            complete: None,
            due: None,
        }
    }

    /// A move whose process was killed when its tasks were, or before it had released them.
    pub(super) fn taken_over(serving: Serving, holder: Holder, session: Session) -> Self {
        Self {
            tasks: None,
            serving,
            holder: Some(holder),
            session,
            switchover: Switchover::taken_over(),
            answer: Some(Answer::Lost("its source has ended, this one takes over".into())),
            runs: true,
            drained: false,
            threads: Vec::new(),
            complete: None,
            due: None,
        }
    }

    /// Pushes, waits for every acknowledgement, releases.
    pub(super) fn finish(mut self, mover: &mut Mover) -> Result<(), MoveError> {
        let summary = match self.push(mover) {
            Ok(summary) => summary,
            Err(reason) => {
                return Err(Self::hold(self.tasks, &self.serving, self.holder, &self.session, &reason));
            }
        };
        mover.recorder.phase("release");
        mover.recorder.settle(&summary);
        self.release(mover)
    }

    /// Has pages pushed and acknowledged until everything can be released; an error holds what is left.
    fn push(&mut self, mover: &mut Mover) -> Result<Summary, String> {
        let mut released = match self.answer.take() {
            Some(Answer::Runs(at)) => self.begin(mover, at)?,
            Some(Answer::Lost(why)) => self.resume(mover, &why)?,
            None => false,
        };
        loop {
            if let (Some(summary), true) = (self.complete, released) {
                return Ok(summary);
            }
            if let Some((_, late)) = self.due.filter(|(due, _)| Instant::now() > *due) {
                self.step(mover, Event::Broken, late)?;
            }
            let others = [self.serving.notices.as_fd(), mover.interrupt.as_fd()];
            match self.session.next(others, mover.progress.interval()) {
                Ok(Next::Message(message)) => {
                    let event = Event::from(&message);
                    let what = match message {
                        Control::Complete(summary) => {
                            let late = "the destination says that it is complete but has not acknowledged every page";
                            self.complete = Some(summary);
                            self.due = Some((Instant::now() + limits::LAST_ACK_TIMEOUT, late));
                            String::new()
                        }
                        Control::Abort(reason) => format!("destination: {reason}"),
                        other => other.out_of_order("complete").to_string(),
                    };
                    released = self.step(mover, event, &what)?;
                }
                Ok(Next::Other(0)) => released = self.take_notices(mover)?,
                Ok(Next::Other(_)) => {
                    if mover.interrupt.take() {
                        self.step(mover, Event::Interrupted, "interrupted")?;
                        tracing::warn!(
                            "past the switchover: the process runs at the destination and needs the pages here"
                        );
                    }
                }
                Ok(Next::TimedOut) => {}
                Err(error) => {
                    released = self.step(mover, error_event(&error), &lost(&error))?;
                }
            }
            let (lanes, total) = (&self.serving.lanes, self.serving.map.pages());
            mover.progress.show(|| {
                let missing = lanes.ledger().missing();
                format!("push: {missing} of {total} pages left, {} held", mib(lanes.store.held_bytes()))
            });
        }
    }

    fn take_notices(&mut self, mover: &mut Mover) -> Result<bool, String> {
        let mut released = false;
        // Lanes fail together: who makes them anew for one must not do so again for the others.
        let mut failing = None;
        for notice in self.serving.notices.empty() {
            let (event, what) = match notice {
                Notice::Lane(Ok(())) => continue,
                Notice::Drained(Ok(())) if !self.runs => {
                    self.drained = true;
                    continue;
                }
                Notice::Drained(Ok(())) => (Event::Drained, String::new()),
                Notice::AllAcknowledged => (Event::Acknowledged, String::new()),
                Notice::Drained(Err(error)) => (Event::Broken, error.to_string()),
                Notice::Lane(Err(error)) if error.is_link() => {
                    failing.get_or_insert(error);
                    continue;
                }
                Notice::Lane(Err(error)) => (Event::Broken, error.to_string()),
            };
            released = self.step(mover, event, &what)?;
        }
        match failing {
            Some(error) if !released => self.step(mover, Event::Failing, &error.to_string()),
            _ => Ok(released),
        }
    }

    /// Does what follows from `event`: whether everything is to be released, or the reason to hold it.
    fn step(&mut self, mover: &mut Mover, event: Event, what: &str) -> Result<bool, String> {
        match self.switchover.step(event) {
            Action::LetGo => {
                self.let_go_of_tasks(mover);
                self.step(mover, Event::HasLetGo, what)
            }
            Action::Push if self.runs => self.start_push(mover),
            Action::Push => self.begin(mover, Instant::now()),
            Action::Resume => self.resume(mover, what),
            Action::End(Ending::Release) => Ok(true),
            Action::Wait => Ok(false),
            _ => Err(what.to_owned()),
        }
    }

    /// The destination has said that it runs.
    fn begin(&mut self, mover: &mut Mover, at: Instant) -> Result<bool, String> {
        if let Some(tasks) = &self.tasks {
            let blackout = at.saturating_duration_since(tasks.frozen_at);
            mover.recorder.report().blackout_ms = blackout.as_secs_f64() * 1000.0;
        }
        mover.recorder.phase_at("push", at);
        (self.runs, self.due) = (true, None);
        let released = self.start_push(mover)?;
        // Nothing to drain is drained.
        if self.drained { self.step(mover, Event::Drained, "") } else { Ok(released) }
    }

    fn start_push(&mut self, mover: &mut Mover) -> Result<bool, String> {
        self.threads.extend(self.serving.push(&self.session, mover.config.pace)?);
        Ok(false)
    }

    /// The connections are lost: makes new ones and goes on where the destination is. Present pages work there
    /// meanwhile, faults wait; nothing is freed here.
    fn resume(&mut self, mover: &mut Mover, why: &str) -> Result<bool, String> {
        let since = Instant::now();
        self.session.shutdown();
        self.end_lanes();
        tracing::warn!("paused: {why}; dialling the destination again");
        let mut redial = self.session.redial(mover);
        let settled = loop {
            if self.look_after(mover, why)? {
                return Ok(true);
            }
            let error = match self.session.resume(mover, redial.patience(), self.serving.map.pages()) {
                Ok(settled) => break settled,
                Err(error) => error,
            };
            tracing::debug!("dialled in vain: {}", error.reason());
            let Some(pause) = redial.next(error.answer(), Instant::now()) else {
                let reason = format!("{why}; gave up after {:.0?}: {}", since.elapsed(), error.reason());
                return self.step(mover, Event::Broken, &reason);
            };
            mover.progress.show(|| format!("paused for {:.0?}: {why}; dialling again", since.elapsed()));
            let others = [self.serving.notices.as_fd(), mover.interrupt.as_fd()];
            waiting::readable(others, Some(Instant::now() + pause)).map_err(|error| error.to_string())?;
        };
        let complete = self.serving.lanes.ledger().resume(&settled);
        complete.into_iter().for_each(|chunk| self.serving.lanes.store.free(chunk));
        let missing = self.serving.lanes.ledger().missing();
        tracing::warn!(missing, "resumed after {:.3?}", since.elapsed());
        self.threads.extend(self.serving.serve_faults(&self.session)?);
        self.due = (!self.runs)
            .then(|| (Instant::now() + limits::RUNNING_TIMEOUT, "the destination does not say that it runs"));
        self.step(mover, Event::Resumed, "")
    }

    /// What happens here while the connections are lost: pages come into the store, the operator wants to stop.
    fn look_after(&mut self, mover: &mut Mover, why: &str) -> Result<bool, String> {
        let mut released = false;
        for notice in self.serving.notices.empty() {
            match notice {
                Notice::Drained(Ok(())) if !self.runs => self.drained = true,
                Notice::Drained(Ok(())) => released = self.step(mover, Event::Drained, "")?,
                Notice::Drained(Err(error)) => {
                    released = self.step(mover, Event::Broken, &error.to_string())?
                }
                Notice::AllAcknowledged if self.runs => {
                    released = self.step(mover, Event::Acknowledged, "")?;
                }
                // Of the lanes that were lost.
                Notice::AllAcknowledged | Notice::Lane(_) => {}
            }
        }
        if mover.interrupt.take() {
            return self.step(mover, Event::Interrupted, &format!("{why}; interrupted while paused"));
        }
        Ok(released)
    }

    /// Waits for the threads of lanes whose connections were shut down.
    fn end_lanes(&mut self) {
        self.serving.lanes.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.serving.lanes.stop.store(false, Ordering::Relaxed);
    }

    /// The pages are in the store: CRIU ends and the tasks are killed, so that their addresses, ports and
    /// pids are free. With the `frozen` store the tasks are the store, and stay until the release.
    fn let_go_of_tasks(&mut self, mover: &Mover) {
        let Some(tasks) = &mut self.tasks else { return };
        // Both let go of as much memory as the tasks have.
        let ending = tasks.tree.tasks.iter().map(|task| task.pid).chain([tasks.dump.pid()]);
        Aside::new().follow(&self.serving.lanes, ending.flat_map(threads_of));
        if let Err(error) = tasks.dump.close(limits::CRIU_CLOSE_TIMEOUT) {
            tracing::warn!("{error}; the tasks are stopped all the same");
        }
        let Some(pipes) = &tasks.pipes else { return };
        // From here on the pages are nowhere else: they must not end with this process.
        let kept = Holder::fork(Some(pipes)).and_then(|mut holder| {
            let described = match &mover.config.state {
                Some(dir) => {
                    holder.describe(dir, &mover.kept_session(tasks.dir.path()), &self.serving.map, pipes)
                }
                None => Ok(()),
            };
            tracing::debug!("pages are kept by process {} as well", holder.pid());
            self.holder = Some(holder);
            described
        });
        if let Err(error) = kept {
            tracing::error!("nobody can take over from this process if it is killed: {error}");
        }
        kill(tasks);
    }

    fn release(self, mover: &mut Mover) -> Result<(), MoveError> {
        let Self { mut tasks, serving, holder, session, threads, .. } = self;
        serving.lanes.stop.store(true, Ordering::Relaxed);
        if let Some(tasks) = tasks.as_mut().filter(|tasks| tasks.pipes.is_none()) {
            kill(tasks);
        }
        if let Some(holder) = holder {
            holder.dismiss();
        }
        if let Err(error) = session.control.send(&Control::Released) {
            // The destination has every page; it only waits in vain for our farewell.
            tracing::warn!("could not tell the destination that the source has let go: {error}");
        }
        record_bytes(&mut mover.recorder, &serving);
        // Ends the lanes' threads.
        session.lanes.shutdown();
        for thread in threads.into_iter().chain(tasks.and_then(|tasks| tasks.drain)) {
            let _ = thread.join();
        }
        if let Err(error) = mover.hooks.run(HookPhase::Released) {
            tracing::error!("{error}");
        }
        Ok(())
    }

    /// The move broke behind the switchover: nothing is resumed and nothing is freed. The tasks that still
    /// stand here stay stopped; pages that are only in pipes are kept by a holder process.
    pub(super) fn hold(
        tasks: Option<Tasks<'_>>,
        serving: &Serving,
        holder: Option<Holder>,
        session: &Session,
        reason: &str,
    ) -> MoveError {
        // If it can still be told, it need not wait for new connections.
        let _ = session.control.send(&Control::Abort(reason.to_owned()));
        session.shutdown();
        let mut text =
            format!("{reason}\nThe switchover was passed: the process belongs to the destination now.");
        let mut pipes = None;
        if let Some(mut tasks) = tasks {
            tasks.end_dump(&serving.lanes);
            let there = tasks.tree.tasks.iter().filter(|task| !crate::process::has_ended(task.pid));
            let stopped: Vec<String> = there.map(|task| task.pid.to_string()).collect();
            if !stopped.is_empty() {
                let pids = stopped.join(" ");
                text.push_str(&format!(
                    "\nThe tasks here ({pids}) stay stopped with all their memory. Only if the destination surely does \
                     not run them: kill -CONT {pids}"
                ));
            }
            pipes = tasks.pipes.take();
        }
        let can_go_on = holder.is_some();
        match holder.map_or_else(|| Holder::fork(pipes.as_deref()), Ok) {
            Ok(holder) => text.push_str(&format!(
                "\nPages that have not arrived are kept by process {} ({}); kill it to give them up.",
                holder.pid(),
                mib(serving.lanes.store.held_bytes())
            )),
            Err(error) => text.push_str(&format!("\nThe pages could not be kept: {error}")),
        }
        if can_go_on {
            text.push_str("\n`source-server resume` goes on as long as the destination waits for them.");
        }
        MoveError::Paused(text)
    }
}

fn kill(tasks: &mut Tasks<'_>) {
    let left = tasks.fence.kill(&tasks.tree, limits::KILL_TIMEOUT);
    if let (Some(copied), true) = (tasks.copied.take(), left.is_empty()) {
        copied.tree_is_gone();
    }
    if !left.is_empty() {
        tracing::error!(?left, "killed tasks are still there");
    }
    // The sockets vanished with the tasks, in repair mode, without a word to their peers; only then may
    // packets pass again.
    let failed = tasks.network.unlock();
    if !failed.is_empty() {
        tracing::error!(?failed, "network rules of criu could not be removed");
    }
}

fn record_bytes(recorder: &mut Recorder, serving: &Serving) {
    let bytes = &mut recorder.report().bytes;
    bytes.fault_lane = serving.lanes.fault_bytes.load(Ordering::Relaxed);
    bytes.push_lane = serving.lanes.push_bytes.load(Ordering::Relaxed);
}
