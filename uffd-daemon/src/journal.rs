//! What a daemon that takes over a move has to know of its address spaces, in memory that outlives the daemon.
//!
//! ```text
//!   word 0   magic                     then    a bit per lazy page: acknowledged, perhaps freed at the source
//!        1   lazy pages                then    changes of address spaces, five words each
//!        2   changes recorded
//!        3   changes that found no room
//!        4   1: the barrier is lifted, the tasks may run; 2: they have
//!        5   since when the link is lost, in seconds since 1970; 0: it is not
//!        6   for how many seconds it is waited for, and one more; 0: for ever
//!     8-15   of each fault loop: the family whose events it is reading, and one more; 0: none
//! ```
//!
//! Writing is a few stores into a mapping, without a system call. A page that is installed and not yet acknowledged is
//! not recorded: the source has it, and the kernel says that it is there when it comes again. A page that a task
//! dropped, moved or shares with a child must be known, or old content would be put where it does not belong.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kernel::arena::{Region, WORDS_PER_PAGE};
use nix::sys::memfd::{MFdFlags, memfd_create};
use protocol::bitmap::Bitmap;
use protocol::units::TaskAddr;
use protocol::wire::limits::LANES_MAX;

use crate::limits;
use crate::pages::{SpaceId, What};

const MAGIC: u64 = 0x6a6f_7572_6e61_6c33;
const PAGES: usize = 1;
const RECORDED: usize = 2;
const REFUSED: usize = 3;
const RUNNING: usize = 4;
const PAUSED: usize = 5;
const PATIENCE: usize = 6;
const READING: usize = 8;
const HEADER_WORDS: usize = READING + LANES_MAX as usize;
const CHANGE_WORDS: usize = 5;

/// What is recorded of an address space, in the order in which it became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Position of the family.
    pub family: usize,
    /// Which of its spaces.
    pub space: SpaceId,
    /// What became known.
    pub entry: Entry,
}

/// What became known of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It changed.
    Changed {
        /// How.
        what: What,
        /// Nothing else was under way: whatever was recorded before of this space is over.
        first: bool,
    },
    /// It is at rest, and what was under way took effect in this order, [packed](crate::pages::Order::packed). Of changes in
    /// the order of their events this is not recorded.
    Ordered(u64),
}

/// The journal of one move.
pub struct Journal {
    region: Region,
    pages: u64,
    changes_at: usize,
    room: usize,
    /// Held by who records a change: loops read the events of different families at the same time.
    recording: Mutex<()>,
}

/// Whether the tasks of the journal in `file` may not run yet.
///
/// # Errors
/// The errno of reading it.
pub fn is_before_running(file: &File) -> io::Result<bool> {
    let mut word = [0; size_of::<u64>()];
    file.read_exact_at(&mut word, (RUNNING * size_of::<u64>()) as u64)?;
    Ok(u64::from_ne_bytes(word) == 0)
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("pages", &self.pages).field("room", &self.room).finish()
    }
}

impl Journal {
    /// A new journal for `pages` lazy pages, and the file that it is in.
    ///
    /// # Errors
    /// The errno of making the file.
    pub fn create(pages: u64) -> io::Result<(Self, File)> {
        let file = File::from(memfd_create(c"postcopy-journal", MFdFlags::MFD_CLOEXEC)?);
        // Room that is never written takes no memory.
        file.set_len((region_pages(pages) * WORDS_PER_PAGE * size_of::<u64>()) as u64)?;
        let this = Self::map(&file, pages)?;
        this.word(PAGES).store(pages, Ordering::Relaxed);
        this.word(0).store(MAGIC, Ordering::Release);
        Ok((this, file))
    }

