//! Pages in pipes of our own, drained out of CRIU's page server by reference.
//!
//! ```text
//!   task ──vmsplice──▶ CRIU's pipes ──tee, splice──▶ unix socket ──splice──▶ our pipes
//!                                                                             │ tee
//!                                      fault: skip to the page, read ◀────────┤
//!                                      push: splice to the socket  ◀──────────┘
//! ```
//!
//! Pipe `n` holds the pages with indices `n * chunk_pages ..` of the lazy map. Each slot of a pipe holds one
//! page reference; nothing is copied until a fault or the push reads it. Freeing a chunk closes its pipe.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use host::waiting;
use nix::fcntl::{SpliceFFlags, splice};
use protocol::criu::page_server::{Header, HeaderBuf, HeaderLayout, MAX_HEADER_LEN};
use protocol::lazy_map::LazyMap;
use protocol::link::Stream;
use protocol::units::{PAGE_SIZE, PageRun, TaskId, pages_to_bytes};
use protocol::wire::frame::Kind;

use super::scratch::page_pipe;
use super::{PageStore, Scratch, StoreError, TaskMemory, leading};
use crate::ledger::IndexedTaskRun;
use crate::limits;

/// One chunk.
#[derive(Debug)]
enum Chunk {
    /// Still in CRIU's pipes (and in the stopped task).
    Waiting,
    /// In our pipe.
    Held(OwnedFd),
    /// Acknowledged.
    Freed,
}

/// How far the drain is.
#[derive(Debug)]
struct Drain {
    /// Chunks drained so far.
    chunks: u64,
    /// No more will come: pages of other chunks stay in the stopped tasks.
    over: bool,
}

/// Pages in pipes.
#[derive(Debug)]
pub struct PipeStore {
    map: Arc<LazyMap>,
    memory: Arc<TaskMemory>,
    chunk_pages: u64,
    chunks: Vec<Mutex<Chunk>>,
    /// The condition variable goes with it.
    drain: Mutex<Drain>,
    progress: Condvar,
    given_up: AtomicBool,
    held_pages: AtomicU64,
    /// Where freed pages go.
    null: Option<File>,
}

impl PipeStore {
    /// An empty store for `map`, with pipes as small as `descriptors` allow. Until a chunk is drained its
    /// pages are read from `memory`.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the memory does not fit into as many pipes.
    pub fn new(map: Arc<LazyMap>, memory: Arc<TaskMemory>, descriptors: u64) -> Result<Self, StoreError> {
        let fits = |pages: &&u64| map.pages().div_ceil(**pages) <= descriptors;
        let Some(&chunk_pages) = limits::PIPE_PAGES.iter().find(fits) else {
            let error = io::Error::other(format!(
                "{} pages need more than {descriptors} descriptors; raise the open files limit (ulimit -n)",
                map.pages()
            ));
            return Err(StoreError::io("make pipes for the pages")(error));
        };
        let count = map.pages().div_ceil(chunk_pages);
        let chunks = (0..count).map(|_| Mutex::new(Chunk::Waiting)).collect();
        Ok(Self {
            held_pages: AtomicU64::new(map.pages()),
            map,
            memory,
            chunk_pages,
            chunks,
            drain: Mutex::new(Drain { chunks: 0, over: false }),
            progress: Condvar::new(),
            given_up: AtomicBool::new(false),
            null: null(),
        })
    }

