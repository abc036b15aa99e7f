//! One move, destination's side, phase by phase.
//!
//! ```text
//!   offer ─▶ verdict ─▶ lanes ─▶ pre-copy ─▶ images ─▶ restore, held ─▶ Prepared ─▶ Commit ═▶ run ─▶ settle ─▶ Released
//!     └─────────┴─────────┴─────────┴──────────┴──────────┴────────────────┘          ║
//!                     roll back: nothing of the tree is left here                     ║ never back: a lost link is a pause
//! ```

mod arrivals;
mod brought_up;
mod images;
mod lanes;
mod let_go;
mod precopy;
mod settling;
mod standby;

pub use arrivals::{Arrivals, Door, door};
pub use precopy::Prefill;

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use host::criu::Criu;
use host::hooks::{HookPhase, Hooks};
use host::progress::Progress;
use host::report::{Outcome, Recorder, Report, TaskReport};
use host::state_dir::StateDir;
use host::waiting;
use protocol::link::{ControlChannel, ControlError, Stream};
use protocol::wire::control::{Control, Offer};
use protocol::wire::hello::{Hello, SessionId, SessionSecret};
use protocol::wire::switchover::destination::{Action, Ending, Event, Switchover};

use crate::limits;
use crate::preflight;
use crate::restore::PidPlace;
use crate::takeover::Taken;
use crate::tombstone;

use arrivals::{Gathered, Lanes};
use brought_up::{BroughtUp, Images};
use standby::Standby;

/// Where images are received, below the working directory.
const IMAGES: &str = "images";

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
    /// What is left behind; nothing if no other daemon is to take over.
    pub state: Option<StateConfig>,
    /// How long a source that was lost behind the switchover is waited for; none is for ever.
    pub give_up_after: Option<Duration>,
    /// No progress.
    pub quiet: bool,
    /// Passed on to `criu restore`.
    pub criu_options: Vec<OsString>,
    /// What of pre-copy is installed before the tasks run.
    pub prefill: Prefill,
    /// How long the tasks wait for that at most.
    pub prefill_ms: u64,
}

/// What a daemon leaves behind about its sessions for one that takes over.
#[derive(Clone, Debug)]
pub struct StateConfig {
    /// Where keepers are found.
    pub dir: StateDir,
    /// Where the daemon listens.
    pub listen: String,
    /// The options of its link.
    pub link: Vec<String>,
    /// Whose state it is.
    pub session: Option<(SessionId, SessionSecret)>,
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
    arrivals: Arrivals,
    /// Connections that replace those in use.
    gathered: settling::NewConnections,
    recorder: Recorder,
    progress: Progress,
    /// Readable when the operator wants to stop.
    interrupt: Arc<std::os::unix::net::UnixStream>,
}

impl Session {
    /// A move that begins on `control`; its other connections come as `arrivals`.
    #[must_use]
    pub fn new(
        mut config: SessionConfig,
        hello: &Hello,
        control: ControlChannel,
        arrivals: Arrivals,
        interrupt: Arc<std::os::unix::net::UnixStream>,
    ) -> Self {
        config.hooks.tell("POSTCOPY_ROLE", "destination");
        config.hooks.tell("POSTCOPY_SESSION", hello.session);
        if let Some(state) = &mut config.state {
            state.session = Some((hello.session, hello.secret));
        }
        let recorder = Recorder::new(hello.session.to_string(), "destination");
        let progress = Progress::new(config.quiet);
        Self { config, control, arrivals, gathered: None, recorder, progress, interrupt }
    }

    /// Takes the move, and reports in any case.
    pub fn run(mut self) -> (Report, Result<(), SessionError>) {
        let result = self.phases();
        self.report(result)
    }

    /// Goes on with a move whose daemon has ended, and reports in any case.
    pub fn run_taken_over(mut self, taken: Taken) -> (Report, Result<(), SessionError>) {
        self.recorder.phase("push");
        self.arrivals.allow_resume();
        let result = self.take_over(taken);
        self.report(result)
    }

