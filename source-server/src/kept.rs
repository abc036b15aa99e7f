//! What a source leaves behind for its successor: word of the session, and a process that holds what must not end with the
//! source itself.
//!
//! ```text
//!   frozen       source-server ──▶ STATE-DIR/SESSION.pages: id and secret, where to dial, which tasks stand still
//!   Commit       source-server ──fork──▶ postcopy-hold: the other end of CRIU's page server
//!                      └──▶ STATE-DIR/SESSION.commit: from here on the destination may run
//!   let go       source-server ──fork──▶ postcopy-hold: the pipes of pages, nothing else
//!                      └──▶ STATE-DIR/SESSION.pages: which pipe has which pages, too
//! ```
//!
//! The files are locked by who serves the session. Without that lock they belong to `source-server resume`. It lets the tasks
//! run where nothing was promised, serves from the stopped tasks, or takes duplicates of the pipes out of the holder.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use host::state_dir::{StateDir, write_whole};
use host::waiting;
use host::workdir::WorkDir;
use kernel::holder::fork_holder;
use kernel::pidfd::PidFd;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::SIGKILL;
use protocol::lazy_map::{LazyMap, TaskMap};
use protocol::units::{ImageAddr, PageRun, TaskId};
use protocol::wire::hello::{SessionId, SessionSecret};
use serde::{Deserialize, Serialize};

use crate::dump::Dump;
use crate::fence::Fence;
use crate::lanes::LaneCounts;
use crate::limits;
use crate::netlock::NetworkLock;
use crate::process::{ProcessTree, Task, has_ended, state};
use crate::store::{PageStore, PipeStore};

/// Where the state of moves is, unless the operator says otherwise.
pub const DEFAULT_DIR: &str = "/run/source-server";
/// The kind of file that says where the pages are.
const PAGES: &str = "pages";
/// The kind of file that is there from before `Commit` is sent; names who holds CRIU's page server.
const COMMIT: &str = "commit";
/// The kind of file that is locked by who serves a session.
const LOCK: &str = "lock";
/// How often it is looked whether tasks that nobody holds any more stand still.
const LOOK: Duration = Duration::from_millis(1);

/// A process that holds descriptors.
#[derive(Debug)]
pub struct Holder {
    pid: u32,
    handle: PidFd,
}

impl Holder {
    /// Forks one for the other end of CRIU's page server: as long as it is there CRIU waits for requests, and holds the tasks.
    ///
    /// # Errors
    /// The errno of `fork(2)`.
    pub fn of_dump(dump: &Dump) -> io::Result<Self> {
        Self::fork(&[dump.server.as_fd()])
    }

    /// Forks one for the pipes of `store`.
    ///
    /// # Errors
    /// The errno of `fork(2)`.
    pub fn of_pipes(store: &PipeStore) -> io::Result<Self> {
        store.with_pipes(|pipes| Self::fork(&pipes.iter().flatten().copied().collect::<Vec<_>>()))
    }

    fn fork(keep: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let pid = fork_holder(c"postcopy-hold", keep)?;
        Ok(Self { pid, handle: PidFd::open(pid)? })
    }

    /// Its pid.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends it: nobody needs what it holds any more.
    pub fn end(self) {
        let _ = self.handle.signal(SIGKILL);
        // One that another process has forked is reaped by somebody else.
        if let Ok(pid) = i32::try_from(self.pid) {
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
        }
    }
}

/// A process: when it began, in the kernel's ticks, tells it from one that has its pid later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    pid: u32,
    began: u64,
}

impl Identity {
    fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Behind the name, which may hold anything, the first field is the third.
        let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
        let field = behind.split_whitespace().nth(19).and_then(|field| field.parse().ok());
        Ok(Self { pid, began: field.ok_or(io::ErrorKind::InvalidData)? })
    }

    fn is_there(self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == self)
    }

    /// Whether it still has memory.
    fn lives(self) -> bool {
        self.is_there() && !has_ended(self.pid)
    }

    /// Held, if it is still there.
    fn open(self) -> Option<PidFd> {
        // Whoever has the pid now is held first, and then looked at.
        PidFd::open(self.pid).ok().filter(|_| self.is_there())
    }
}

