//! Behind the switchover: the destination runs, the source lets go page by page.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use host::hooks::HookPhase;
use host::progress::mib;
use host::report::Recorder;
use protocol::wire::control::{Control, Summary};
use protocol::wire::switchover::source::{Action, Ending, Event, Switchover};

use super::frozen::{Frozen, Notice, Running};
use super::session::{Next, Session};
use super::{MoveError, Mover};
use crate::lanes::{acknowledgements, push};
use crate::limits;

/// A move whose tasks run at the destination.
pub(super) struct Committed<'a> {
    frozen: Frozen<'a>,
    session: Session,
    running: Running,
    switchover: Switchover,
    threads: Vec<JoinHandle<()>>,
}

impl<'a> Committed<'a> {
    pub(super) fn new(
        frozen: Frozen<'a>,
        session: Session,
        running: Running,
        switchover: Switchover,
    ) -> Self {
        Self { frozen, session, running, switchover, threads: Vec::new() }
    }

    /// Pushes, waits for every acknowledgement, releases.
    pub(super) fn finish(mut self, mover: &mut Mover) -> Result<(), MoveError> {
        let blackout = self.running.at.saturating_duration_since(self.frozen.frozen_at);
        mover.recorder.report().blackout_ms = blackout.as_secs_f64() * 1000.0;
        mover.recorder.phase_at("push", self.running.at);
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
        self.start_push(mover)?;
        let mut complete = None;
        let mut last_ack_due = None;
        let mut released = false;
        if self.running.drained {
            released = self.step(Event::Drained, "")?;
        }
        if self.frozen.map.pages() == 0 {
            released = self.step(Event::Acknowledged, "")?;
        }
        loop {
            if let (Some(summary), true) = (complete, released) {
                return Ok(summary);
            }
            if last_ack_due.is_some_and(|due: Instant| Instant::now() > due) {
                let late = "the destination says that it is complete but has not acknowledged every page";
                self.step(Event::Broken, late)?;
            }
            let others = [self.frozen.notices.as_fd(), mover.interrupt.as_fd()];
            match self.session.next(others, mover.progress.interval()) {
                Ok(Next::Message(message)) => {
                    let event = Event::from(&message);
                    let what = match message {
                        Control::Complete(summary) => {
                            complete = Some(summary);
                            last_ack_due = Some(Instant::now() + limits::LAST_ACK_TIMEOUT);
                            "the destination says twice that it is complete".into()
                        }
                        Control::Abort(reason) => format!("destination: {reason}"),
                        other => other.out_of_order("complete").to_string(),
                    };
                    released = self.step(event, &what)?;
                }
                Ok(Next::Other(0)) => released = self.take_notices()?,
                Ok(Next::Other(_)) => {
                    if mover.interrupt.take() {
                        self.step(Event::Interrupted, "interrupted")?;
                        tracing::warn!(
                            "past the switchover: the process runs at the destination and needs the pages here"
                        );
                    }
                }
                Ok(Next::TimedOut) => {}
                Err(error) => {
                    self.step(Event::Broken, &format!("lost the destination: {error}"))?;
                }
            }
            let (lanes, total) = (&self.frozen.lanes, self.frozen.map.pages());
            mover.progress.show(|| {
                let missing = lanes.ledger().missing();
                format!("push: {missing} of {total} pages left, {} held", mib(lanes.store.held_bytes()))
            });
        }
    }

    fn take_notices(&mut self) -> Result<bool, String> {
        let mut released = false;
        for notice in self.frozen.notices.empty() {
            let (event, what) = match notice {
                Notice::Lane(Ok(())) => continue,
                Notice::Drained(Ok(())) => (Event::Drained, String::new()),
                Notice::AllAcknowledged => (Event::Acknowledged, String::new()),
                Notice::Drained(Err(error)) => (Event::Broken, error.to_string()),
                Notice::Lane(Err(error)) => (Event::Failing, error.to_string()),
            };
            released = self.step(event, &what)?;
        }
        Ok(released)
    }

    /// Does what follows from `event`: whether everything is to be released, or the reason to hold it.
    fn step(&mut self, event: Event, what: &str) -> Result<bool, String> {
        match self.switchover.step(event) {
            Action::LetGo => {
                self.let_go_of_tasks();
                self.step(Event::HasLetGo, what)
            }
            Action::End(Ending::Release) => Ok(true),
            Action::Wait => Ok(false),
            _ => Err(what.to_owned()),
        }
    }

    fn start_push(&mut self, mover: &Mover) -> Result<(), String> {
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
        Ok(())
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
        let Self { mut frozen, session, running, threads, .. } = self;
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
        for thread in threads.into_iter().chain([running.fault_lane]).chain(frozen.drain) {
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
        // The holder inherits the connections: the destination must see them end all the same.
        session.control.shutdown();
        session.fault.shutdown();
        session.push.shutdown();
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