    fn report(mut self, result: Result<(), SessionError>) -> (Report, Result<(), SessionError>) {
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
            Err(reason) => Err(self.rolled_back(reason)),
        }
    }

    /// Nothing of the tree is left here: says so.
    fn rolled_back(&self, reason: String) -> SessionError {
        if let Err(error) = self.config.hooks.run(HookPhase::RolledBack) {
            tracing::error!("{error}");
        }
        // The source may be gone; then nobody waits for this.
        let _ = self.control.send(&Control::Abort(reason.clone()));
        let _ = self.control.send(&Control::RolledBack);
        SessionError::RolledBack(reason)
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
        let mut lanes = self.wait_for_lanes()?;
        let standby = Standby::start(&self.config, &offer.pids, self.restore_options(offer))?;
        let mut cache = None;
        if offer.precopy_pages > 0 {
            // One thread copies, over the first.
            let (lane, kept) = self.precopy(offer.precopy_pages, lanes.pushes.swap_remove(0))?;
            lanes.pushes.push(lane);
            cache = Some(kept);
        }
        let dumped = self.receive_images(&standby.dir().join(IMAGES))?;
        let frozen_at = Instant::now().checked_sub(Duration::from_micros(dumped.frozen_us));
        let precopied = self.receive_clean(&dumped, cache)?;
        self.recorder.phase("restore");
        self.config.hooks.run(HookPhase::PreRestore).map_err(|error| error.to_string())?;
        let images = Images { lazy_pages: dumped.lazy_pages, precopied };
        let mut brought_up = BroughtUp::start(&self.config, standby, images, lanes)?;
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

    fn restore_options(&self, offer: &Offer) -> Vec<OsString> {
        let mut options = self.config.criu_options.clone();
        for option in offer.criu_options.iter().filter(|option| SHARED_OPTIONS.contains(&option.as_str())) {
            if !options.iter().any(|have| have == option.as_str()) {
                options.push(option.into());
            }
        }
        options
    }

    fn wait_for_lanes(&mut self) -> Result<Lanes<Stream>, String> {
        let deadline = Instant::now() + LANE_PATIENCE;
        loop {
            if let Some(Gathered { lanes, .. }) = self.arrivals.take() {
                return Ok(lanes);
            }
            match waiting::readable([self.arrivals.as_fd()], Some(deadline)) {
                Ok([true]) => {}
                _ => return Err("the source opened no lanes".into()),
            }
        }
    }

    fn receive_images(&mut self, dir: &std::path::Path) -> Result<protocol::wire::control::Dumped, String> {
        let mut images = images::ImageWriter::new(dir).map_err(|error| error.to_string())?;
        let mut shipping = false;
        loop {
            // The freeze and the hooks before it take as long as they take.
            let message = self.next_message(shipping.then_some(limits::IMAGE_PATIENCE))?;
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
        self.next_message_or(limit, None)
    }

    /// As [`Session::next_message`]; that the restore has ended is an error, too.
    fn next_message_or(
        &self,
        limit: Option<Duration>,
        restore: Option<BorrowedFd<'_>>,
    ) -> Result<Control, String> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let fds = [self.interrupt.as_fd(), restore.unwrap_or_else(|| self.interrupt.as_fd())];
        let ready = waiting::link_or(&self.control, fds, deadline);
        match ready.map_err(|error| error.to_string())? {
            (_, [true, _]) => Err("interrupted at the destination".into()),
            (_, [_, true]) => Err("criu restore ended while the tree was held".into()),
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
        if let Some(state) = &self.config.state {
            tombstone::leave(state)
                .map_err(|error| format!("cannot leave word that the tasks have not run: {error}"))?;
        }
        if switchover.step(Event::Held) == Action::SendPrepared {
            self.control.send(&Control::Prepared).map_err(|error| format!("lost the source: {error}"))?;
        }
        // Without CRIU the tasks stay held for ever. Found out before the barrier is lifted, a word to the source undoes all.
        let message = self.next_message_or(Some(limits::COMMIT_TIMEOUT), brought_up.restore_ended_fd())?;
        match switchover.step(Event::from(&message)) {
            Action::LetRun => {
                self.arrivals.allow_resume();
                Ok(())
            }
            _ => Err(message.out_of_order("commit").to_string()),
        }
    }
}

/// Bytes counted by a lane's thread.
pub(crate) type ByteCount = Arc<AtomicU64>;
