//! Moves whose daemon has ended: what is known of them, and how they are put together again.
//!
//! The keeper has every userfaultfd, the journal of what the tasks did to their address spaces, and a description of the
//! move. Nothing in it says what was installed and not acknowledged: the source has those pages, and sends them again.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use host::state_dir::StateDir;
use kernel::uffd::Uffd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use protocol::lazy_map::LazyMap;
use protocol::units::{ImageAddr, PageRun, TaskAddr, TaskId};
use protocol::wire::hello::{SessionId, SessionSecret};
use serde::{Deserialize, Serialize};

use crate::barrier::{self, Word};
use crate::journal::{Change, Entry, Journal};
use crate::keeper::{Info, KeeperHandle, Owner, Stranger};
use crate::limits;
use crate::pages::{Installer, SpaceId, What};
use crate::tree::Tree;

/// Where keepers are found, unless the operator says otherwise.
pub const DEFAULT_DIR: &str = "/run/uffd-daemon";
/// The kind of file that a keeper listens at.
pub const SOCKET: &str = "sock";

/// What whoever takes over has to know of a move and cannot find out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// The session's id.
    pub session: [u8; 16],
    /// Its secret: the file that this is in belongs to keeper and daemon alone.
    secret: [u8; 16],
    /// Where the daemon listened: there the source dials.
    pub listen: String,
    /// The options of its link, as the command line had them.
    pub link: Vec<String>,
    /// The /proc in which the tasks have the pids of their images.
    pub proc_dir: PathBuf,
    /// The daemon's directory for this move.
    pub work_dir: PathBuf,
    /// The lazy runs of each task: its pid, and start and pages of each.
    tasks: Vec<(u32, Vec<(u64, u64)>)>,
}

impl Description {
    /// Of a move.
    #[must_use]
    pub fn new(
        (session, secret): (SessionId, SessionSecret),
        (listen, link): (String, Vec<String>),
        (proc_dir, work_dir): (PathBuf, PathBuf),
        map: &LazyMap,
    ) -> Self {
        let runs = |task: &protocol::lazy_map::TaskMap| {
            task.runs.iter().map(|indexed| (indexed.run.start.get(), indexed.run.pages)).collect()
        };
        let tasks = map.tasks().iter().map(|task| (task.id.0, runs(task))).collect();
        Self { session: session.0, secret: secret.0, listen, link, proc_dir, work_dir, tasks }
    }

    /// Puts it into a file without a name.
    ///
    /// # Errors
    /// The errno of making and writing it.
    pub fn write(&self) -> io::Result<File> {
        let mut file = File::from(memfd_create(c"postcopy-session", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&serde_json::to_vec(self)?)?;
        Ok(file)
    }

    /// By position: the keeper gives everybody the same open file, and several may read at once.
    fn read(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len().min(limits::DESCRIPTION_MAX);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(serde_json::from_slice(&bytes)?)
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

/// A move that a keeper knows of.
#[derive(Debug)]
pub struct Found {
    path: PathBuf,
    /// What the keeper says about itself.
    pub info: Info,
    /// The move.
    pub description: Description,
}

/// Why a move cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The keeper cannot be asked.
    #[error("cannot talk to the keeper at {path}: {source}", path = .path.display())]
    Keeper {
        /// Where it listens.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The keeper ended while it was asked.
    #[error("its keeper has just ended, as it does when none of its tasks is left")]
    Gone,
    /// A daemon serves it.
    #[error("a daemon serves this move: end it first")]
    Attended,
    /// The daemon ended before the tasks ran: CRIU kills what it restored.
    #[error("its tasks never ran here: the source rolls back, once `uffd-daemon serve` listens there again")]
    NeverRan,
    /// The daemon ended while CRIU was to let the tasks run, and CRIU was killed as well.
    #[error(
        "its tasks were about to run when its daemon ended, and criu has not said that they did: if they are gone, let those of the \
         source run; if they are there, decide which copy counts"
    )]
    Unknown,
    /// The tasks changed their address spaces too often.
    #[error(
        "its tasks changed their mappings more often than is recorded: what belongs where is not known any more; `uffd-daemon abandon` ends \
         the wait"
    )]
    Forgotten,
}

/// Every move that a keeper knows of. Sockets of keepers that have ended are removed.
///
/// # Errors
/// The errno of reading the directory.
pub fn find(dir: &StateDir) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for path in dir.files(SOCKET)? {
        match ask(&path) {
            Ok((info, description)) => found.push(Found { path, info, description }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(&path);
            }
            Err(error) => tracing::warn!("the keeper at {} does not answer: {error}", path.display()),
        }
    }
    Ok(found)
}

