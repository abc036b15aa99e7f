//! The source's end of a session's lanes: a thread for each fault lane, two for each push lane.

mod aside;
mod counts;
mod fault;
mod order;
mod push;
mod window;

pub(crate) use aside::{Aside, CALLING_THREAD};
pub use counts::{LaneCount, LaneCounts};
pub use fault::{Answers, serve_faults};
pub use order::Order;
pub(crate) use push::Throttle;
pub use push::{Pace, Pushing, acknowledgements, push, take_acknowledgement};

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;

use crate::ledger::{Ledger, NotLazy};
use crate::limits;
use crate::store::{PageStore, StoreError};

/// What the lanes of a move share.
pub struct Lanes {
    /// The lazy pages, numbered.
    pub map: Arc<LazyMap>,
    /// Where they wait.
    pub store: Arc<dyn PageStore>,
    /// What was sent and acknowledged.
    pub ledger: Mutex<Ledger>,
    /// Fault lanes on which faults are being served: the push lets them pass.
    pub faults_served: AtomicUsize,
    /// Chunks that are pushed first.
    hot: Mutex<Vec<u64>>,
    /// The chunk of the last fault, and one more; zero once the push has taken note.
    wanted: AtomicU64,
    /// The processor that serves faults, and when it last did, in milliseconds since `began`.
    served_on: AtomicUsize,
    served_at: AtomicU64,
    began: Instant,
    /// The move is over or was called off.
    pub stop: AtomicBool,
    /// Bytes sent as answers.
    pub fault_bytes: AtomicU64,
    /// Bytes pushed.
    pub push_bytes: AtomicU64,
}

impl Lanes {
    /// Lanes over a store.
    #[must_use]
    pub fn new(map: Arc<LazyMap>, store: Arc<dyn PageStore>) -> Arc<Self> {
        let ledger = Mutex::new(Ledger::new(map.pages(), store.chunk_pages()));
        Arc::new(Self {
            map,
            store,
            ledger,
            faults_served: AtomicUsize::new(0),
            hot: Mutex::default(),
            wanted: AtomicU64::new(0),
            served_on: AtomicUsize::new(usize::MAX),
            served_at: AtomicU64::new(0),
            began: Instant::now(),
            stop: AtomicBool::new(false),
            fault_bytes: AtomicU64::new(0),
            push_bytes: AtomicU64::new(0),
        })
    }

    /// Pre-copy has brought the `clean` pages, and saw the `hot` ones written again and again: those are pushed first.
    pub fn copied_ahead(&self, clean: &Bitmap, hot: &Bitmap) {
        let mut ledger = self.ledger();
        ledger.has_already(clean);
        let stale_and_hot = |pages: std::ops::Range<u64>| {
            let mut at = pages.start;
            while let Some((first, behind)) = hot.run_in(at, pages.end) {
                if clean.count_range(first, behind) < behind - first {
                    return true;
                }
                at = behind;
            }
            false
        };
        let chunks = (0..ledger.chunks()).filter(|chunk| stale_and_hot(ledger.chunk(*chunk)));
        *self.hot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = chunks.collect();
    }

    /// The chunks that are pushed first, once.
    #[must_use]
    pub fn take_hot(&self) -> Vec<u64> {
        std::mem::take(&mut self.hot.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Has the push go on a little behind the page with this index: a thread that reads on will need those pages
    /// when they get there, and gets the nearest ones faster by asking.
    fn want(&self, index: u64) {
        let chunk = (index + limits::PUSH_LEAD_PAGES) / self.store.chunk_pages();
        self.wanted.store(chunk + 1, Ordering::Relaxed);
    }

    /// The chunk where faults were served since the last call.
    #[must_use]
    pub fn take_wanted(&self) -> Option<u64> {
        // Mostly nothing is there, and a load leaves the line where it is.
        if self.wanted.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.wanted.swap(0, Ordering::Relaxed).checked_sub(1)
    }

    /// Notes that faults were served on `cpu`.
    fn note_served(&self, cpu: usize) {
        self.served_on.store(cpu, Ordering::Relaxed);
        self.served_at.store(self.now_ms(), Ordering::Relaxed);
    }

    /// The processor that serves faults, if it did of late.
    fn busy_processor(&self) -> Option<usize> {
        let cpu = self.served_on.load(Ordering::Relaxed);
        let quiet_ms = self.now_ms().saturating_sub(self.served_at.load(Ordering::Relaxed));
        (cpu != usize::MAX && u128::from(quiet_ms) < limits::FAULTS_REMEMBERED.as_millis()).then_some(cpu)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// What was sent and acknowledged, exclusively.
    pub fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        // Each change of the ledger is complete in itself.
        self.ledger.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Why a lane ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The destination closed it.
    #[error("the destination closed the {0} lane")]
    Closed(&'static str),
    /// It broke.
    #[error("the {lane} lane broke: {source}")]
    Io {
        /// Which lane.
        lane: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The destination does not keep to the protocol.
    #[error("the destination sent a malformed frame: {0}")]
    Malformed(#[from] protocol::wire::codec::CodecError),
    /// It speaks of pages that are not there.
    #[error(transparent)]
    NotLazy(#[from] NotLazy),
    /// The pages could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl LaneError {
    /// Whether the connection failed, and not who speaks over it or what is kept here.
    #[must_use]
    pub const fn is_link(&self) -> bool {
        match self {
            Self::Closed(_) | Self::Io { .. } | Self::Store(StoreError::Link(_)) => true,
            Self::Malformed(_) | Self::NotLazy(_) | Self::Store(_) => false,
        }
    }

    pub(crate) fn io(lane: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::Closed(lane),
            _ => Self::Io { lane, source },
        }
    }
}