    /// A store over pipes that another process has filled, in the order of their chunks; one that is not whole was
    /// acknowledged and freed. `memory` has nothing any more.
    ///
    /// # Errors
    /// [`StoreError::Io`] if a pipe cannot be looked at, or they are not as many as there must be.
    pub fn adopt(
        map: Arc<LazyMap>,
        chunk_pages: u64,
        pipes: Vec<Option<OwnedFd>>,
    ) -> Result<Self, StoreError> {
        let broken = StoreError::io("take over a pipe");
        let memory = Arc::new(TaskMemory::open([]).map_err(&broken)?);
        let (count, mut held_pages) = (map.pages().div_ceil(chunk_pages), 0);
        if pipes.len() as u64 != count {
            return Err(broken(io::ErrorKind::InvalidData.into()));
        }
        let mut chunks = Vec::with_capacity(pipes.len());
        for (pipe, first) in pipes.into_iter().zip((0..).step_by(usize::try_from(chunk_pages).unwrap_or(1))) {
            let pages = (map.pages() - first).min(chunk_pages);
            let held = match pipe {
                Some(ref pipe) => kernel::fds::readable_bytes(pipe.as_fd()).map_err(&broken)?,
                None => 0,
            };
            let whole = pipe.filter(|_| held == pages_to_bytes(pages));
            held_pages += if whole.is_some() { pages } else { 0 };
            chunks.push(Mutex::new(whole.map_or(Chunk::Freed, Chunk::Held)));
        }
        Ok(Self {
            map,
            memory,
            chunk_pages,
            chunks,
            drain: Mutex::new(Drain { chunks: count, over: true }),
            progress: Condvar::new(),
            given_up: AtomicBool::new(false),
            held_pages: AtomicU64::new(held_pages),
            null: null(),
        })
    }

    /// Hands every pipe to `each`, in the order of chunks, nothing for one that has none. None of them is freed meanwhile.
    pub fn with_pipes<T>(&self, each: impl FnOnce(&[Option<BorrowedFd<'_>>]) -> T) -> T {
        let chunks: Vec<_> = self.chunks.iter().map(lock).collect();
        let pipes = chunks.iter().map(|chunk| match &**chunk {
            Chunk::Held(pipe) => Some(pipe.as_fd()),
            Chunk::Waiting | Chunk::Freed => None,
        });
        each(&pipes.collect::<Vec<_>>())
    }

    /// Whether every chunk has been drained; else the stopped tasks are needed until the release.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        lock(&self.drain).chunks == self.chunks.len() as u64
    }

    /// Lets nobody wait for chunks any more that will not come.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        self.progress.notify_all();
    }

    /// Drains CRIU's page server: one request per lazy run, its pages moved by reference. Calls `each` before every one.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is lost, the tasks still have every page and those that were not drained are read from them.
    pub fn drain(
        &self,
        server: &UnixStream,
        layout: HeaderLayout,
        each: impl FnMut(),
    ) -> Result<(), StoreError> {
        let result = self.fill(server, layout, each);
        lock(&self.drain).over = true;
        self.progress.notify_all();
        result
    }

    fn fill(
        &self,
        server: &UnixStream,
        layout: HeaderLayout,
        mut each: impl FnMut(),
    ) -> Result<(), StoreError> {
        // One that was stopped by hand would be waited for without end.
        let limit = Some(limits::PAGE_SERVER_TIMEOUT);
        server.set_read_timeout(limit).map_err(StoreError::io("ask criu's page server"))?;
        let mut filling = Filling { store: self, chunk: 0, pipe: None, pages: 0 };
        for task in self.map.tasks() {
            for indexed in &task.runs {
                let mut rest = Some(indexed.run);
                while let Some(run) = rest {
                    if self.given_up.load(Ordering::Relaxed) {
                        return Err(StoreError::GivenUp);
                    }
                    each();
                    let got = request(server, layout, task.id, run)?;
                    filling.take(server, got)?;
                    rest = PageRun::new(run.start.add(got), run.pages - got);
                }
            }
        }
        filling.finish();
        Ok(())
    }

    fn chunk_at(&self, index: u64) -> Option<(&Mutex<Chunk>, u64)> {
        let chunk = self.chunks.get(usize::try_from(index / self.chunk_pages).ok()?)?;
        Some((chunk, index % self.chunk_pages))
    }

    fn set(&self, chunk: u64, state: Chunk) {
        if let Some(slot) = usize::try_from(chunk).ok().and_then(|chunk| self.chunks.get(chunk)) {
            *lock(slot) = state;
        }
    }