    /// The journal that another process has written.
    ///
    /// # Errors
    /// `InvalidData` if it is none for `pages` lazy pages; the errno of mapping it.
    pub fn open(file: &File, pages: u64) -> io::Result<Self> {
        let this = Self::map(file, pages)?;
        let head = [0, PAGES].map(|word| this.word(word).load(Ordering::Acquire));
        if head == [MAGIC, pages] { Ok(this) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    fn map(file: &File, pages: u64) -> io::Result<Self> {
        let region = Region::shared_file(file, region_pages(pages))?;
        Ok(Self {
            region,
            pages,
            changes_at: HEADER_WORDS + bitmap_words(pages),
            room: limits::JOURNAL_CHANGES,
            recording: Mutex::new(()),
        })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.region.page(at / WORDS_PER_PAGE)[at % WORDS_PER_PAGE]
    }

    /// The tasks are about to run: from here on somebody else can take over, and nobody goes back.
    pub fn set_running(&self) {
        self.word(RUNNING).store(1, Ordering::Release);
    }

    /// Whether the tasks may run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.word(RUNNING).load(Ordering::Acquire) > 0
    }

    /// The tasks have been seen to run.
    pub fn set_run(&self) {
        self.word(RUNNING).store(2, Ordering::Release);
    }

    /// Whether the tasks have been seen to run.
    #[must_use]
    pub fn has_run(&self) -> bool {
        self.word(RUNNING).load(Ordering::Acquire) == 2
    }

    /// The link is lost, and is waited for this long.
    pub fn set_paused(&self, limit: Option<Duration>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.word(PATIENCE).store(limit.map_or(0, |limit| limit.as_secs() + 1), Ordering::Relaxed);
        self.word(PAUSED).store(now.max(1), Ordering::Release);
    }

    /// It is there again.
    pub fn set_resumed(&self) {
        self.word(PAUSED).store(0, Ordering::Release);
    }

    /// For how long the link has been lost, and for how long it is waited for altogether.
    #[must_use]
    pub fn paused(&self) -> Option<(Duration, Option<Duration>)> {
        let since = match self.word(PAUSED).load(Ordering::Acquire) {
            0 => return None,
            since => UNIX_EPOCH + Duration::from_secs(since),
        };
        let limit = self.word(PATIENCE).load(Ordering::Relaxed).checked_sub(1).map(Duration::from_secs);
        Some((since.elapsed().unwrap_or_default(), limit))
    }

    /// Events of a family are about to be read by a fault loop: until [`Journal::has_read`] some may be known to nobody
    /// else.
    pub fn reads(&self, reader: usize, family: usize) {
        self.word(READING + reader).store(family as u64 + 1, Ordering::Release);
    }

    /// Everything that the loop has read is recorded.
    pub fn has_read(&self, reader: usize) {
        self.word(READING + reader).store(0, Ordering::Release);
    }

    /// The families whose events were read by a process that ended before it recorded them.
    #[must_use]
    pub fn half_read(&self) -> Vec<usize> {
        let words = (READING..HEADER_WORDS).map(|word| self.word(word).load(Ordering::Acquire));
        words.filter_map(|word| usize::try_from(word).ok()?.checked_sub(1)).collect()
    }

    /// Records a change.
    pub fn record(&self, change: Change) {
        let _recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.word(RECORDED).load(Ordering::Relaxed);
        let at = usize::try_from(count).unwrap_or(usize::MAX);
        if at >= self.room {
            self.word(REFUSED).fetch_add(1, Ordering::Relaxed);
            return;
        }
        for (i, value) in encode(change).into_iter().enumerate() {
            self.word(self.changes_at + at * CHANGE_WORDS + i).store(value, Ordering::Relaxed);
        }
        self.word(RECORDED).store(count + 1, Ordering::Release);
    }

    /// Every change in order; `None` if some found no room.
    #[must_use]
    pub fn changes(&self) -> Option<Vec<Change>> {
        if self.word(REFUSED).load(Ordering::Relaxed) > 0 {
            return None;
        }
        let count = usize::try_from(self.word(RECORDED).load(Ordering::Acquire)).ok()?.min(self.room);
        (0..count)
            .map(|i| {
                let word = |j| self.word(self.changes_at + i * CHANGE_WORDS + j).load(Ordering::Relaxed);
                decode(std::array::from_fn(word))
            })
            .collect()
    }

    /// These pages, by index in the whole tree, are about to be acknowledged.
    pub fn acknowledges(&self, first: u64, pages: u64) {
        let end = (first + pages).min(self.pages);
        let mut at = first;
        while at < end {
            let (word, shift) = (at / 64, at % 64);
            let bits = (64 - shift).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << shift;
            self.bits(word).fetch_or(mask, Ordering::Release);
            at += bits;
        }
    }

    fn bits(&self, word: u64) -> &AtomicU64 {
        self.word(HEADER_WORDS + usize::try_from(word).unwrap_or(usize::MAX - HEADER_WORDS))
    }

    /// What was acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> Bitmap {
        let mut map = Bitmap::clear(self.pages);
        for word in 0..self.pages.div_ceil(64) {
            let mut bits = self.bits(word).load(Ordering::Acquire);
            while bits != 0 {
                let first = u64::from(bits.trailing_zeros());
                let run = u64::from((bits >> first).trailing_ones());
                map.set_range(word * 64 + first, word * 64 + first + run);
                bits &= u64::MAX.checked_shl(u32::try_from(first + run).unwrap_or(64)).unwrap_or(0);
            }
        }
        map
    }
}

