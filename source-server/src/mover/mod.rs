//! One move, source's side, phase by phase.
//!
//! ```text
//!   preflight ─▶ connect ─▶ (pre-copy) ─▶ freeze, dump ─▶ ship ─▶ (restore) ─▶ Commit ═▶ push ─▶ release
//!        │            │           │              │          │           │         ║
//!        └────────────┴───────────┴──────────────┴──────────┴───────────┘         ║ the switchover
//!                     roll back: the tasks run on here                            ║ never back from here: a lost link is a pause
//! ```
//!
//! - `Session`: the three connections to the destination, opened before anything is frozen
//! - `Frozen`: tasks that stand still behind a fence; dropped without a word it rolls back
//! - `Committed`: the destination runs; the tasks here are killed once their pages are in the store
//! - `Redial`: when a lost destination is dialled again, and for how long

mod committed;
mod frozen;
mod precopy;
mod redial;
mod session;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use host::criu::Criu;
use host::hooks::{Hook, HookPhase, Hooks};
use host::interrupt::Interrupt;
use host::progress::Progress;
use host::report::{Outcome, Recorder, Report, TaskReport};
use host::state_dir::StateDir;
use protocol::lazy_map::LazyMap;
use protocol::link::tls::TlsError;
use protocol::link::{Endpoint, Fingerprint, LinkError};
use protocol::wire::control::Problem;
use protocol::wire::hello::{HelloError, Refusal, SessionId, SessionSecret};
use protocol::wire::switchover::source::{Action, Ending, Event, Switchover};

use crate::kept::{self, Orphan, Taken, TakenTasks};
use crate::lanes::{LaneCount, LaneCounts, Lanes, Pace};
use crate::precopy::Copied;
use crate::precopy::compression::Compress;
use crate::precopy::policy::Rounds;
use crate::preflight;
use crate::process::ProcessTree;
use crate::store::{FrozenStore, PageStore};

use committed::Committed;
use frozen::{Frozen, Serving, Tasks, Why};
pub use redial::GiveUp;
use session::Session;

/// Where pages wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoreKind {
    /// In pipes of ours; the tasks are killed as soon as the destination runs.
    #[default]
    Pipes,
    /// In the frozen tasks, until the end.
    Frozen,
}

/// What to move, where to, and how.
#[derive(Debug)]
pub struct MoveConfig {
    /// Root of the tree.
    pub pid: u32,
    /// Where `uffd-daemon serve` listens.
    pub to: Endpoint,
    /// Where pages wait.
    pub store: StoreKind,
    /// How fast the push may be.
    pub pace: Pace,
    /// Over how many connections faults are served.
    pub fault_lanes: LaneCount,
    /// Over how many it pushes.
    pub push_lanes: LaneCount,
    /// How often memory is copied before the freeze.
    pub precopy_rounds: Rounds,
    /// How fast.
    pub precopy_pace: Pace,
    /// Whether what is copied ahead is compressed.
    pub compress: Compress,
    /// How long a destination that was lost behind the switchover is dialled.
    pub give_up: GiveUp,
    /// The operator's hooks.
    pub hooks: Vec<Hook>,
    /// CRIU.
    pub criu: Option<PathBuf>,
    /// Where working directories are made.
    pub work_dir: Option<PathBuf>,
    /// Where word is left for a successor, and the options of the link that it needs.
    pub state: Option<StateDir>,
    /// See `state`.
    pub link: Vec<String>,
    /// Of a move that is taken over: nothing of it is left at the destination, says the operator.
    pub destination_is_clean: bool,
    /// No progress.
    pub quiet: bool,
    /// Passed on to `criu dump`.
    pub criu_options: Vec<OsString>,
}

/// Why a move did not end well.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// It cannot be done; nothing was touched.
    #[error("{}", problem_list(.0))]
    Preflight(Vec<Problem>),
    /// It was called off before the switchover; the tasks run on here.
    #[error("{0}")]
    RolledBack(String),
    /// It broke after the switchover; the tasks wait at the destination.
    #[error("{0}")]
    Paused(String),
}