    /// Waits until a chunk is drained, or none is any more.
    fn wait_drained(&self, chunk: u64) -> Result<(), StoreError> {
        let mut drain = lock(&self.drain);
        while drain.chunks <= chunk && !drain.over {
            if self.given_up.load(Ordering::SeqCst) {
                return Err(StoreError::GivenUp);
            }
            drain = self.progress.wait(drain).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

/// A lock whose data stays whole when a holder panics: each is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Without it memory is only free when every holder has ended.
fn null() -> Option<File> {
    File::options().write(true).open("/dev/null").ok()
}

/// Asks CRIU's page server for a run; returns how many pages follow.
fn request(server: &UnixStream, layout: HeaderLayout, task: TaskId, run: PageRun) -> Result<u64, StoreError> {
    let wrong = |error: &dyn std::fmt::Display| StoreError::PageServer(error.to_string());
    let broken = StoreError::io("ask criu's page server");
    let request = Header::get(task, run);
    let mut bytes = [0; MAX_HEADER_LEN];
    let len = request.encode(layout, &mut bytes).map_err(|error| wrong(&error))?;
    io::Write::write_all(&mut &*server, &bytes[..len]).map_err(&broken)?;
    let mut buffer = HeaderBuf::new(layout);
    loop {
        let mut bytes = [0; MAX_HEADER_LEN];
        let missing = buffer.missing();
        io::Read::read_exact(&mut &*server, &mut bytes[..missing]).map_err(&broken)?;
        if let Some(header) = buffer.push(&mut &bytes[..missing]) {
            let run = header.and_then(|header| header.check_reply_to(&request));
            return Ok(run.map_err(|error| wrong(&error))?.pages);
        }
    }
}

/// The chunk being filled.
struct Filling<'a> {
    store: &'a PipeStore,
    chunk: u64,
    pipe: Option<(OwnedFd, OwnedFd)>,
    pages: u64,
}

impl Filling<'_> {
    /// Moves `pages` pages from the socket into pipes.
    fn take(&mut self, server: &UnixStream, pages: u64) -> Result<(), StoreError> {
        let mut left = pages;
        while left > 0 {
            let writer = match &self.pipe {
                Some((_, writer)) => writer,
                None => {
                    let pipe = page_pipe(self.store.chunk_pages).map_err(StoreError::io("make a pipe"))?;
                    &self.pipe.insert(pipe).1
                }
            };
            let fit = left.min(self.store.chunk_pages - self.pages);
            move_bytes(server, writer, pages_to_bytes(fit))?;
            self.pages += fit;
            left -= fit;
            if self.pages == self.store.chunk_pages {
                self.finish();
            }
        }
        Ok(())
    }

    /// Ends the chunk: its writing end is closed, its pages can be read.
    fn finish(&mut self) {
        let Some((reader, _)) = self.pipe.take() else { return };
        self.store.set(self.chunk, Chunk::Held(reader));
        self.chunk += 1;
        self.pages = 0;
        lock(&self.store.drain).chunks = self.chunk;
        self.store.progress.notify_all();
    }
}

fn move_bytes(server: &UnixStream, pipe: &OwnedFd, bytes: u64) -> Result<(), StoreError> {
    let broken = StoreError::io("drain criu's page server");
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    while left > 0 {
        match splice(server, None, pipe, None, left, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(moved) => left -= moved,
            Err(nix::Error::EINTR) => {}
            // Not blocking in splice keeps a pipe that is full before its time from waiting for ever.
            Err(nix::Error::EAGAIN) => wait_for_bytes(server).map_err(&broken)?,
            Err(error) => return Err(broken(error.into())),
        }
    }
    Ok(())
}

fn wait_for_bytes(server: &UnixStream) -> io::Result<()> {
    match waiting::readable_within(server.as_fd(), limits::PAGE_SERVER_TIMEOUT) {
        Ok(true) => Ok(()),
        Ok(false) => Err(io::ErrorKind::TimedOut.into()),
        Err(error) => Err(error),
    }
}

impl PageStore for PipeStore {
    fn chunk_pages(&self) -> u64 {
        self.chunk_pages
    }