/// Everything about a session that its successor cannot find out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    session: [u8; 16],
    secret: [u8; 16],
    /// Where the destination listens.
    pub to: String,
    /// The options of the link, as the command line had them.
    pub link: Vec<String>,
    /// How many fault lanes and push lanes.
    pub lanes: LaneCounts,
    /// Root of the tree that was moved.
    pub root: u32,
    /// The directory of the process that was killed.
    work_dir: PathBuf,
    /// How many processes have served the session.
    generation: u16,
    /// The lazy runs of each task: its pid, and start and pages of each.
    lazy: Vec<(u32, Vec<(u64, u64)>)>,
    /// The tasks that stand still.
    stopped: Stopped,
    /// None as long as the pages are in the stopped tasks.
    pipes: Option<Pipes>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stopped {
    /// Each of them, and whether it was stopped before it was frozen.
    tasks: Vec<(Identity, bool)>,
    /// CRIU, which holds them.
    criu: Identity,
    /// See [`NetworkLock::reusing`].
    reusing: BTreeSet<String>,
    /// The cgroup that the fence froze.
    cgroup: Option<PathBuf>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Pipes {
    holder: Identity,
    chunk_pages: u64,
    /// The holder's number of each pipe.
    numbers: Vec<Option<i32>>,
}

impl Description {
    fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        write_whole(path, &serde_json::to_vec(self)?)
    }

    /// Whether the pages are still where it says. Tasks that CRIU has just let go of have to wake up before they stop.
    fn is_held(&self) -> bool {
        match &self.pipes {
            Some(pipes) => pipes.holder.is_there(),
            None => {
                let settled = || self.stopped.stand_still() || self.is_over();
                comes_true(limits::STOP_PATIENCE, settled) && !self.is_over()
            }
        }
    }

    /// Whether they are nowhere any more.
    fn is_over(&self) -> bool {
        match &self.pipes {
            Some(pipes) => !pipes.holder.is_there(),
            None => !self.stopped.tasks.iter().all(|(task, _)| task.lives()),
        }
    }

    /// Id and secret.
    #[must_use]
    pub const fn session(&self) -> (SessionId, SessionSecret) {
        (SessionId(self.session), SessionSecret(self.secret))
    }

    /// The lazy pages.
    fn map(&self) -> io::Result<LazyMap> {
        let runs = |runs: &[(u64, u64)]| {
            runs.iter().filter_map(|(at, pages)| PageRun::new(ImageAddr::containing(*at), *pages)).collect()
        };
        let map = LazyMap::new(self.lazy.iter().map(|(task, list)| (TaskId(*task), runs(list))));
        map.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

/// Whom pages are for.
#[derive(Clone, Debug)]
pub struct Session {
    /// Id and secret.
    pub session: (SessionId, SessionSecret),
    /// Where the destination listens.
    pub to: String,
    /// The options of the link.
    pub link: Vec<String>,
    /// How many fault lanes and push lanes.
    pub lanes: LaneCounts,
    /// Root of the tree.
    pub root: u32,
    /// The process's directory for this move.
    pub work_dir: PathBuf,
}

/// Tasks behind their fence, and what else a roll-back undoes.
#[derive(Clone, Copy, Debug)]
pub struct Fenced<'a> {
    /// Who they are.
    pub tree: &'a ProcessTree,
    /// The fence.
    pub fence: &'a Fence,
    /// CRIU's lock around their connections.
    pub network: &'a NetworkLock,
    /// CRIU.
    pub dump: &'a Dump,
}

/// What was left about a session; locked as long as this process serves it.
#[derive(Debug)]
pub struct Word {
    _lock: Flock<File>,
    path: PathBuf,
    description: Description,
}

impl Word {
    /// Says that the pages of `map` are in the stopped tasks.
    ///
    /// # Errors
    /// What the file system says, or /proc.
    pub fn leave(dir: &StateDir, of: Session, map: &LazyMap, tasks: Fenced<'_>) -> io::Result<Self> {
        let (id, secret) = of.session;
        let lock = lock(&dir.file(id, LOCK))?;
        let living = tasks.tree.tasks.iter().filter(|task| !has_ended(task.pid));
        let stopped = Stopped {
            tasks: living
                .map(|task| Ok((Identity::of(task.pid)?, task.was_stopped)))
                .collect::<io::Result<_>>()?,
            criu: Identity::of(tasks.dump.pid())?,
            reusing: tasks.network.reusing().clone(),
            cgroup: tasks.fence.cgroup().map(Path::to_owned),
        };
        let runs = |task: &TaskMap| {
            task.runs.iter().map(|indexed| (indexed.run.start.get(), indexed.run.pages)).collect()
        };
        let description = Description {
            session: id.0,
            secret: secret.0,
            to: of.to,
            link: of.link,
            lanes: of.lanes,
            root: of.root,
            work_dir: of.work_dir,
            generation: 0,
            lazy: map.tasks().iter().map(|task| (task.id.0, runs(task))).collect(),
            stopped,
            pipes: None,
        };
        let path = dir.file(id, PAGES);
        description.write(&path)?;
        Ok(Self { _lock: lock, path, description })
    }

    /// Says that the destination may run from here on, and that `holder` keeps CRIU from ending.
    ///
    /// # Errors
    /// What the file system says, or /proc.
    pub fn promise(&self, holder: &Holder) -> io::Result<()> {
        fs::write(self.path.with_extension(COMMIT), serde_json::to_vec(&Identity::of(holder.pid)?)?)
    }

    /// Who holds CRIU, if anything was promised.
    fn promised(&self) -> io::Result<Option<Identity>> {
        match fs::read(self.path.with_extension(COMMIT)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Says that the pages are in the pipes of `store`, which `holder` has as well.
    ///
    /// # Errors
    /// What the file system says, or /proc.
    pub fn pages_are_in(&mut self, store: &PipeStore, holder: &Holder) -> io::Result<()> {
        self.description.pipes = Some(Pipes {
            holder: Identity::of(holder.pid)?,
            chunk_pages: store.chunk_pages(),
            numbers: store
                .with_pipes(|pipes| pipes.iter().map(|pipe| pipe.map(|fd| fd.as_raw_fd())).collect()),
        });
        self.description.write(&self.path)
    }

    /// The session is over.
    pub fn remove(self) {
        remove(&self.path);
    }
}

/// Removes what was left for one session; by who has its lock.
fn remove(path: &Path) {
    // The promise behind what it is about: without it a successor would take the tasks for unpromised.
    for kind in [PAGES, COMMIT, LOCK] {
        let _ = fs::remove_file(path.with_extension(kind));
    }
}

/// Looks until `condition` holds, for what the kernel tells nobody about; false if it does not in time.
fn comes_true(limit: Duration, condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

/// A file that only one process has.
fn lock(path: &Path) -> io::Result<Flock<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

/// The session that a task of `tree` belongs to, if one has not ended: nobody else may move it, or let it run. What sources have
/// left in `dir` about tasks that run again is removed, and about pages that are not there any more: nobody else would, if nobody
/// resumes.
pub fn claimed(dir: &StateDir, tree: &ProcessTree) -> Option<SessionId> {
    let mut claimed = None;
    for path in dir.files(PAGES).unwrap_or_default() {
        let Ok(description) = Description::read(&path) else { continue };
        let is_one = |task: &Task| Identity::of(task.pid).is_ok_and(|task| description.stopped.has(task));
        let of_tree = tree.tasks.iter().any(is_one);
        match lock(&path.with_extension(LOCK)) {
            Ok(_lock) if description.is_over() || of_tree && !description.is_held() => remove(&path),
            _ if of_tree => claimed = Some(description.session().0),
            _ => {}
        }
    }
    claimed
}

/// A session whose source has ended.
#[derive(Debug)]
pub struct Orphan(Word);

/// Every session in `dir` that nobody serves. What was left about pages that are not there any more is removed.
///
/// # Errors
/// The errno of reading the directory.
pub fn find(dir: &StateDir) -> io::Result<Vec<Orphan>> {
    let mut found = Vec::new();
    for path in dir.files(PAGES)? {
        // Served by somebody.
        let Ok(lock) = lock(&path.with_extension(LOCK)) else { continue };
        match Description::read(&path) {
            Ok(description) if description.is_held() => {
                found.push(Orphan(Word { _lock: lock, path, description }));
            }
            Ok(description) if description.is_over() => remove(&path),
            // Somebody has continued them.
            Ok(_) => {}
            Err(error) => tracing::warn!("{} cannot be read: {error}", path.display()),
        }
    }
    Ok(found)
}

/// What a source that has ended has left.
#[derive(Debug)]
pub struct Taken {
    /// The word of it, which is this process's now.
    pub word: Word,
    /// The lazy pages.
    pub map: Arc<LazyMap>,
    /// The stopped tasks, if they are still there.
    pub tasks: Option<TakenTasks>,
    /// The pages in pipes, and who keeps them; else they are in the tasks.
    pub pipes: Option<(Arc<PipeStore>, Holder)>,
    /// Whether the destination may run.
    pub promised: bool,
    /// How many processes have served the session.
    pub generation: u16,
    /// Images and logs.
    pub dir: WorkDir,
}

/// Tasks that stand still and that nobody holds any more.
#[derive(Debug)]
pub struct TakenTasks {
    /// Who they are.
    pub tree: ProcessTree,
    /// The fence around them.
    pub fence: Fence,
    /// CRIU's lock around their connections.
    pub network: NetworkLock,
}

impl Orphan {
    /// What was left behind.
    #[must_use]
    pub const fn description(&self) -> &Description {
        &self.0.description
    }

    /// Takes it over. Pipes stay in their holder as well; CRIU is ended and leaves the tasks stopped.
    ///
    /// # Errors
    /// What the kernel or the file system say.
    pub fn take(self) -> io::Result<Taken> {
        let Self(mut word) = self;
        let description = &mut word.description;
        description.generation = description.generation.wrapping_add(1);
        description.write(&word.path)?;
        let map = Arc::new(description.map()?);
        let mut pipes = None;
        if let Some(Pipes { holder, chunk_pages, numbers }) = &description.pipes {
            let handle = holder.open().ok_or(io::ErrorKind::NotFound)?;
            let taken = numbers.iter().map(|pipe| pipe.map(|number| handle.take(number)).transpose());
            let store = PipeStore::adopt(map.clone(), *chunk_pages, taken.collect::<io::Result<_>>()?);
            let store = store.map_err(io::Error::other)?;
            pipes = Some((Arc::new(store), Holder { pid: holder.pid, handle }));
        }
        let (dir, generation) = (WorkDir::adopt(description.work_dir.clone()), description.generation);
        let promised = word.promised()?;
        let description = &word.description;
        let tasks = description.stopped.take(description.root, promised)?;
        Ok(Taken { word, map, tasks, pipes, promised: promised.is_some(), generation, dir })
    }
}

impl Stopped {
    fn has(&self, task: Identity) -> bool {
        self.tasks.iter().any(|(known, _)| *known == task)
    }

    fn fence(&self) -> Fence {
        Fence::standing(self.cgroup.clone())
    }

    /// Whether they do: tasks that run again have another memory.
    fn stand_still(&self) -> bool {
        let frozen = self.fence().is_frozen();
        let stands = |pid| matches!(state(pid), Ok(state) if "Tt".contains(state) || frozen && state != 'Z');
        self.tasks.iter().all(|(task, _)| task.is_there() && stands(task.pid))
    }

    /// Takes the tasks from CRIU, which perhaps somebody keeps from ending; nothing if they are gone.
    fn take(&self, root: u32, kept_by: Option<Identity>) -> io::Result<Option<TakenTasks>> {
        if !self.tasks.iter().any(|(task, _)| task.pid == root && task.lives()) {
            return Ok(None);
        }
        let mut tree = ProcessTree::of(root)?;
        for task in &mut tree.tasks {
            let known = self.tasks.iter().find(|(known, _)| known.pid == task.pid);
            task.was_stopped = known.is_some_and(|(_, was_stopped)| *was_stopped);
        }
        if let Some(criu) = self.criu.open() {
            // One that nobody keeps is about to end. The other is killed rather than told: what fails ends its network's lock.
            let ended = || waiting::readable_within(criu.as_fd(), limits::CRIU_CLOSE_TIMEOUT);
            if kept_by.is_some() || !ended()? {
                criu.signal(SIGKILL)?;
                ended()?;
            }
        }
        if let Some((pid, handle)) = kept_by.and_then(|holder| Some((holder.pid, holder.open()?))) {
            Holder { pid, handle }.end();
        }
        let fence = self.fence();
        // The stop that the fence has pending takes effect when nobody traces a task any more.
        let stopped =
            || tree.tasks.iter().all(|task| has_ended(task.pid) || matches!(state(task.pid), Ok('T')));
        if !comes_true(limits::CRIU_CLOSE_TIMEOUT, || fence.is_frozen() || stopped()) {
            return Err(io::Error::other("the tasks do not stand still"));
        }
        let network = NetworkLock::resumed(&tree, self.reusing.clone())?;
        Ok(Some(TakenTasks { tree, fence, network }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_began_once() {
        let own = Identity::of(std::process::id()).unwrap();
        assert!(own.began > 0 && own.is_there() && own.open().is_some());
        let before = Identity { began: own.began - 1, ..own };
        assert!(!before.is_there() && before.open().is_none());
        assert!(Identity::of(u32::MAX).is_err());
    }
}