impl MoveError {
    /// The exit status for it.
    #[must_use]
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self::Preflight(_) => 2,
            Self::RolledBack(_) => Outcome::RolledBack.exit_status(),
            Self::Paused(_) => Outcome::Paused.exit_status(),
        }
    }

    fn problem(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Preflight(vec![host::facts::problem(what, remedy)])
    }
}

fn problem_list(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(|problem| format!("  {problem}")).collect();
    format!("this move cannot be done:\n{}", lines.join("\n"))
}

/// A move and everything it has come by.
pub struct Mover {
    config: MoveConfig,
    hooks: Hooks,
    interrupt: Interrupt,
    recorder: Recorder,
    progress: Progress,
    id: SessionId,
    secret: SessionSecret,
    lanes: LaneCounts,
}

impl Mover {
    /// A move that has not begun. Takes over the process's signals.
    ///
    /// # Errors
    /// The errno of the system calls.
    pub fn new(config: MoveConfig) -> std::io::Result<Self> {
        Self::of_session(config, (SessionId(random()?), SessionSecret(random()?)))
    }

    /// A move that has a session already. Takes over the process's signals.
    ///
    /// # Errors
    /// The errno of the system calls.
    pub fn of_session(
        mut config: MoveConfig,
        (id, secret): (SessionId, SessionSecret),
    ) -> std::io::Result<Self> {
        let mut hooks = Hooks::new(std::mem::take(&mut config.hooks));
        hooks.tell("POSTCOPY_ROLE", "source");
        hooks.tell("POSTCOPY_SESSION", id);
        hooks.tell("POSTCOPY_PID", config.pid);
        Ok(Self {
            hooks,
            interrupt: Interrupt::install()?,
            recorder: Recorder::new(id.to_string(), "source"),
            progress: Progress::new(config.quiet),
            id,
            secret,
            lanes: LaneCounts::choose(config.fault_lanes, config.push_lanes, 1, 1),
            config,
        })
    }

    /// Goes on with a move whose source has ended, and reports in any case.
    pub fn take_over(mut self, orphan: Orphan) -> (Report, Result<(), MoveError>) {
        let result = self.taken_over(orphan);
        self.report(result)
    }

    fn taken_over(&mut self, orphan: Orphan) -> Result<(), MoveError> {
        let broken = |error: std::io::Error| MoveError::Paused(format!("cannot take over: {error}"));
        let Taken { word, map, tasks, pipes, promised, generation, dir } = orphan.take().map_err(broken)?;
        self.report_tasks(&map);
        let tasks = tasks.map(|TakenTasks { tree, fence, network }| Tasks {
            tree,
            network,
            fence,
            _dir: dir,
            dump: None,
            holder: None,
            pipes: None,
            drain: None,
            frozen_at: None,
            copied: None,
        });
        let (held, store): (_, Arc<dyn PageStore>) = match (tasks, pipes) {
            (Some(tasks), pipes) if !promised || self.config.destination_is_clean => {
                let why =
                    if promised { "its operator says so" } else { "its source ended before it committed" };
                self.rolled_back_hook();
                let undone = tasks.let_run(Some(word));
                pipes.into_iter().for_each(|(_, holder)| holder.end());
                return Err(MoveError::RolledBack(frozen::and(why.into(), undone)));
            }
            (None, _) if self.config.destination_is_clean => {
                return Err(MoveError::Paused("the tasks here are killed: nothing can run on".into()));
            }
            (tasks, Some((store, holder))) => {
                // Killed before it had killed them.
                tasks.into_iter().for_each(|mut tasks| committed::kill(&mut tasks));
                ((None, Some(holder)), store)
            }
            (Some(tasks), None) => {
                let memory = frozen::memory_of(&tasks.tree, &map).map_err(MoveError::Paused)?;
                ((Some(tasks), None), Arc::new(FrozenStore::new(map.clone(), memory)))
            }
            (None, None) => return Err(MoveError::Paused("cannot take over: the tasks are gone".into())),
        };
        self.recorder.phase("push");
        let (post, notices) = host::mailbox::mailbox().map_err(broken)?;
        let serving = Serving { lanes: Lanes::new(map.clone(), store), map, post, notices };
        let session = Session::unconnected(generation).map_err(broken)?;
        Committed::taken_over(serving, held, word, session).finish(self)
    }

