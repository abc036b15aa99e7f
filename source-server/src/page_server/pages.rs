//! Where the pages come from: an image directory, or tasks that stand still.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::thread;

use protocol::criu::checkpoint::{Checkpoint, TaskImages};
use protocol::criu::pages::{Location, PageReader, PagesError};
use protocol::units::{PAGE_SIZE, PageRun, TaskId};

use super::error::{PageServerError, with_causes};
use super::limits;
use crate::process::{self, ProcessTree};
use crate::store::TaskMemory;

/// Pages to serve.
#[derive(Debug)]
pub struct Pages(Source);

#[derive(Debug)]
enum Source {
    Images(HashMap<TaskId, PageReader>),
    Process { tree: ProcessTree, memory: TaskMemory },
}

impl Pages {
    /// The pages of a CRIU image directory and its parents.
    ///
    /// # Errors
    /// [`PageServerError`] if images are missing or damaged, or do not hold what restore would ask for.
    pub fn of_images(dir: &Path) -> Result<Self, PageServerError> {
        let checkpoint = Checkpoint::open(dir).map_err(PageServerError::Images)?;
        let mut readers = HashMap::new();
        for task in checkpoint.tasks.iter().filter(|task| task.alive) {
            let reader = PageReader::open(dir, task.id)
                .map_err(|source| PageServerError::TaskPages { task: task.id, source })?;
            check_complete(task, &reader)?;
            readers.insert(task.id, reader);
        }
        tracing::info!(tasks = readers.len(), lazy_pages = checkpoint.lazy_pages(), "images opened");
        Ok(Self(Source::Images(readers)))
    }

    /// The memory of a process and its descendants, which must stand still: stopped, or traced by a `criu dump`
    /// that waits.
    ///
    /// # Errors
    /// [`PageServerError`] if there is no such process, if one of the tree runs, or if it cannot be read.
    pub fn of_process(root: u32) -> Result<Self, PageServerError> {
        let tree = standing_tree(root)?;
        let failed = |source| PageServerError::Process { pid: root, source };
        // A zombie has no memory, and nobody asks for it.
        let live: Vec<_> = tree.tasks.iter().filter(|task| !process::has_ended(task.pid)).collect();
        let memory = TaskMemory::open(live.iter().map(|task| (task.id, task.pid))).map_err(failed)?;
        tracing::info!(tasks = live.len(), bytes = tree.memory_bytes(), "memory of the process opened");
        Ok(Self(Source::Process { tree, memory }))
    }

    /// Reads pages from `run`'s start on into the front of `buf`: as many as follow each other, at most those of
    /// `run` and those that fit. Gives how many, at least one.
    ///
    /// # Errors
    /// A sentence that says why already the first cannot be had.
    pub(super) fn read(&self, task: TaskId, run: PageRun, buf: &mut [u8]) -> Result<u64, String> {
        let wanted = usize::try_from(run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
        let len = wanted.min(buf.len());
        let buf = &mut buf[..len];
        let pages = match &self.0 {
            Source::Images(readers) => {
                let reader = readers.get(&task).ok_or("the images have no such task")?;
                reader.read(run.start, buf).map_err(|error| with_causes(&error))?
            }
            Source::Process { memory, .. } => {
                if !memory.has(task) {
                    return Err("the tree has no such task".into());
                }
                memory.read(task, run.start, buf).map_err(|error| error.to_string())? / PAGE_SIZE
            }
        };
        if pages == 0 { Err("no page of it could be read".into()) } else { Ok(pages as u64) }
    }

    /// Whether the pages can change under the server, so that [`Pages::check_still`] is worth calling.
    pub(super) const fn may_change(&self) -> bool {
        matches!(self.0, Source::Process { .. })
    }

    /// Whether every task still stands still.
    ///
    /// # Errors
    /// [`PageServerError::NotStill`] or [`PageServerError::Ended`].
    pub(super) fn check_still(&self) -> Result<(), PageServerError> {
        let Source::Process { tree, memory } = &self.0 else { return Ok(()) };
        let check = || {
            for task in tree.tasks.iter().filter(|task| memory.has(task.id)) {
                if process::has_ended(task.pid) {
                    return Err(PageServerError::Ended(task.pid));
                }
                if !matches!(running_thread(task.pid), Ok(None)) {
                    return Err(PageServerError::NotStill(task.pid));
                }
            }
            Ok(())
        };
        check().or_else(|_| {
            thread::sleep(limits::STILL_SECOND_LOOK);
            check()
        })
    }
}

/// Checks that the images hold every page that restore leaves to a daemon.
fn check_complete(task: &TaskImages, reader: &PageReader) -> Result<(), PageServerError> {
    let mut left_on_source = 0_u64;
    for run in task.lazy_runs() {
        let mut at = run.start;
        while at < run.end() {
            let location = reader.index().locate(at);
            let pages = match location {
                Location::Data { contiguous_pages, .. } => contiguous_pages,
                Location::LazyElsewhere { contiguous_pages } => {
                    left_on_source += contiguous_pages.min(run.end().pages_since(at));
                    contiguous_pages
                }
                Location::Absent | Location::Missing { .. } => {
                    let source = PagesError::NotInImages { addr: at, location };
                    return Err(PageServerError::TaskPages { task: task.id, source });
                }
            };
            at = at.checked_add(pages).unwrap_or(run.end());
        }
    }
    match left_on_source {
        0 => Ok(()),
        pages => Err(PageServerError::LeftOnSource { task: task.id, pages }),
    }
}

/// Lists the tree below `root` until nothing of it runs and nothing was missed.
fn standing_tree(root: u32) -> Result<ProcessTree, PageServerError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => PageServerError::NoProcess(root),
        _ => PageServerError::Process { pid: root, source },
    };
    let mut before = Vec::new();
    for _ in 0..limits::TREE_LISTINGS_MAX {
        let tree = ProcessTree::of(root).map_err(failed)?;
        for task in &tree.tasks {
            if running_thread(task.pid).map_err(failed)?.is_some() {
                return Err(PageServerError::Running(task.pid));
            }
        }
        // A task may have got a child after it was listed and before it was stopped.
        let pids: Vec<u32> = tree.tasks.iter().map(|task| task.pid).collect();
        if pids == before {
            return Ok(tree);
        }
        before = pids;
    }
    Err(PageServerError::Running(root))
}

