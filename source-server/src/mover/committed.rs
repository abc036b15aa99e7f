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
use protocol::wire::hello::SessionId;
use protocol::wire::switchover::source::{Action, Ending, Event, Switchover};

use super::frozen::{
    Answer, Commit, Frozen, Notice, Serving, Tasks, Why, and, error_event, goes_on_undrained, lost,
};
use super::redial::Failure;
use super::session::{Next, Session};
use super::{MoveError, Mover};
use crate::dump::Dump;
use crate::kept::{Holder, Word};
use crate::lanes::Aside;
use crate::limits;
use crate::store::StoreError;

/// A move whose tasks run at the destination, or are about to.
pub(super) struct Committed {
    /// None if another process has killed them.
    tasks: Option<Tasks>,
    serving: Serving,
    /// Who keeps the pages in pipes if this process is killed.
    holder: Option<Holder>,
    /// What a successor of this process finds.
    word: Option<Word>,
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

impl Committed {
    pub(super) fn new(frozen: Frozen, session: Session, commit: Commit, switchover: Switchover) -> Self {
        let Commit { answer, drained, fault_lanes: threads } = commit;
        let Frozen { tasks, serving, word, .. } = frozen;
        Self {
            tasks: Some(tasks),
            serving,
            holder: None,
            word,
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

    /// A move whose process was killed. Where its tasks have the pages, what the destination does is heard from it; where a
    /// holder has them it runs.
    pub(super) fn taken_over(
        serving: Serving,
        (tasks, holder): (Option<Tasks>, Option<Holder>),
        word: Word,
        session: Session,
    ) -> Self {
        let drained = tasks.is_some();
        Self {
            switchover: if drained { Switchover::promised() } else { Switchover::taken_over() },
            tasks,
            serving,
            holder,
            word: Some(word),
            session,
            answer: Some(Answer::Lost("its source has ended, this one takes over".into())),
            runs: !drained,
            drained,
            threads: Vec::new(),
            complete: None,
            due: None,
        }
    }

    /// Pushes, waits for every acknowledgement, releases.
    pub(super) fn finish(mut self, mover: &mut Mover) -> Result<(), MoveError> {
        let summary = match self.push(mover) {
            Ok(summary) => summary,
            Err(why) => return Err(self.end(mover, why)),
        };
        mover.recorder.phase("release");
        mover.recorder.settle(&summary);
        self.release(mover)
    }

    /// Has pages pushed and acknowledged until everything can be released; an error holds what is left.
    fn push(&mut self, mover: &mut Mover) -> Result<Summary, Why> {
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

    fn take_notices(&mut self, mover: &mut Mover) -> Result<bool, Why> {
        let mut released = false;
        // Lanes fail together: who makes them anew for one must not do so again for the others.
        let mut failing = None;
        for notice in self.serving.notices.empty() {
            let (event, what) = match notice {
                Notice::Lane(Ok(())) => continue,
                Notice::Drained(result) => match self.drain_is_over(result) {
                    None => continue,
                    Some(event) => (event, String::new()),
                },
                Notice::AllAcknowledged => (Event::Acknowledged, String::new()),
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

    /// What follows from it: nothing before the destination runs.
    fn drain_is_over(&mut self, result: Result<(), StoreError>) -> Option<Event> {
        self.drained = true;
        let why = self.tasks.as_ref().and_then(|tasks| tasks.why_undrained(result));
        let event = match why {
            None => Event::Drained,
            Some(why) => {
                goes_on_undrained(&why);
                Event::Undrained
            }
        };
        self.runs.then_some(event)
    }

    /// Does what follows from `event`: whether everything is to be released, or the reason to hold it.
    fn step(&mut self, mover: &mut Mover, event: Event, what: &str) -> Result<bool, Why> {
        match self.switchover.step(event) {
            Action::LetGo => {
                self.let_go_of_tasks();
                self.step(mover, Event::HasLetGo, what)
            }
            Action::Push if self.runs => self.start_push(mover),
            Action::Push => self.begin(mover, Instant::now()),
            Action::Resume => self.resume(mover, what),
            Action::End(Ending::Release) => Ok(true),
            Action::Wait => Ok(false),
            then => Err(Why { reason: what.to_owned(), then }),
        }
    }

    /// The destination has said that it runs.
    fn begin(&mut self, mover: &mut Mover, at: Instant) -> Result<bool, Why> {
        if let Some(frozen_at) = self.tasks.as_ref().and_then(|tasks| tasks.frozen_at) {
            let blackout = at.saturating_duration_since(frozen_at);
            mover.recorder.report().blackout_ms = blackout.as_secs_f64() * 1000.0;
        }
        mover.recorder.phase_at("push", at);
        (self.runs, self.due) = (true, None);
        let released = self.start_push(mover)?;
        // Nothing to drain is drained.
        if self.drained { self.step(mover, Event::Drained, "") } else { Ok(released) }
    }

    fn start_push(&mut self, mover: &mut Mover) -> Result<bool, Why> {
        self.threads.extend(self.serving.push(&self.session, mover.config.pace)?);
        Ok(false)
    }

    /// The connections are lost: makes new ones and goes on where the destination is. Present pages work there
    /// meanwhile, faults wait; nothing is freed here.
    fn resume(&mut self, mover: &mut Mover, why: &str) -> Result<bool, Why> {
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
            if error.answer() == Failure::RolledBack {
                return self.step(mover, Event::RolledBack, &format!("{why}; {}", error.reason()));
            }
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
    fn look_after(&mut self, mover: &mut Mover, why: &str) -> Result<bool, Why> {
        let mut released = false;
        for notice in self.serving.notices.empty() {
            match notice {
                Notice::Drained(result) => {
                    if let Some(event) = self.drain_is_over(result) {
                        released = self.step(mover, event, "")?;
                    }
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
    /// pids are free. As long as any page is in them alone, as all are with the `frozen` store, they stay until the release.
    fn let_go_of_tasks(&mut self) {
        let Some(tasks) = &mut self.tasks else { return };
        // Both let go of as much memory as the tasks have.
        let pids = tasks.tree.tasks.iter().map(|task| task.pid).chain(tasks.dump.as_ref().map(Dump::pid));
        Aside::new().follow(&self.serving.lanes, pids.flat_map(threads_of));
        if let Some(Err(error)) = tasks.dump.take().map(|mut dump| dump.close(limits::CRIU_CLOSE_TIMEOUT)) {
            tracing::warn!("{error}; the tasks are stopped all the same");
        }
        tasks.holder.take().into_iter().for_each(Holder::end);
        let Some(pipes) = tasks.pipes.as_ref().filter(|pipes| pipes.is_drained()) else { return };
        // From here on the pages are nowhere else: they must not end with this process.
        let kept = Holder::of_pipes(pipes).and_then(|holder| {
            let told = self.word.as_mut().map_or(Ok(()), |word| word.pages_are_in(pipes, &holder));
            tracing::debug!("pages are kept by process {} as well", holder.pid());
            self.holder = Some(holder);
            told
        });
        if let Err(error) = kept {
            tracing::error!("nobody can take over from this process if it is killed: {error}");
        }
        kill(tasks);
    }

    fn release(self, mover: &mut Mover) -> Result<(), MoveError> {
        let Self { mut tasks, serving, holder, word, session, threads, .. } = self;
        serving.lanes.stop.store(true, Ordering::Relaxed);
        if let Some(tasks) = tasks.as_mut().filter(|tasks| tasks.are_needed()) {
            kill(tasks);
        }
        holder.into_iter().for_each(Holder::end);
        word.into_iter().for_each(Word::remove);
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

    /// The destination does not run and never will, or nobody knows.
    fn end(mut self, mover: &mut Mover, why: Why) -> MoveError {
        let Why { mut reason, then } = why;
        match self.tasks.take() {
            Some(tasks) if then == Action::End(Ending::LetRun) => {
                self.session.shutdown();
                self.end_lanes();
                mover.rolled_back_hook();
                reason = and(reason, tasks.roll_back(&self.serving.lanes, self.word));
                MoveError::RolledBack(reason)
            }
            tasks => {
                let kept = (self.holder, self.word);
                Self::hold(mover.id, tasks, &self.serving, kept, &self.session, &reason)
            }
        }
    }

    /// The move broke behind the switchover: nothing is resumed and nothing is freed. The tasks that still
    /// stand here stay stopped; pages that are only in pipes are kept by a holder process.
    pub(super) fn hold(
        id: SessionId,
        tasks: Option<Tasks>,
        serving: &Serving,
        (holder, word): (Option<Holder>, Option<Word>),
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
            if stopped.is_empty() {
                pipes = tasks.pipes.take();
            } else {
                let pids = stopped.join(" ");
                text.push_str(&format!(
                    "\nThe tasks here ({pids}) stay stopped with all their memory. Only if the destination surely does not \
                     run them: source-server resume --session {id} --destination-is-clean; or kill -CONT {pids}"
                ));
            }
        }
        let keeper = holder.map_or_else(
            || pipes.map(|pipes| Holder::of_pipes(&pipes)).transpose(),
            |holder| Ok(Some(holder)),
        );
        match keeper {
            Ok(Some(holder)) => text.push_str(&format!(
                "\nPages that have not arrived are kept by process {} ({}); kill it to give them up.",
                holder.pid(),
                mib(serving.lanes.store.held_bytes())
            )),
            Ok(None) => {}
            Err(error) => text.push_str(&format!("\nThe pages could not be kept: {error}")),
        }
        if word.is_some() {
            text.push_str("\n`source-server resume` goes on as long as the destination waits for the pages.");
        }
        MoveError::Paused(text)
    }
}

pub(super) fn kill(tasks: &mut Tasks) {
    tasks.network.note_connections(&tasks.tree);
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
