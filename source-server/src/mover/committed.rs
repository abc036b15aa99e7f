//! Behind the switchover: the destination runs, the source lets go page by page.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use host::hooks::HookPhase;
use host::progress::mib;
use host::report::Recorder;
use host::waiting;
use protocol::wire::control::{Control, Summary};
use protocol::wire::switchover::source::{Action, Ending, Event, Switchover};

use super::frozen::{Answer, Commit, Frozen, Notice, error_event, lost};
use super::session::{Next, Session};
use super::{MoveError, Mover};
use crate::lanes::{acknowledgements, push};
use crate::limits;

/// A move whose tasks run at the destination, or are about to.
pub(super) struct Committed<'a> {
    frozen: Frozen<'a>,
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
        let Commit { answer, drained, fault_lane } = commit;
        let threads = vec![fault_lane];
        Self {
            frozen,
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

    /// Pushes, waits for every acknowledgement, releases.
    pub(super) fn finish(mut self, mover: &mut Mover) -> Result<(), MoveError> {
        let summary = match self.push(mover) {
            Ok(summary) => summary,
            Err(reason) => {
                return Err(Self::hold(self.frozen, &self.session, &reason));
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
            let others = [self.frozen.notices.as_fd(), mover.interrupt.as_fd()];
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
            let (lanes, total) = (&self.frozen.lanes, self.frozen.map.pages());
            mover.progress.show(|| {
                let missing = lanes.ledger().missing();
                format!("push: {missing} of {total} pages left, {} held", mib(lanes.store.held_bytes()))
            });
        }
    }

    fn take_notices(&mut self, mover: &mut Mover) -> Result<bool, String> {
        let mut released = false;
        for notice in self.frozen.notices.empty() {
            let (event, what) = match notice {
                Notice::Lane(Ok(())) => continue,
                Notice::Drained(Ok(())) if !self.runs => {
                    self.drained = true;
                    continue;
                }
                Notice::Drained(Ok(())) => (Event::Drained, String::new()),
                Notice::AllAcknowledged => (Event::Acknowledged, String::new()),
                Notice::Drained(Err(error)) => (Event::Broken, error.to_string()),
                Notice::Lane(Err(error)) if error.is_link() => (Event::Failing, error.to_string()),
                Notice::Lane(Err(error)) => (Event::Broken, error.to_string()),
            };
            released = self.step(mover, event, &what)?;
        }
        Ok(released)
    }

    /// Does what follows from `event`: whether everything is to be released, or the reason to hold it.
    fn step(&mut self, mover: &mut Mover, event: Event, what: &str) -> Result<bool, String> {
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
            _ => Err(what.to_owned()),
        }
    }

    /// The destination has said that it runs.
    fn begin(&mut self, mover: &mut Mover, at: Instant) -> Result<bool, String> {
        let blackout = at.saturating_duration_since(self.frozen.frozen_at);
        mover.recorder.report().blackout_ms = blackout.as_secs_f64() * 1000.0;
        mover.recorder.phase_at("push", at);
        (self.runs, self.due) = (true, None);
        let released = self.start_push(mover)?;
        // Nothing to drain is drained.
        if self.drained { self.step(mover, Event::Drained, "") } else { Ok(released) }
    }

    fn start_push(&mut self, mover: &mut Mover) -> Result<bool, String> {
        let broken = |error: std::io::Error| format!("cannot duplicate a socket: {error}");
        let (out, back) =
            (self.session.push.try_clone().map_err(broken)?, self.session.push.try_clone().map_err(broken)?);
        let (lanes, post, pace) = (self.frozen.lanes.clone(), self.frozen.post.clone(), mover.config.pace);
        let pushing = std::thread::Builder::new().name("push".into()).spawn(move || {
            post.send(Notice::Lane(push(&lanes, &out, pace)));
        });
        self.threads.push(pushing.map_err(|error| format!("cannot start a thread: {error}"))?);
        let (lanes, post) = (self.frozen.lanes.clone(), self.frozen.post.clone());
        self.threads.push(std::thread::spawn(move || {
            post.send(match acknowledgements(&lanes, &back) {
                Ok(()) => Notice::AllAcknowledged,
                Err(error) => Notice::Lane(Err(error)),
            });
        }));
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
            let error = match self.session.resume(mover, redial.patience(), self.frozen.map.pages()) {
                Ok(settled) => break settled,
                Err(error) => error,
            };
            tracing::debug!("dialled in vain: {}", error.reason());
            let Some(pause) = redial.next(error.answer(), Instant::now()) else {
                let reason = format!("{why}; gave up after {:.0?}: {}", since.elapsed(), error.reason());
                return self.step(mover, Event::Broken, &reason);
            };
            mover.progress.show(|| format!("paused for {:.0?}: {why}; dialling again", since.elapsed()));
            let others = [self.frozen.notices.as_fd(), mover.interrupt.as_fd()];
            waiting::readable(others, Some(Instant::now() + pause)).map_err(|error| error.to_string())?;
        };
        let complete = self.frozen.lanes.ledger().resume(&settled);
        complete.into_iter().for_each(|chunk| self.frozen.lanes.store.free(chunk));
        let missing = self.frozen.lanes.ledger().missing();
        tracing::warn!(missing, "resumed after {:.3?}", since.elapsed());
        self.threads.push(self.frozen.serve_faults(&self.session)?);
        self.due = (!self.runs)
            .then(|| (Instant::now() + limits::RUNNING_TIMEOUT, "the destination does not say that it runs"));
        self.step(mover, Event::Resumed, "")
    }

    /// What happens here while the connections are lost: pages come into the store, the operator wants to stop.
    fn look_after(&mut self, mover: &mut Mover, why: &str) -> Result<bool, String> {
        let mut released = false;
        for notice in self.frozen.notices.empty() {
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
        self.frozen.lanes.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.frozen.lanes.stop.store(false, Ordering::Relaxed);
    }

    /// The pages are in the store: CRIU ends and the tasks are killed, so that their addresses, ports and
    /// pids are free. With the `frozen` store the tasks are the store, and stay until the release.
    fn let_go_of_tasks(&mut self) {
        if let Err(error) = self.frozen.dump.close(limits::CRIU_CLOSE_TIMEOUT) {
            tracing::warn!("{error}; the tasks are stopped all the same");
        }
        if self.frozen.pipes.is_some() {
            kill(&mut self.frozen);
        }
    }

    fn release(self, mover: &mut Mover) -> Result<(), MoveError> {
        let Self { mut frozen, session, threads, .. } = self;
        frozen.lanes.stop.store(true, Ordering::Relaxed);
        if frozen.pipes.is_none() {
            kill(&mut frozen);
        }
        if let Err(error) = session.control.send(&Control::Released) {
            // The destination has every page; it only waits in vain for our farewell.
            tracing::warn!("could not tell the destination that the source has let go: {error}");
        }
        record_bytes(&mut mover.recorder, &frozen);
        // Ends the lanes' threads.
        session.fault.shutdown();
        session.push.shutdown();
        for thread in threads.into_iter().chain(frozen.drain) {
            let _ = thread.join();
        }
        if let Err(error) = mover.hooks.run(HookPhase::Released) {
            tracing::error!("{error}");
        }
        Ok(())
    }

    /// The move broke behind the switchover: nothing is resumed and nothing is freed. The tasks that still
    /// stand here stay stopped; pages that are only in pipes are kept by a holder process.
    pub(super) fn hold(mut frozen: Frozen<'_>, session: &Session, reason: &str) -> MoveError {
        // If it can still be told, it need not wait for new connections.
        let _ = session.control.send(&Control::Abort(reason.to_owned()));
        // The holder inherits the connections: the destination must see them end all the same.
        session.shutdown();
        frozen.end_dump();
        // Whoever continues the tasks finds them as they were; and the holder would inherit the descriptors.
        drop(frozen.copied.take());
        let mut text =
            format!("{reason}\nThe switchover was passed: the process belongs to the destination now.");
        let stopped: Vec<String> = frozen
            .tree
            .tasks
            .iter()
            .filter(|task| !crate::process::has_ended(task.pid))
            .map(|task| task.pid.to_string())
            .collect();
        if !stopped.is_empty() {
            let pids = stopped.join(" ");
            text.push_str(&format!(
                "\nThe tasks here ({pids}) stay stopped with all their memory. Only if the destination surely does \
                 not run them: kill -CONT {pids}"
            ));
        }
        match kernel::holder::fork_holder(c"postcopy-hold") {
            Ok(pid) => text.push_str(&format!(
                "\nPages that have not arrived are kept by process {pid} ({}); kill it to give them up.",
                mib(frozen.lanes.store.held_bytes())
            )),
            Err(error) => text.push_str(&format!("\nThe pages could not be kept: {error}")),
        }
        MoveError::Paused(text)
    }
}

fn kill(frozen: &mut Frozen<'_>) {
    let left = frozen.fence.kill(&frozen.tree, limits::KILL_TIMEOUT);
    if let (Some(copied), true) = (frozen.copied.take(), left.is_empty()) {
        copied.tree_is_gone();
    }
    if !left.is_empty() {
        tracing::error!(?left, "killed tasks are still there");
    }
    // The sockets vanished with the tasks, in repair mode, without a word to their peers; only then may
    // packets pass again.
    let failed = frozen.network.unlock();
    if !failed.is_empty() {
        tracing::error!(?failed, "network rules of criu could not be removed");
    }
}

fn record_bytes(recorder: &mut Recorder, frozen: &Frozen<'_>) {
    let bytes = &mut recorder.report().bytes;
    bytes.fault_lane = frozen.lanes.fault_bytes.load(Ordering::Relaxed);
    bytes.push_lane = frozen.lanes.push_bytes.load(Ordering::Relaxed);
}
