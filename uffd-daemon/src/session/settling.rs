//! Behind the switchover: the tasks run, every page is fetched, the source lets go.
//!
//! ```text
//!   run ─▶ Running ─▶ fetch ─▶ Complete ─▶ Released
//!             ▲         │          │
//!             │         ▼          ▼       a connection is lost
//!             └────── paused: present pages work, faults wait, events are read
//! ```

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use host::hooks::HookPhase;
use host::report::TaskReport;
use host::waiting;
use protocol::link::{ControlChannel, ControlError, Stream};
use protocol::wire::control::{Control, Summary};
use protocol::wire::settled_map;
use protocol::wire::switchover::destination::{Action, Ending, Event, Switchover};

use super::arrivals::Gathered;
use super::brought_up::{BroughtUp, Failure};
use super::{LANE_PATIENCE, Session, SessionError, StateConfig};
use crate::fault::Notice;
use crate::takeover::Taken;
use crate::{latency, limits, tombstone};

/// How a pause ends well.
enum Resumed {
    /// The source has made new connections.
    Attached,
    /// It has not, but every page is here.
    Whole,
}

impl Session {
    /// Runs the tasks and has every page fetched and released.
    pub(super) fn settle(
        &mut self,
        mut brought_up: BroughtUp,
        mut switchover: Switchover,
    ) -> Result<(), SessionError> {
        let running = self.run_tasks(&mut brought_up, &mut switchover);
        let ended = running.and_then(|(at, told)| self.follow(&mut brought_up, &mut switchover, at, told));
        self.conclude(brought_up, switchover, ended)
    }

    /// Goes on with tasks that run and whose daemon has ended: the source makes new connections.
    pub(super) fn take_over(&mut self, taken: Taken) -> Result<(), SessionError> {
        let tasks = taken.map.tasks().iter();
        self.recorder.report().tasks =
            tasks.map(|task| TaskReport { pid: task.id.0, lazy_pages: task.pages }).collect();
        let adopted = BroughtUp::adopt(taken);
        let mut brought_up =
            adopted.map_err(|error| SessionError::Paused(format!("cannot go on: {error}")))?;
        let mut switchover = Switchover::taken_over();
        let lost = Failure { reason: "its daemon has ended, this one takes over".into(), event: Event::Lost };
        let ended = self.follow(&mut brought_up, &mut switchover, Instant::now(), Err(lost));
        self.conclude(brought_up, switchover, ended)
    }

    fn conclude(
        &mut self,
        mut brought_up: BroughtUp,
        mut switchover: Switchover,
        ended: Result<(), Failure>,
    ) -> Result<(), SessionError> {
        let Err(Failure { reason, event }) = ended else {
            if let Err(error) = self.config.hooks.run(HookPhase::Released) {
                tracing::error!("{error}");
            }
            brought_up.finish();
            return Ok(());
        };
        match switchover.step(event) {
            Action::End(Ending::TearDown) => {
                brought_up.tear_down();
                // The source may ask the next daemon, which finds no CRIU to have the last word.
                if let Some(Err(error)) = self.config.state.as_ref().map(tombstone::leave) {
                    tracing::error!("cannot leave word that the tasks have not run: {error}");
                }
                return Err(self.rolled_back(reason));
            }
            // The source must know, although it will not resume.
            Action::End(Ending::TellAndPause) => drop(self.control.send(&Control::Abort(reason.clone()))),
            _ => {}
        }
        self.control.shutdown();
        brought_up.finish_installing();
        self.recorder.settle(&self.summary(&brought_up, Instant::now()));
        Err(SessionError::Paused(brought_up.pause(&reason)))
    }

    /// Lets the tasks run and says so: since when they do, and whether it could be said.
    #[allow(clippy::type_complexity)]
    fn run_tasks(
        &mut self,
        brought_up: &mut BroughtUp,
        switchover: &mut Switchover,
    ) -> Result<(Instant, Result<(), Failure>), Failure> {
        if let Some(state) = &self.config.state {
            tombstone::lift(state, brought_up.dir()).map_err(|error| {
                let reason = format!("cannot take back that the tasks have not run: {error}");
                Failure { reason, event: Event::NeverRan }
            })?;
        }
        let running_at = brought_up.run();
        if let (Ok(_), Some(StateConfig { dir, session: Some((session, _)), .. })) =
            (&running_at, &self.config.state)
        {
            // CRIU has left word that contradicts it.
            if let Err(error) = tombstone::take_back(dir, *session) {
                tracing::debug!("cannot remove the word that the tasks have not run: {error}");
            }
        }
        let running_at = running_at?;
        if let Some(frozen_at) = brought_up.frozen_at {
            let blackout = running_at.saturating_duration_since(frozen_at);
            self.recorder.report().blackout_ms = blackout.as_secs_f64() * 1000.0;
        }
        self.recorder.phase_at("push", running_at);
        let told = match switchover.step(Event::Resumed) {
            Action::SendRunning => self.send(&Control::Running),
            _ => Ok(()),
        };
        brought_up.lanes.start_push().map_err(Failure::io)?;
        Ok((running_at, told))
    }

