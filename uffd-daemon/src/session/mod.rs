//! One move, destination's side, phase by phase.
//!
//! ```text
//!   offer ─▶ verdict ─▶ lanes ─▶ pre-copy ─▶ images ─▶ restore, held ─▶ Prepared ─▶ Commit ═▶ run ─▶ settle ─▶ Released
//!     └─────────┴─────────┴─────────┴──────────┴──────────┴────────────────┘          ║
//!                     roll back: nothing of the tree is left here                     ║ never back: paused
//! ```

mod brought_up;
mod images;
mod precopy;

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use host::criu::Criu;
use host::hooks::{HookPhase, Hooks};
use host::progress::Progress;
use host::report::{Outcome, Recorder, Report, TaskReport};
use host::waiting;
use host::workdir::WorkDir;
use protocol::link::{ControlChannel, ControlError, Stream};
use protocol::wire::control::{Control, Offer, Summary};
use protocol::wire::hello::{Hello, Role};
use protocol::wire::switchover::destination::{Action, Ending, Event, Switchover};

use crate::fault::Notice;
use crate::latency;
use crate::limits;
use crate::preflight;
use crate::restore::PidPlace;

use brought_up::{BroughtUp, Failure, Images};
pub use precopy::Prefill;

/// What every session of a daemon has in common.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// CRIU.
    pub criu: Criu,
    /// Where trees are restored.
    pub place: PidPlace,
    /// The operator's hooks.
    pub hooks: Hooks,
    /// Where working directories are made.
    pub work_dir: Option<PathBuf>,
    /// No progress.
    pub quiet: bool,
    /// Passed on to `criu restore`.
    pub criu_options: Vec<OsString>,
    /// What of pre-copy is installed before the tasks run.
    pub prefill: Prefill,
    /// How long the tasks wait for that at most.
    pub prefill_ms: u64,
}

/// Why a move did not end well here.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Refused by preflight, or the source never got as far as sending anything.
    #[error("{0}")]
    Refused(String),
    /// Called off before the switchover: nothing is left here.
    #[error("rolled back: {0}")]
    RolledBack(String),
    /// Broken after the switchover: the tasks wait for pages that have not come.
    #[error("{0}")]
    Paused(String),
}

/// Options that a source may ask the restore to use; everything else is this host's own decision.
const SHARED_OPTIONS: [&str; 7] =
    ["--tcp-established", "--tcp-close", "--shell-job", "-j", "--ext-unix-sk", "--file-locks", "-l"];

/// How long the source may take to open its lanes, and to say farewell.
const LANE_PATIENCE: Duration = Duration::from_secs(10);

/// One move.
pub struct Session {
    config: SessionConfig,
    control: ControlChannel,
    lanes: Receiver<(Role, Stream)>,
    recorder: Recorder,
    progress: Progress,
    /// Readable when the operator wants to stop.
    interrupt: Arc<std::os::unix::net::UnixStream>,
}

impl Session {
    /// A move that begins on `control`; its lanes will come through `lanes`.
    #[must_use]
    pub fn new(
        mut config: SessionConfig,
        hello: &Hello,
        control: ControlChannel,
        lanes: Receiver<(Role, Stream)>,
        interrupt: Arc<std::os::unix::net::UnixStream>,
    ) -> Self {
        config.hooks.tell("POSTCOPY_ROLE", "destination");
        config.hooks.tell("POSTCOPY_SESSION", hello.session);
        let recorder = Recorder::new(hello.session.to_string(), "destination");
        let progress = Progress::new(config.quiet);
        Self { config, control, lanes, recorder, progress, interrupt }
    }

    /// Takes the move, and reports in any case.
    pub fn run(mut self) -> (Report, Result<(), SessionError>) {
        let result = self.phases();
        self.progress.clear();
        let outcome = match &result {
            Ok(()) => Outcome::Released,
            Err(SessionError::Refused(_) | SessionError::RolledBack(_)) => Outcome::RolledBack,
            Err(SessionError::Paused(_)) => Outcome::Paused,
        };
        let error = result.as_ref().err().map(ToString::to_string);
        (self.recorder.finish(outcome, error), result)
    }

    fn phases(&mut self) -> Result<(), SessionError> {
        self.recorder.phase("preflight");
        let offer = self.judge_offer()?;
        let mut switchover = Switchover::default();
        match self.bring_up(&offer, &mut switchover) {
            Ok(brought_up) => self.settle(brought_up, switchover),
            Err(reason) => {
                if let Err(error) = self.config.hooks.run(HookPhase::RolledBack) {
                    tracing::error!("{error}");
                }
                // The source may be gone; then nobody waits for this.
                let _ = self.control.send(&Control::Abort(reason.clone()));
                let _ = self.control.send(&Control::RolledBack);
                Err(SessionError::RolledBack(reason))
            }
        }
    }