#[allow(clippy::cast_possible_truncation)] // bounded by the bitmaps that a tree needs as well
const fn bitmap_words(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

const fn region_pages(pages: u64) -> usize {
    (HEADER_WORDS + bitmap_words(pages) + limits::JOURNAL_CHANGES * CHANGE_WORDS).div_ceil(WORDS_PER_PAGE)
}

/// The bit of an entry's first word that says that nothing else was under way.
const FIRST: u64 = 1 << 63;

fn encode(Change { family, space, entry }: Change) -> [u64; CHANGE_WORDS] {
    let (kind, a, b, c) = match entry {
        Entry::Changed { what: What::Removed { start, end }, .. } => (1, start.get(), end.get(), 0),
        Entry::Changed { what: What::Unmapped { start, end }, .. } => (2, start.get(), end.get(), 0),
        Entry::Changed { what: What::Remapped { from, to, pages }, .. } => (3, from.get(), to.get(), pages),
        Entry::Changed { what: What::Forked { child }, .. } => (4, child.number(), 0, 0),
        Entry::Ordered(order) => (5, order, 0, 0),
    };
    let first = if matches!(entry, Entry::Changed { first: true, .. }) { FIRST } else { 0 };
    [first | kind << 32 | family as u64, space.number(), a, b, c]
}

fn decode([head, space, a, b, c]: [u64; CHANGE_WORDS]) -> Option<Change> {
    let address = TaskAddr::containing;
    let changed = |what| Entry::Changed { what, first: head & FIRST != 0 };
    let entry = match (head & !FIRST) >> 32 {
        1 => changed(What::Removed { start: address(a), end: address(b) }),
        2 => changed(What::Unmapped { start: address(a), end: address(b) }),
        3 => changed(What::Remapped { from: address(a), to: address(b), pages: c }),
        4 => changed(What::Forked { child: SpaceId::numbered(a)? }),
        5 => Entry::Ordered(a),
        _ => return None,
    };
    let family = usize::try_from(head & u64::from(u32::MAX)).ok()?;
    Some(Change { family, space: SpaceId::numbered(space)?, entry })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(number: u64) -> Change {
        let (space, at) =
            (SpaceId::numbered(number % 3).unwrap(), |page: u64| TaskAddr::containing(page << 12));
        let what = match number % 5 {
            0 => What::Removed { start: at(number), end: at(number + 1) },
            1 => What::Unmapped { start: at(number), end: at(number + 2) },
            2 => What::Remapped { from: at(number), to: at(number * 2), pages: number },
            _ => What::Forked { child: SpaceId::numbered(number).unwrap() },
        };
        let entry = match number % 5 {
            4 => Entry::Ordered(number << 60 | 0x21),
            _ => Entry::Changed { what, first: number % 2 == 0 },
        };
        Change { family: usize::try_from(number).unwrap(), space, entry }
    }

    #[test]
    fn what_was_recorded_is_found_by_another() {
        let (journal, file) = Journal::create(200).unwrap();
        assert!(!journal.is_running() && journal.half_read().is_empty());
        assert!(is_before_running(&file).unwrap());
        journal.set_running();
        assert!(!is_before_running(&file).unwrap());
        (0..100).for_each(|number| journal.record(change(number)));
        for (first, pages) in [(0, 1), (60, 10), (130, 64), (199, 5)] {
            journal.acknowledges(first, pages);
        }
        journal.reads(0, 0);
        journal.reads(usize::from(LANES_MAX) - 1, 3);
        let other = Journal::open(&file, 200).unwrap();
        assert!(other.is_running());
        assert_eq!(other.half_read(), [0, 3]);
        journal.has_read(0);
        assert_eq!(other.half_read(), [3]);
        assert_eq!(other.changes().unwrap(), (0..100).map(change).collect::<Vec<_>>());
        let mut acknowledged = Bitmap::clear(200);
        for (first, end) in [(0, 1), (60, 70), (130, 194), (199, 200)] {
            acknowledged.set_range(first, end);
        }
        assert_eq!(other.acknowledged(), acknowledged);
        assert!(Journal::open(&file, 201).is_err());
        assert_eq!(other.paused(), None);
        journal.set_paused(Some(Duration::from_secs(60)));
        assert_eq!(other.paused().unwrap().1, Some(Duration::from_secs(60)));
        journal.set_paused(None);
        assert_eq!(other.paused().unwrap().1, None);
        journal.set_resumed();
        assert_eq!(other.paused(), None);
    }

    #[test]
    fn changes_without_room_are_noticed() {
        let (journal, _) = Journal::create(1).unwrap();
        let full = Change { family: 0, ..change(0) };
        for _ in 0..limits::JOURNAL_CHANGES {
            journal.record(full);
        }
        assert_eq!(journal.changes().map(|changes| changes.len()), Some(limits::JOURNAL_CHANGES));
        journal.record(full);
        assert_eq!(journal.changes(), None);
    }
}