    /// Waits until every page is here and the source has heard so, over as many connections as it takes; an error
    /// pauses for good.
    fn follow(
        &mut self,
        brought_up: &mut BroughtUp,
        switchover: &mut Switchover,
        running_at: Instant,
        mut result: Result<(), Failure>,
    ) -> Result<(), Failure> {
        loop {
            result = result.and_then(|()| self.fetch(brought_up, switchover, running_at));
            let Err(failure) = result else { return Ok(()) };
            if switchover.step(failure.event) != Action::AwaitResume {
                return Err(failure);
            }
            if let Resumed::Whole = self.await_resume(brought_up, switchover, &failure.reason)? {
                return Ok(());
            }
            result = self.resume(brought_up);
        }
    }

    fn send(&self, message: &Control) -> Result<(), Failure> {
        self.control.send(message).map(drop).map_err(|error| Failure::lost(&error))
    }

    /// Waits until every page is here, tells the source, and waits for its farewell.
    fn fetch(
        &mut self,
        brought_up: &BroughtUp,
        switchover: &mut Switchover,
        running_at: Instant,
    ) -> Result<(), Failure> {
        self.wait_settled(brought_up)?;
        let resolved_here = brought_up.tree.local_faults.load(Ordering::Relaxed);
        tracing::info!(resolved_here, "every page is here");
        self.recorder.phase("release");
        let summary = self.summary(brought_up, running_at);
        self.recorder.settle(&summary);
        if switchover.step(Event::Settled) == Action::SendComplete {
            self.send(&Control::Complete(summary))?;
        }
        switchover.step(Event::CompleteSent);
        let (event, warning) = self.farewell()?;
        if let Some(warning) = warning {
            tracing::warn!("no farewell from the source: {warning}");
        }
        match switchover.step(event) {
            Action::End(Ending::Release) => Ok(()),
            _ => Err(Failure::broken("no farewell from the source".into())),
        }
    }

    /// The source's answer to `Complete`. An interrupt changes nothing any more.
    fn farewell(&mut self) -> Result<(Event, Option<ControlError>), Failure> {
        let deadline = Some(Instant::now() + LANE_PATIENCE);
        loop {
            let ready = waiting::link_or(&self.control, [self.arrivals.as_fd()], deadline);
            let (said, [arrived]) = ready.map_err(Failure::io)?;
            if said {
                return match self.control.receive() {
                    Ok(Control::Released) => Ok((Event::Released, None)),
                    Ok(other) => Ok((Event::from(&other), Some(other.out_of_order("released")))),
                    Err(error) => Err(Failure::lost(&error)),
                };
            }
            if !arrived {
                return Ok((Event::Broken, Some(std::io::Error::from(std::io::ErrorKind::TimedOut).into())));
            }
            self.look_at_arrivals()?;
        }
    }

    /// New connections before the loss of the old ones was noticed are as good as that.
    fn look_at_arrivals(&mut self) -> Result<(), Failure> {
        self.gathered = self.arrivals.take().or(self.gathered.take());
        match self.gathered {
            Some(_) => {
                Err(Failure { reason: "the source has made new connections".into(), event: Event::Lost })
            }
            None => Ok(()),
        }
    }

    /// Waits until every page is settled and acknowledged, when the push lane's thread ends well, and until no
    /// answer is on its way that the source has counted.
    fn wait_settled(&mut self, brought_up: &BroughtUp) -> Result<(), Failure> {
        let lanes = &brought_up.lanes;
        // Each loop says so once.
        let mut unsettled = if brought_up.tree.settled_at().is_some() { 0 } else { lanes.loops() };
        let mut pushing = lanes.pushes();
        while unsettled > 0 || pushing > 0 {
            let fds = [lanes.notices.as_fd(), lanes.pushed.as_fd(), self.arrivals.as_fd()];
            let deadline = Some(Instant::now() + self.progress.interval());
            let ready = waiting::link_or(&self.control, fds, deadline);
            let (control, [notice, pushed, arrived]) = ready.map_err(Failure::io)?;
            brought_up.check_installing()?;
            if arrived {
                self.look_at_arrivals()?;
            }
            if pushed {
                for result in lanes.pushed.empty() {
                    result.map_err(|error| Failure::push(&error))?;
                    pushing = pushing.saturating_sub(1);
                    lanes.set_running();
                }
            }
            if notice {
                for notice in lanes.notices.empty() {
                    match notice {
                        Notice::Settled => unsettled = unsettled.saturating_sub(1),
                        Notice::UpstreamLost(_) if brought_up.tree.check_settled() => unsettled = 0,
                        Notice::UpstreamLost(reason) => {
                            return Err(Failure { reason, event: Event::Lost });
                        }
                        Notice::Broken(reason) => return Err(Failure::broken(reason)),
                        Notice::Detached => {}
                    }
                }
            }
            if control {
                return Err(match self.control.receive() {
                    Ok(Control::Abort(reason)) => Failure::broken(format!("the source failed: {reason}")),
                    Ok(other) => Failure::broken(other.out_of_order("nothing").to_string()),
                    Err(error) => Failure::lost(&error),
                });
            }
            let (tree, latency) = (&brought_up.tree, &lanes.latency);
            self.progress.show(|| {
                let faults = latency::summary(latency);
                let local = tree.local_faults.load(Ordering::Relaxed);
                let local = if local > 0 { format!(" ({local} more resolved here)") } else { String::new() };
                format!(
                    "push: {} of {} pages left, {} faults{local}, p50 {} us, p99 {} us",
                    tree.remote_pages(),
                    tree.pages(),
                    faults.count,
                    faults.p50_ns / 1000,
                    faults.p99_ns / 1000
                )
            });
        }
        Ok(())
    }