    fn report_tasks(&mut self, map: &LazyMap) {
        let tasks = map.tasks().iter();
        self.recorder.report().tasks =
            tasks.map(|task| TaskReport { pid: task.id.0, lazy_pages: task.pages }).collect();
    }

    /// Decides how many lanes a process with so many threads gets.
    fn count_lanes(&mut self, threads: usize) {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let MoveConfig { fault_lanes, push_lanes, .. } = self.config;
        self.lanes = LaneCounts::choose(fault_lanes, push_lanes, processors, threads);
    }

    /// Whose pages are kept when this process is killed.
    fn kept_session(&self, work_dir: &Path) -> kept::Session {
        kept::Session {
            session: (self.id, self.secret),
            to: self.config.to.to_string(),
            link: self.config.link.clone(),
            lanes: self.lanes,
            root: self.config.pid,
            work_dir: work_dir.to_owned(),
        }
    }

    /// Moves, and reports in any case.
    pub fn run(mut self) -> (Report, Result<(), MoveError>) {
        let result = self.phases();
        self.report(result)
    }

    fn report(mut self, result: Result<(), MoveError>) -> (Report, Result<(), MoveError>) {
        self.progress.clear();
        let outcome = match &result {
            Ok(()) => Outcome::Released,
            Err(MoveError::Preflight(_) | MoveError::RolledBack(_)) => Outcome::RolledBack,
            Err(MoveError::Paused(_)) => Outcome::Paused,
        };
        let error = result.as_ref().err().map(ToString::to_string);
        (self.recorder.finish(outcome, error), result)
    }

    fn phases(&mut self) -> Result<(), MoveError> {
        self.recorder.phase("preflight");
        let (mut tree, criu, network) = self.preflight()?;
        let session = Session::open(self, &tree, &criu)?;
        let mut switchover = Switchover::default();
        let mut copied = None;
        if self.config.precopy_rounds != Rounds::Off {
            self.recorder.phase("precopy");
            match self.copy_ahead(&mut tree, &session) {
                Ok(ahead) => copied = Some(ahead),
                Err(reason) => return Err(self.never_frozen(&session, &mut switchover, reason)),
            }
        }
        if let Err(error) = self.hooks.run(HookPhase::PreFreeze) {
            return Err(self.never_frozen(&session, &mut switchover, error.to_string()));
        }
        let mut frozen = match Frozen::dump(self, &tree, &criu, network, copied) {
            Ok(frozen) => frozen,
            Err(reason) => return Err(self.never_frozen(&session, &mut switchover, reason)),
        };
        self.report_tasks(&frozen.serving.map);
        match frozen.reach_commit(self, &session, &mut switchover) {
            Ok(commit) => Committed::new(frozen, session, commit, switchover).finish(self),
            Err(Why { mut reason, then }) => {
                if then == Action::CallOff {
                    if let Some(why) = session.call_off(&reason, &mut switchover) {
                        reason.push_str(&format!(
                            "; the destination did not confirm that it is clean ({why}): look at it"
                        ));
                    }
                } else if then != Action::End(Ending::LetRun) {
                    let Frozen { tasks, serving, word, .. } = frozen;
                    let kept = (None, word);
                    return Err(Committed::hold(self.id, Some(tasks), &serving, kept, &session, &reason));
                }
                self.rolled_back_hook();
                Err(MoveError::RolledBack(frozen::and(reason, frozen.roll_back())))
            }
        }
    }