    fn judge_offer(&mut self) -> Result<Offer, SessionError> {
        let refused = |error: ControlError| SessionError::Refused(format!("no offer: {error}"));
        let offer = match self.control.receive().map_err(refused)? {
            Control::Offer(offer) => offer,
            other => return Err(refused(other.out_of_order("an offer"))),
        };
        let problems = preflight::offer_problems(&offer, &self.config.criu, self.config.place);
        self.config.hooks.tell("POSTCOPY_PID", offer.root);
        tracing::info!(task = %offer.root, name = offer.name, from = self.control.peer(), "offered");
        let refusal = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        self.control.send(&Control::Verdict(problems)).map_err(refused)?;
        if refusal.is_empty() { Ok(offer) } else { Err(SessionError::Refused(format!("refused: {refusal}"))) }
    }

    /// Everything up to the switchover; whatever fails here leaves nothing behind.
    fn bring_up(&mut self, offer: &Offer, switchover: &mut Switchover) -> Result<BroughtUp, String> {
        let (fault, mut push) = self.wait_for_lanes()?;
        let mut cache = None;
        if offer.precopy_pages > 0 {
            let (lane, kept) = self.precopy(offer.precopy_pages, push)?;
            (push, cache) = (lane, Some(kept));
        }
        let dir = WorkDir::create(self.config.work_dir.as_deref(), "postcopy-destination")
            .map_err(|error| format!("cannot make a working directory: {error}"))?;
        let dumped = self.receive_images(dir.path())?;
        let frozen_at = Instant::now().checked_sub(Duration::from_micros(dumped.frozen_us));
        let precopied = self.receive_clean(&dumped, cache)?;
        self.recorder.phase("restore");
        self.config.hooks.run(HookPhase::PreRestore).map_err(|error| error.to_string())?;
        let mut options = self.config.criu_options.clone();
        for option in offer.criu_options.iter().filter(|option| SHARED_OPTIONS.contains(&option.as_str())) {
            if !options.iter().any(|have| have == option.as_str()) {
                options.push(option.into());
            }
        }
        let images = Images { dir, lazy_pages: dumped.lazy_pages, precopied };
        let mut brought_up = BroughtUp::start(&self.config, images, &options, fault, push)?;
        brought_up.frozen_at = frozen_at;
        let tasks = brought_up.map.tasks().iter();
        let tasks = tasks.map(|task| TaskReport { pid: task.id.0, lazy_pages: task.pages }).collect();
        self.recorder.report().tasks = tasks;
        match self.hold_and_commit(&mut brought_up, switchover) {
            Ok(()) => Ok(brought_up),
            Err(reason) => {
                if switchover.step(Event::Broken) == Action::End(Ending::TearDown) {
                    brought_up.tear_down();
                }
                Err(reason)
            }
        }
    }