    /// The connections are lost: waits for new ones, until the operator or the time limit ends it.
    fn await_resume(
        &mut self,
        brought_up: &mut BroughtUp,
        switchover: &mut Switchover,
        why: &str,
    ) -> Result<Resumed, Failure> {
        let since = Instant::now();
        self.control.shutdown();
        brought_up.lanes.detach();
        let limit = self.config.give_up_after;
        if let Some(journal) = brought_up.tree.journal() {
            journal.set_paused(limit);
        }
        tracing::warn!(missing = brought_up.tree.remote_pages(), "paused: {why}; the source is waited for");
        let mut attached = brought_up.lanes.loops();
        loop {
            brought_up.check_installing()?;
            for notice in brought_up.lanes.notices.empty() {
                match notice {
                    Notice::Detached => attached = attached.saturating_sub(1),
                    Notice::Broken(reason) => return Err(Failure::broken(reason)),
                    // Settled is asked for below; the rest is about the connections that were lost.
                    Notice::Settled | Notice::UpstreamLost(_) => {}
                }
            }
            self.gathered = self.arrivals.take().or(self.gathered.take());
            // Not before everything that the fault loops had to say about the old lanes was heard.
            if attached == 0 && self.gathered.is_some() && switchover.step(Event::Attached) == Action::Resume
            {
                if let Some(journal) = brought_up.tree.journal() {
                    journal.set_resumed();
                }
                tracing::warn!("resumed after {:.3?}", since.elapsed());
                return Ok(Resumed::Attached);
            }
            let whole = brought_up.tree.check_settled();
            if whole {
                switchover.step(Event::Settled);
            }
            let limit = if whole { limit.or(Some(limits::WHOLE_PATIENCE)) } else { limit };
            let interrupted =
                waiting::readable_within(self.interrupt.as_fd(), Duration::ZERO).unwrap_or(true);
            if interrupted || limit.is_some_and(|limit| since.elapsed() >= limit) {
                let ended = if interrupted { "interrupted while paused" } else { "gave up waiting for it" };
                return match switchover.step(Event::Broken) {
                    Action::End(Ending::Release) => {
                        tracing::warn!("{ended}; every page is here, the source does not know it");
                        Ok(Resumed::Whole)
                    }
                    _ => Err(Failure::broken(format!("{why}; {ended} after {:.0?}", since.elapsed()))),
                };
            }
            let tree = &brought_up.tree;
            self.progress.show(|| {
                let (missing, pages) = (tree.remote_pages(), tree.pages());
                format!("paused for {:.0?}: {why}; {missing} of {pages} pages left", since.elapsed())
            });
            let look = Instant::now() + self.progress.interval();
            let due = limit.map_or(look, |limit| since + limit);
            let fds = [self.arrivals.as_fd(), brought_up.lanes.notices.as_fd(), self.interrupt.as_fd()];
            waiting::readable(fds, Some(due.min(look))).map_err(Failure::io)?;
        }
    }

    /// On new connections: tells the source what is settled, and that the tasks run. Whoever waits for a page is
    /// served meanwhile.
    fn resume(&mut self, brought_up: &mut BroughtUp) -> Result<(), Failure> {
        let Some(Gathered { control: Some(control), lanes }) = self.gathered.take() else {
            return Err(Failure::broken("no connections to go on with".into()));
        };
        self.control = ControlChannel::new(control).map_err(Failure::io)?;
        let settled = brought_up.lanes.attach_anew(lanes).map_err(Failure::io)?;
        for piece in settled_map::pieces(&settled) {
            self.send(&Control::SettledMap(piece))?;
        }
        self.send(&Control::Resumed)?;
        self.send(&Control::Running)
    }

    fn summary(&self, brought_up: &BroughtUp, running_at: Instant) -> Summary {
        let settled_at = brought_up.tree.settled_at().unwrap_or_else(Instant::now);
        let brownout = settled_at.saturating_duration_since(running_at);
        let (pages, push_lane_bytes) = brought_up.lanes.account();
        Summary {
            pages,
            latency: latency::summary(&brought_up.lanes.latency),
            fault_lane_bytes: brought_up.lanes.fault_bytes(),
            push_lane_bytes,
            brownout_us: u64::try_from(brownout.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

/// What a session keeps of connections that have come before it was ready for them.
pub(super) type NewConnections = Option<Gathered<Stream>>;