/// A thread of process `pid` that is neither stopped, traced nor dead.
fn running_thread(pid: u32) -> io::Result<Option<u32>> {
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Some(tid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        match process::state(tid) {
            Ok('T' | 't' | 'Z' | 'X') => {}
            Err(error) if has_ended_meanwhile(&error) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(Some(tid)),
        }
    }
    Ok(None)
}

fn has_ended_meanwhile(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use kernel::pidfd::PidFd;
    use protocol::criu::images::PageFlags;
    use protocol::units::ImageAddr;

    use super::super::server::tests::images;
    use super::*;

    fn page(number: u64) -> ImageAddr {
        ImageAddr::aligned(number << 12).unwrap()
    }

    #[test]
    fn images_are_read_up_to_what_is_contiguous() {
        let dir = images(&[(16, 3, PageFlags::LAZY_PRESENT), (19, 2, PageFlags::PRESENT)]);
        let pages = Pages::of_images(dir.path()).unwrap();
        let mut buf = vec![0; 8 * PAGE_SIZE];
        let mut read = |start, count| {
            let run = PageRun::new(page(start), count).unwrap();
            let pages = pages.read(TaskId(5), run, &mut buf)?;
            Ok::<_, String>((pages, buf[0], buf[usize::try_from(pages - 1).unwrap() * PAGE_SIZE]))
        };
        assert_eq!(read(16, 1), Ok((1, 16, 16)));
        assert_eq!(read(17, 100_000), Ok((4, 17, 20)));
        assert!(read(21, 1).unwrap_err().contains("never dumped"));
        assert!(read(15, 2).unwrap_err().contains("never dumped"));
        let run = PageRun::new(page(16), 1).unwrap();
        assert!(pages.read(TaskId(6), run, &mut [0; PAGE_SIZE]).unwrap_err().contains("no such task"));
        assert!(!pages.may_change());
        assert!(pages.check_still().is_ok());
    }

    #[test]
    fn images_of_a_lazy_dump_are_refused() {
        let dir = images(&[(16, 3, PageFlags::LAZY_PRESENT), (19, 2, PageFlags::LAZY)]);
        let error = Pages::of_images(dir.path()).unwrap_err();
        assert!(matches!(error, PageServerError::LeftOnSource { task: TaskId(5), pages: 2 }), "{error}");
        assert_eq!(error.exit_status(), 2);
    }

    #[test]
    fn a_directory_that_is_not_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("none"), dir.path().to_owned()] {
            let error = Pages::of_images(&path).unwrap_err();
            assert!(matches!(error, PageServerError::Images(_)), "{error}");
            assert_eq!(error.exit_status(), 2);
        }
    }

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap())
        }

        fn signal(&self, signal: i32, state: char) {
            PidFd::open(self.0.id()).unwrap().signal(signal).unwrap();
            let deadline = Instant::now() + Duration::from_secs(10);
            while process::state(self.0.id()).unwrap() != state {
                assert!(Instant::now() < deadline);
                thread::yield_now();
            }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_running_process_is_refused() {
        let sleeper = Sleeper::start();
        let error = Pages::of_process(sleeper.0.id()).unwrap_err();
        assert!(matches!(error, PageServerError::Running(pid) if pid == sleeper.0.id()), "{error}");
        let error = Pages::of_process(0x3f_ffff).unwrap_err();
        assert!(matches!(error, PageServerError::NoProcess(_)), "{error}");
    }

    #[test]
    fn a_stopped_process_is_served_until_it_goes_on() {
        let mut sleeper = Sleeper::start();
        sleeper.signal(nix::libc::SIGSTOP, 'T');
        let pages = Pages::of_process(sleeper.0.id()).unwrap();
        assert!(pages.may_change());
        pages.check_still().unwrap();

        let id = ProcessTree::of(sleeper.0.id()).unwrap().root().id;
        let maps = fs::read_to_string(format!("/proc/{}/maps", sleeper.0.id())).unwrap();
        let (start, end) = maps.lines().next().unwrap().split(' ').next().unwrap().split_once('-').unwrap();
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        let mut buf = vec![0; 4 * PAGE_SIZE];
        let run = PageRun::new(ImageAddr::aligned(start).unwrap(), 1).unwrap();
        assert_eq!(pages.read(id, run, &mut buf), Ok(1));
        assert_eq!(buf[..4], *b"\x7fELF");
        assert!(start < end);
        let run = PageRun::new(page(1), 1).unwrap();
        assert!(pages.read(id, run, &mut buf).unwrap_err().contains("0x1000"));

        sleeper.signal(nix::libc::SIGCONT, 'S');
        let error = pages.check_still().unwrap_err();
        assert!(matches!(error, PageServerError::NotStill(pid) if pid == sleeper.0.id()), "{error}");
        assert_eq!(error.exit_status(), 1);

        sleeper.0.kill().unwrap();
        sleeper.0.wait().unwrap();
        let error = pages.check_still().unwrap_err();
        assert!(matches!(error, PageServerError::Ended(pid) if pid == sleeper.0.id()), "{error}");
    }
}
