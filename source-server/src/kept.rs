//! What a source leaves behind for its successor once its tasks are killed: a holder with every pipe of pages, and a file
//! that says what they are and whom they are for.
//!
//! ```text
//!   source-server ──fork──▶ postcopy-hold: the pipes, nothing else
//!        └──▶ STATE-DIR/SESSION.pages: id and secret, where to dial, which pipe has which pages
//! ```
//!
//! The file is locked by who serves the session. Without that lock it belongs to `source-server resume`, which takes
//! duplicates of the pipes out of the holder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use host::state_dir::StateDir;
use host::workdir::WorkDir;
use kernel::holder::fork_holder;
use kernel::pidfd::PidFd;
use nix::fcntl::{Flock, FlockArg};
use protocol::lazy_map::{LazyMap, TaskMap};
use protocol::units::{ImageAddr, PageRun, TaskId};
use protocol::wire::hello::{SessionId, SessionSecret};
use serde::{Deserialize, Serialize};

use crate::lanes::LaneCounts;
use crate::store::PipeStore;

/// Where the state of moves is, unless the operator says otherwise.
pub const DEFAULT_DIR: &str = "/run/source-server";
/// The kind of file that says what a holder holds.
const PAGES: &str = "pages";
/// The kind of file that is locked by who serves a session.
const LOCK: &str = "lock";

/// A process that holds pipes.
#[derive(Debug)]
pub struct Holder {
    pid: u32,
    handle: PidFd,
    /// Locked as long as this process serves the session.
    state: Option<(Flock<File>, PathBuf)>,
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
    pub generation: u16,
    chunk_pages: u64,
    /// The lazy runs of each task: its pid, and start and pages of each.
    tasks: Vec<(u32, Vec<(u64, u64)>)>,
    /// The holder's number of each pipe.
    pipes: Vec<Option<i32>>,
    holder: u32,
    /// When the holder began, in the kernel's ticks: a pid may be used again.
    began: u64,
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

impl Holder {
    /// Forks a holder for the pipes of `store`.
    ///
    /// # Errors
    /// The errno of `fork(2)`.
    pub fn fork(store: Option<&PipeStore>) -> io::Result<Self> {
        const NAME: &std::ffi::CStr = c"postcopy-hold";
        let pid = match store {
            Some(store) => store
                .with_pipes(|pipes| fork_holder(NAME, &pipes.iter().flatten().copied().collect::<Vec<_>>())),
            None => fork_holder(NAME, &[]),
        }?;
        Ok(Self { pid, handle: PidFd::open(pid)?, state: None })
    }

    /// Its pid.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Says what it holds, for a successor of this process.
    ///
    /// # Errors
    /// What the file system says.
    pub fn describe(
        &mut self,
        dir: &StateDir,
        of: &Session,
        map: &LazyMap,
        store: &PipeStore,
    ) -> io::Result<()> {
        let lock = lock(&dir.file(of.session.0, LOCK))?;
        let runs = |task: &TaskMap| {
            task.runs.iter().map(|indexed| (indexed.run.start.get(), indexed.run.pages)).collect()
        };
        let description = Description {
            session: of.session.0.0,
            secret: of.session.1.0,
            to: of.to.clone(),
            link: of.link.clone(),
            lanes: of.lanes,
            root: of.root,
            work_dir: of.work_dir.clone(),
            generation: 0,
            chunk_pages: crate::store::PageStore::chunk_pages(store),
            tasks: map.tasks().iter().map(|task| (task.id.0, runs(task))).collect(),
            pipes: store.with_pipes(|pipes| {
                pipes.iter().map(|pipe| pipe.map(|fd| std::os::fd::AsRawFd::as_raw_fd(&fd))).collect()
            }),
            holder: self.pid,
            began: began(self.pid)?,
        };
        let path = dir.file(of.session.0, PAGES);
        description.write(&path)?;
        self.state = Some((lock, path));
        Ok(())
    }