    /// Pre-copy, and the tree as it is behind it.
    fn copy_ahead(&mut self, tree: &mut ProcessTree, session: &Session) -> Result<Copied, String> {
        let copied = precopy::run(self, tree, session)?;
        self.progress.clear();
        *tree = ProcessTree::of(self.config.pid).map_err(|error| format!("cannot list the tree: {error}"))?;
        Ok(copied)
    }

    /// Calls off a move whose tasks run, or run again.
    fn never_frozen(&self, session: &Session, switchover: &mut Switchover, reason: String) -> MoveError {
        if switchover.step(Event::Broken) == Action::CallOff {
            session.call_off(&reason, switchover);
        }
        self.rolled_back_hook();
        MoveError::RolledBack(reason)
    }

    fn preflight(&self) -> Result<(ProcessTree, Criu, crate::netlock::NetworkLock), MoveError> {
        let pid = self.config.pid;
        let unknown = |error: std::io::Error| {
            let remedy = "give the pid of a running process that this user may see";
            MoveError::problem(format!("no process {pid} ({error})"), remedy)
        };
        let tree = ProcessTree::of(pid).map_err(unknown)?;
        let mut problems = preflight::problems(&tree);
        let network = match crate::netlock::NetworkLock::of(&tree) {
            Ok(network) => network,
            // What keeps it from being looked at is among the problems.
            Err(_) if !problems.is_empty() => return Err(MoveError::Preflight(problems)),
            Err(error) => return Err(unknown(error)),
        };
        if let Some(session) = self.config.state.as_ref().and_then(|dir| kept::claimed(dir, &tree)) {
            problems.push(host::facts::problem(
                format!("process {pid} belongs to move {session}, which has not ended"),
                format!(
                    "wait for it; if its source-server has ended: source-server resume --session {session}"
                ),
            ));
        }
        let criu = Criu::find(self.config.criu.as_deref());
        if let Err(error) = &criu {
            problems.push(host::facts::problem("no usable criu", error.to_string()));
        }
        problems.extend(criu.as_ref().ok().and_then(|criu| preflight::socket_problem(&tree, criu)));
        match criu {
            Ok(criu) if problems.is_empty() => Ok((tree, criu, network)),
            _ => Err(MoveError::Preflight(problems)),
        }
    }

    /// The roll-back goes on whatever its hook says.
    fn rolled_back_hook(&self) {
        if let Err(error) = self.hooks.run(HookPhase::RolledBack) {
            tracing::error!("{error}");
        }
    }
}

impl From<LinkError> for MoveError {
    fn from(error: LinkError) -> Self {
        let remedy = match &error {
            LinkError::Io { .. } => "start `uffd-daemon serve` there and check address, port and firewall",
            LinkError::Hello { source: HelloError::Refused(Refusal::Link), .. } => {
                "`uffd-daemon serve` there was started with another --link"
            }
            LinkError::Hello { .. } => "check that `uffd-daemon serve` of the same release listens there",
            LinkError::Tls { own, source, .. } => {
                return Self::problem(error.to_string(), trust_remedy(own, source));
            }
        };
        Self::problem(error.to_string(), remedy)
    }
}

/// What to do about a peer that is not accepted, or does not accept us.
fn trust_remedy(own: &Fingerprint, error: &TlsError) -> String {
    match error {
        TlsError::NotPinned(seen) => format!(
            "compare it with what `uffd-daemon identity` prints there; if they are the same, give --peer {seen}"
        ),
        TlsError::NotAccepted(_) => {
            format!("this host's fingerprint is {own}: start `uffd-daemon serve` there with --peer {own}")
        }
        TlsError::Plain => "start `uffd-daemon serve` there with --link tls as well".into(),
        TlsError::Library(_) => "check key and certificates of both sides: `source-server identity`".into(),
        TlsError::Io(_) => {
            "start `uffd-daemon serve --link tls` there and check address, port and firewall".into()
        }
    }
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}