    fn wait_for_lanes(&self) -> Result<(Stream, Stream), String> {
        let (mut fault, mut push) = (None, None);
        let deadline = Instant::now() + LANE_PATIENCE;
        while fault.is_none() || push.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lanes.recv_timeout(left) {
                Ok((Role::Fault, stream)) => fault = Some(stream),
                Ok((Role::Push, stream)) => push = Some(stream),
                Ok((Role::Control, _)) => {}
                Err(_) => return Err("the source opened no lanes".into()),
            }
        }
        fault.zip(push).ok_or_else(|| "the source opened no lanes".into())
    }

    fn receive_images(&mut self, dir: &std::path::Path) -> Result<protocol::wire::control::Dumped, String> {
        let mut images = images::ImageWriter::new(&dir.join("images")).map_err(|error| error.to_string())?;
        let mut shipping = false;
        loop {
            let message = self.next_message(None)?;
            if !shipping {
                shipping = true;
                self.recorder.phase("ship");
            }
            match message {
                Control::Image(chunk) => {
                    self.recorder.report().bytes.control += chunk.data.len() as u64;
                    images.write(&chunk).map_err(|error| error.to_string())?;
                }
                Control::Dumped(dumped) => {
                    images.finish(dumped.images).map_err(|error| error.to_string())?;
                    return Ok(dumped);
                }
                other => return Err(other.out_of_order("an image").to_string()),
            }
        }
    }

    /// The source's next message; its abort, an interrupt and the deadline are errors.
    fn next_message(&self, limit: Option<Duration>) -> Result<Control, String> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let ready = waiting::link_or(&self.control, [self.interrupt.as_fd()], deadline);
        match ready.map_err(|error| error.to_string())? {
            (_, [true]) => Err("interrupted at the destination".into()),
            (true, _) => match self.control.receive() {
                Ok(Control::Abort(reason)) => Err(format!("the source called it off: {reason}")),
                Ok(message) => Ok(message),
                Err(error) => Err(format!("lost the source: {error}")),
            },
            _ => Err("the source was silent for too long".into()),
        }
    }

    /// Restores, and waits for the word that lets the tasks run.
    fn hold_and_commit(
        &mut self,
        brought_up: &mut BroughtUp,
        switchover: &mut Switchover,
    ) -> Result<(), String> {
        brought_up.wait_held(&self.control, &self.interrupt)?;
        self.prefill(brought_up)?;
        self.config.hooks.run(HookPhase::PostRestore).map_err(|error| error.to_string())?;
        if switchover.step(Event::Held) == Action::SendPrepared {
            self.control.send(&Control::Prepared).map_err(|error| format!("lost the source: {error}"))?;
        }
        let message = self.next_message(Some(limits::COMMIT_TIMEOUT))?;
        match switchover.step(Event::from(&message)) {
            Action::LetRun => Ok(()),
            _ => Err(message.out_of_order("commit").to_string()),
        }
    }

    /// Behind the switchover: run, fetch everything, release.
    fn settle(&mut self, mut brought_up: BroughtUp, mut switchover: Switchover) -> Result<(), SessionError> {
        let Err(Failure { reason, event }) = self.try_settle(&mut brought_up, &mut switchover) else {
            if let Err(error) = self.config.hooks.run(HookPhase::Released) {
                tracing::error!("{error}");
            }
            brought_up.finish();
            return Ok(());
        };
        if switchover.step(event) == Action::End(Ending::TellAndPause) {
            // The source must know, although it will not resume.
            let _ = self.control.send(&Control::Abort(reason.clone()));
        }
        self.control.shutdown();
        brought_up.finish_installing();
        self.recorder.settle(&self.summary(&brought_up, Instant::now()));
        Err(SessionError::Paused(brought_up.pause(&reason)))
    }

    /// Runs the tasks and waits until every page is here; an error pauses.
    fn try_settle(&mut self, brought_up: &mut BroughtUp, switchover: &mut Switchover) -> Result<(), Failure> {
        let running_at = brought_up.run()?;
        if let Some(frozen_at) = brought_up.frozen_at {
            let blackout = running_at.saturating_duration_since(frozen_at);
            self.recorder.report().blackout_ms = blackout.as_secs_f64() * 1000.0;
        }
        self.recorder.phase_at("push", running_at);
        if switchover.step(Event::Resumed) == Action::SendRunning {
            self.control.send(&Control::Running).map_err(|error| Failure::lost(&error))?;
        }
        brought_up.start_push();
        self.wait_settled(brought_up)?;
        let resolved_here = brought_up.tree.local_faults.load(Ordering::Relaxed);
        tracing::info!(resolved_here, "every page is here");
        self.recorder.phase("release");
        let summary = self.summary(brought_up, running_at);
        self.recorder.settle(&summary);
        if switchover.step(Event::Settled) == Action::SendComplete {
            self.control.send(&Control::Complete(summary)).map_err(|error| Failure::lost(&error))?;
        }
        switchover.step(Event::CompleteSent);
        // An interrupt changes nothing any more.
        let farewell = match waiting::link_within(&self.control, LANE_PATIENCE) {
            Ok(true) => self.control.receive(),
            _ => Err(ControlError::Closed),
        };
        let (event, warning) = match farewell {
            Ok(Control::Released) => (Event::Released, None),
            Ok(other) => (Event::from(&other), Some(other.out_of_order("released"))),
            Err(error) => (Event::Broken, Some(error)),
        };
        if let Some(warning) = warning {
            tracing::warn!("no farewell from the source: {warning}");
        }
        match switchover.step(event) {
            Action::End(Ending::Release) => Ok(()),
            _ => Err(Failure::broken("no farewell from the source".into())),
        }
    }

    /// Waits until every page is settled and acknowledged, when the push lane's thread ends well, and until no
    /// answer is on its way that the source has counted.
    fn wait_settled(&mut self, brought_up: &BroughtUp) -> Result<(), Failure> {
        let (mut settled, mut acknowledged) = (false, false);
        while !(settled && acknowledged) {
            let fds = [brought_up.notices.as_fd(), brought_up.pushed.as_fd()];
            let deadline = Some(Instant::now() + self.progress.interval());
            let ready = waiting::link_or(&self.control, fds, deadline);
            let (control, [notice, pushed]) = ready.map_err(Failure::io)?;
            brought_up.check_installing()?;
            if pushed {
                for result in brought_up.pushed.empty() {
                    result.map_err(|error| Failure::broken(error.to_string()))?;
                    acknowledged = true;
                    brought_up.ask_whether_settled();
                }
            }
            if notice {
                for notice in brought_up.notices.empty() {
                    match notice {
                        Notice::Settled => settled = true,
                        Notice::UpstreamLost(_) if brought_up.tree.check_settled() => settled = true,
                        Notice::UpstreamLost(reason) | Notice::Broken(reason) => {
                            return Err(Failure::broken(reason));
                        }
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
            let (tree, latency) = (&brought_up.tree, &brought_up.latency);
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

    fn summary(&self, brought_up: &BroughtUp, running_at: Instant) -> Summary {
        let settled_at = brought_up.tree.settled_at().unwrap_or_else(Instant::now);
        let brownout = settled_at.saturating_duration_since(running_at);
        Summary {
            pages: brought_up.tree.counts(),
            latency: latency::summary(&brought_up.latency),
            fault_lane_bytes: brought_up.fault_bytes(),
            push_lane_bytes: brought_up.push_bytes.load(Ordering::Relaxed),
            brownout_us: u64::try_from(brownout.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

/// Bytes counted by a lane's thread.
pub(crate) type ByteCount = Arc<AtomicU64>;