fn ask(path: &Path) -> io::Result<(Info, Description)> {
    let info = Stranger::find(path)?.info()?;
    let description = Description::read(&info.description)?;
    Ok((info, description))
}

impl Found {
    /// Pages that were not acknowledged, and how many there are.
    ///
    /// # Errors
    /// The errno of reading the journal.
    pub fn missing(&self) -> io::Result<(u64, u64)> {
        let journal = self.journal()?;
        let acknowledged = journal.acknowledged();
        Ok((acknowledged.len() - acknowledged.count(), acknowledged.len()))
    }

    fn journal(&self) -> io::Result<Journal> {
        Journal::open(&self.info.journal, self.description.map()?.pages())
    }

    /// Since when nobody serves it; nothing if a daemon does.
    #[must_use]
    pub fn orphaned_since(&self) -> Option<SystemTime> {
        (!self.info.attended).then_some(self.info.since)
    }

    /// Waits until its daemon has let go of it; `None` if that one does not.
    #[must_use]
    pub fn left_alone(mut self, patience: Duration) -> Option<Self> {
        let deadline = Instant::now() + patience;
        while self.info.attended && Instant::now() < deadline {
            std::thread::sleep(limits::PORT_LOOK);
            (self.info, self.description) = ask(&self.path).ok()?;
        }
        (!self.info.attended).then_some(self)
    }

    /// Takes it over: this process is the keeper's daemon from here on.
    ///
    /// # Errors
    /// [`TakeoverError`].
    pub fn take(self) -> Result<Taken, TakeoverError> {
        let Self { path, description, .. } = self;
        let broken = |source| TakeoverError::Keeper { path: path.clone(), source };
        let map = description.map().map_err(broken)?;
        let journal = Journal::open(&self.info.journal, map.pages()).map_err(broken)?;
        if !journal.is_running() {
            return Err(TakeoverError::NeverRan);
        }
        let changes = journal.changes().ok_or(TakeoverError::Forgotten)?;
        let taken = Stranger::find(&path).and_then(Stranger::take).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => TakeoverError::Gone,
            _ => broken(error),
        })?;
        let Some((_, held, keeper)) = taken else { return Err(TakeoverError::Attended) };
        // The source has not let go of its tasks unless they ran here. Tasks that CRIU has killed instead have ended, too,
        // and must not be taken for some that need no page any more.
        let held: Vec<(Owner, Uffd)> =
            held.into_iter().map(|(owner, uffd)| (owner, Uffd::from(uffd))).collect();
        wait_run(&journal, &description.work_dir, &held)?;
        let spaces = held.into_iter().filter(|(owner, _)| *owner != Owner::NOBODY);
        let spaces =
            spaces.map(|(owner, uffd)| ((owner.family as usize, owner.space), Arc::new(uffd))).collect();
        let tree = Tree::new(&map);
        let half_read = journal.half_read();
        let served = rebuild(&tree, spaces, &changes, &journal);
        for task in half_read.into_iter().filter_map(|family| map.tasks().get(family)) {
            tracing::error!(
                task = %task.id,
                "the daemon before this one was killed between reading an event of this task and recording it: memory that \
                 it dropped, moved or shared with a child in that moment may be wrong"
            );
        }
        tree.keep_journal(journal);
        Ok(Taken { description, map, tree, served, keeper })
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Description { listen, .. } = &self.description;
        let (id, _) = self.description.session();
        write!(f, "{id}: at {listen}, keeper {}, ", self.info.pid)?;
        match self.missing() {
            Ok((missing, pages)) => write!(f, "{missing} of {pages} pages not acknowledged, ")?,
            Err(error) => write!(f, "journal not readable ({error}), ")?,
        }
        let Some(since) = self.orphaned_since() else {
            write!(f, "served by a daemon")?;
            let Some((lost, limit)) = self.journal().ok().and_then(|journal| journal.paused()) else {
                return Ok(());
            };
            write!(f, ", paused for {} s: its link is lost, ", lost.as_secs())?;
            return match limit {
                Some(limit) => {
                    write!(f, "the source is waited for {} s more", limit.saturating_sub(lost).as_secs())
                }
                None => write!(f, "the source is waited for"),
            };
        };
        let seconds = since.elapsed().unwrap_or_default().as_secs();
        write!(f, "paused for {seconds} s: its daemon has ended; `uffd-daemon takeover` goes on")
    }
}

/// A space with its userfaultfd.
#[derive(Clone, Debug)]
pub struct ServedSpace<I = Arc<Uffd>> {
    /// Position of the family.
    pub family: usize,
    /// Which of its spaces.
    pub space: SpaceId,
    /// Its userfaultfd.
    pub uffd: I,
}