    /// Ends it: nobody needs its pages any more.
    pub fn dismiss(self) {
        let _ = self.handle.signal(nix::libc::SIGKILL);
        // One that another process has forked is reaped by somebody else.
        if let Ok(pid) = i32::try_from(self.pid) {
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
        }
        if let Some((_lock, path)) = self.state {
            remove(&path);
        }
    }
}

/// Removes what was left for one session; by who has its lock.
fn remove(path: &Path) {
    let _ = fs::remove_file(path);
    let _ = fs::remove_file(path.with_extension(LOCK));
}

/// A file that only one process has.
fn lock(path: &Path) -> io::Result<Flock<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

/// When a process began, in ticks since the host did.
fn began(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which may hold anything, the first field is the third.
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let field = behind.split_whitespace().nth(19).and_then(|field| field.parse().ok());
    field.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

impl Description {
    fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }

    /// Whether the holder is still there.
    fn is_held(&self) -> bool {
        began(self.holder).is_ok_and(|began| began == self.began)
    }

    /// Id and secret.
    #[must_use]
    pub const fn session(&self) -> (SessionId, SessionSecret) {
        (SessionId(self.session), SessionSecret(self.secret))
    }

    /// The lazy pages.
    ///
    /// # Errors
    /// `InvalidData` if they make no map.
    pub fn map(&self) -> io::Result<LazyMap> {
        let runs = |runs: &[(u64, u64)]| {
            runs.iter().filter_map(|(at, pages)| PageRun::new(ImageAddr::containing(*at), *pages)).collect()
        };
        let map = LazyMap::new(self.tasks.iter().map(|(task, list)| (TaskId(*task), runs(list))));
        map.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

/// A session whose source has ended.
#[derive(Debug)]
pub struct Orphan {
    /// What it left behind.
    pub description: Description,
    lock: Flock<File>,
    path: PathBuf,
}

/// Removes what sources have left in `dir` whose holders have ended since; nobody else would, if nobody resumes.
pub fn sweep(dir: &StateDir) {
    for path in dir.files(PAGES).unwrap_or_default() {
        let read = fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<Description>(&bytes)?));
        if !read.is_ok_and(|description| !description.is_held()) {
            continue;
        }
        if let Ok(_lock) = lock(&path.with_extension(LOCK)) {
            remove(&path);
        }
    }
}

/// Every session in `dir` that nobody serves. What holders that have ended have left is removed.
///
/// # Errors
/// The errno of reading the directory.
pub fn find(dir: &StateDir) -> io::Result<Vec<Orphan>> {
    let mut found = Vec::new();
    for path in dir.files(PAGES)? {
        // Served by somebody.
        let Ok(lock) = lock(&path.with_extension(LOCK)) else { continue };
        match fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<Description>(&bytes)?)) {
            Ok(description) if description.is_held() => {
                found.push(Orphan { description, lock, path });
            }
            Ok(_) => remove(&path),
            Err(error) => tracing::warn!("{} cannot be read: {error}", path.display()),
        }
    }
    Ok(found)
}

impl Orphan {
    /// Takes the pages over: they stay in the holder as well.
    ///
    /// # Errors
    /// What the kernel or the file system say.
    pub fn take(mut self) -> io::Result<(Description, Arc<LazyMap>, Arc<PipeStore>, Holder)> {
        let handle = PidFd::open(self.description.holder)?;
        let map = Arc::new(self.description.map()?);
        let pipes =
            self.description.pipes.iter().map(|pipe| pipe.map(|number| handle.take(number)).transpose());
        let pipes = pipes.collect::<io::Result<Vec<_>>>()?;
        let store =
            PipeStore::adopt(map.clone(), self.description.chunk_pages, pipes).map_err(io::Error::other)?;
        // Nobody else removes it.
        drop(WorkDir::adopt(std::mem::take(&mut self.description.work_dir)));
        self.description.generation = self.description.generation.wrapping_add(1);
        self.description.write(&self.path)?;
        let holder = Holder { pid: self.description.holder, handle, state: Some((self.lock, self.path)) };
        Ok((self.description, map, Arc::new(store), holder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_began_once() {
        let own = began(std::process::id()).unwrap();
        assert!(own > 0 && began(std::process::id()).unwrap() == own);
        assert!(began(u32::MAX).is_err());
    }
}