    fn chunks_at_hand(&self) -> u64 {
        let drain = lock(&self.drain);
        if drain.over { u64::MAX } else { drain.chunks }
    }

    fn read(&self, scratch: &mut Scratch, first: u64, pages: &mut [u8]) -> Result<u64, StoreError> {
        let Some((chunk, offset)) = self.chunk_at(first) else { return Ok(0) };
        {
            let chunk = lock(chunk);
            match &*chunk {
                Chunk::Freed => return Ok(0),
                Chunk::Held(pipe) => {
                    let there = (self.chunk_pages - offset).min(self.map.pages() - first);
                    let pages = leading(pages, there);
                    let count = (pages.len() / PAGE_SIZE) as u64;
                    // One duplicate for all of them: it costs as much for each page before them.
                    scratch
                        .duplicate(pipe.as_fd(), offset + count)
                        .and_then(|()| scratch.skip(usize::try_from(offset).unwrap_or(0) * PAGE_SIZE))
                        .and_then(|()| scratch.read_pages(pages))
                        .map_err(StoreError::io("read pages out of their pipe"))?;
                    return Ok(count);
                }
                Chunk::Waiting => {}
            }
        }
        match self.memory.read_indexed(&self.map, first, pages) {
            // The task may have been let go between the look and the read: then the chunk is in its pipe.
            Err(_) if self.is_drained() => self.read(scratch, first, pages),
            read => read,
        }
    }

    fn send(
        &self,
        scratch: &mut Scratch,
        runs: &[IndexedTaskRun],
        id: u64,
        link: &Stream,
    ) -> Result<bool, StoreError> {
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(true) };
        self.wait_drained(first.first / self.chunk_pages)?;
        let Some((chunk, start)) = self.chunk_at(first.first) else { return Ok(false) };
        let base = first.first - start;
        let end = last.first + last.what.run.pages - base;
        {
            // The duplicate holds the pages: the chunk may be freed while they are being sent.
            let chunk = lock(chunk);
            match &*chunk {
                Chunk::Held(pipe) => {
                    scratch.duplicate(pipe.as_fd(), end).map_err(StoreError::io("duplicate a chunk"))?;
                }
                Chunk::Freed => return Ok(false),
                Chunk::Waiting => {
                    drop(chunk);
                    self.memory.send(runs, id, link)?;
                    return Ok(true);
                }
            }
        }
        let mut at = 0;
        for (run, id) in runs.iter().zip(id..) {
            let offset = run.first - base;
            let bytes = |pages: u64| usize::try_from(pages_to_bytes(pages)).unwrap_or(0);
            let len = bytes(run.what.run.pages);
            let head = run.what.frame(Kind::Pages, id, len);
            scratch.skip(bytes(offset - at)).map_err(StoreError::io("duplicate a chunk"))?;
            at = offset + run.what.run.pages;
            // Memory that was read here and there has short runs: together they cost as much as a long one.
            scratch.send(link, &head, len, at < end).map_err(StoreError::Link)?;
        }
        Ok(true)
    }

    fn free(&self, chunk: u64) {
        let first = chunk * self.chunk_pages;
        let pages = self.map.pages().saturating_sub(first).min(self.chunk_pages);
        self.held_pages.fetch_sub(pages, Ordering::Relaxed);
        let Some(slot) = usize::try_from(chunk).ok().and_then(|chunk| self.chunks.get(chunk)) else { return };
        let before = std::mem::replace(&mut *lock(slot), Chunk::Freed);
        // A holder has the pipe as well: closing it frees nothing.
        if let (Chunk::Held(pipe), Some(null)) = (before, &self.null) {
            let mut left = usize::try_from(pages_to_bytes(pages)).unwrap_or(0);
            while let (1.., Ok(moved @ 1..)) =
                (left, splice(&pipe, None, null, None, left, SpliceFFlags::SPLICE_F_NONBLOCK))
            {
                left -= moved;
            }
        }
    }

    fn held_bytes(&self) -> u64 {
        pages_to_bytes(self.held_pages.load(Ordering::Relaxed))
    }
}