/// A move that was taken over.
#[derive(Debug)]
pub struct Taken {
    /// The move.
    pub description: Description,
    /// Its lazy pages.
    pub map: LazyMap,
    /// Its address spaces as they are.
    pub tree: Arc<Tree>,
    /// Their userfaultfds.
    pub served: Vec<ServedSpace>,
    /// Who goes on keeping them.
    pub keeper: KeeperHandle,
}

impl Taken {
    /// Has every thread that waits for a page report again: what the daemon before this one had read is forgotten.
    pub fn wake_all(&self) {
        wake_all(&self.served);
    }
}

/// Has every thread that waits for a page of these report again.
pub fn wake_all<I: Installer>(served: &[ServedSpace<I>]) {
    for served in served {
        // The lowest address that anything is mapped at, and all that a task can have.
        const LOWEST: u64 = 64 << 10;
        const BEHIND: u64 = 0x7fff_ffff_f000;
        if let Err(error) = served.uffd.wake(TaskAddr::containing(LOWEST), BEHIND - LOWEST) {
            tracing::debug!("cannot wake: {error}");
        }
    }
}

/// Waits until the tasks run, or have run until they ended, for which CRIU may need a moment; on the word of a daemon that
/// saw it, or of CRIU itself.
fn wait_run(journal: &Journal, dir: &Path, held: &[(Owner, Uffd)]) -> Result<(), TakeoverError> {
    let mut deadline = Instant::now() + limits::RESUME_PATIENCE;
    while !journal.has_run() {
        // Looked at before CRIU's word, which is there if they ended by themselves; that it has failed may take a moment more.
        let ended = held.iter().all(|(_, uffd)| uffd.is_orphaned());
        if ended {
            deadline = deadline.min(Instant::now() + limits::REASON_PATIENCE);
        }
        let late = Instant::now() > deadline;
        match barrier::word(dir) {
            Word::Resumed => journal.set_run(),
            // CRIU was killed: the kernel has let them go.
            Word::Resuming if late && !ended => journal.set_run(),
            Word::Failed => return Err(TakeoverError::NeverRan),
            Word::Resuming | Word::None if late => return Err(TakeoverError::Unknown),
            Word::Resuming | Word::None => std::thread::sleep(limits::WORD_LOOK),
        }
    }
    Ok(())
}

/// Does again to the address spaces what the tasks did to them. The keeper has the userfaultfds of tasks that have
/// ended as well; a space without one cannot be served.
pub fn rebuild<I: Installer + Clone>(
    tree: &Tree<I>,
    mut uffds: HashMap<(usize, u64), I>,
    changes: &[Change],
    journal: &Journal,
) -> Vec<ServedSpace<I>> {
    let mut served = Vec::new();
    let mut serve = |family, space: SpaceId, uffd: Option<I>| {
        served.extend(uffd.map(|uffd| ServedSpace { family, space, uffd }));
    };
    for family in 0..tree.len() {
        let uffd = uffds.remove(&(family, 0));
        let space = tree.lock(family).restored_again(uffd.clone());
        serve(family, space, uffd);
    }
    for Change { family, space, entry } in changes.iter().copied().filter(|change| change.family < tree.len())
    {
        let mut spaces = tree.lock(family);
        match entry {
            Entry::Ordered(order) => spaces.rested_in_order(space, order),
            Entry::Changed { what, first } => {
                if first {
                    spaces.rested_as_read(space);
                }
                match what {
                    What::Forked { child } => {
                        let uffd = uffds.remove(&(family, child.number()));
                        let child = spaces.forked_again(space, uffd.clone());
                        if spaces.space(child).is_some() {
                            serve(family, child, uffd);
                        }
                    }
                    what => spaces.changed(space, what),
                }
            }
        }
    }
    let acknowledged = journal.acknowledged();
    for family in 0..tree.len() {
        tree.lock(family).acknowledged_before(&acknowledged);
    }
    served
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};

    use super::*;

    #[test]
    fn reading_a_description_leaves_the_offset_that_others_share() {
        let map = LazyMap::new(std::iter::empty::<(TaskId, Vec<PageRun>)>()).unwrap();
        let (id, secret) = (SessionId([7; 16]), SessionSecret([9; 16]));
        let description =
            Description::new((id, secret), ("[::1]:1".into(), Vec::new()), Default::default(), &map);
        let mut file = description.write().unwrap();
        file.seek(SeekFrom::Start(5)).unwrap();
        let read = Description::read(&file).unwrap();
        assert_eq!((read.session(), read.listen), ((id, secret), description.listen));
        assert_eq!(file.stream_position().unwrap(), 5);
    }
}
