//! Frames: a 16-byte header and a body.
//!
//! ```text
//!  0  u32  bytes of body        Pages, Demand …    Ack
//!  4  u16  kind                 0  u32  task       0  u32  number of runs
//!  6  u16  0                    4  u32  pages      then per run:
//!  8  u64  id                   8  u64  address    0  u32  task
//! 16  ...  body                16  ...  data       4  u32  pages
//!                                                  8  u64  address
//! ```
//!
//! `Pages` and `Precopy` have `pages * 4096` bytes of data, `PrecopyLz4` fewer than that ([`super::lz4`]); the other kinds
//! that begin with a run have none. An answer on
//! the fault lane carries the id of the question; on the push lane the id counts frames.

use super::codec::{CodecError, Decoder, bounded};
use super::{limits, precopy};
use crate::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 16;
/// Bytes of a frame header and the run that begins the body of a lane frame.
pub const RUN_HEADER_LEN: usize = HEADER_LEN + RUN_LEN;
/// Bytes of a run in a body.
pub const RUN_LEN: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// What the source wants to move.
    Offer = 1,
    /// Whether the destination can take it.
    Verdict = 2,
    /// A piece of an image file.
    Image = 3,
    /// All images were sent.
    Dumped = 4,
    /// Restored and held.
    Prepared = 5,
    /// Run.
    Commit = 6,
    /// The tasks run.
    Running = 7,
    /// Every page is settled.
    Complete = 8,
    /// The source has let go.
    Released = 9,
    /// Roll back.
    Abort = 10,
    /// The destination is clean.
    RolledBack = 11,
    /// A piece of the map of what is settled at the destination, after a lost link.
    SettledMap = 12,
    /// The map is complete: the session goes on.
    Resumed = 13,
    /// Which lazy pages the destination has already, as they were when the tasks were frozen.
    Clean = 14,
    /// The destination asks for pages.
    Demand = 16,
    /// Pages, demanded or pushed.
    Pages = 17,
    /// The pages were acknowledged before: whoever waits may look again.
    Settled = 18,
    /// Pages that are settled at the destination.
    Ack = 19,
    /// The destination asks for pages that will be needed soon: those that were not sent yet.
    Prefetch = 20,
    /// The answer to a `Prefetch` whose first page was sent before.
    Declined = 21,
    /// Pages of a task that still runs, by address.
    Precopy = 22,
    /// Pages of a task that still runs which hold zeros.
    PrecopyZero = 23,
    /// Where a task that still runs has memory that can be lazy.
    Areas = 24,
    /// A round of pre-copy is over.
    Round = 25,
    /// As `Precopy`, compressed.
    PrecopyLz4 = 26,
}

impl Kind {
    const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Offer,
            2 => Self::Verdict,
            3 => Self::Image,
            4 => Self::Dumped,
            5 => Self::Prepared,
            6 => Self::Commit,
            7 => Self::Running,
            8 => Self::Complete,
            9 => Self::Released,
            10 => Self::Abort,
            11 => Self::RolledBack,
            12 => Self::SettledMap,
            13 => Self::Resumed,
            14 => Self::Clean,
            16 => Self::Demand,
            17 => Self::Pages,
            18 => Self::Settled,
            19 => Self::Ack,
            20 => Self::Prefetch,
            21 => Self::Declined,
            22 => Self::Precopy,
            23 => Self::PrecopyZero,
            24 => Self::Areas,
            25 => Self::Round,
            26 => Self::PrecopyLz4,
            _ => return None,
        })
    }

    /// Largest body of this kind.
    const fn body_max(self) -> usize {
        match self {
            Self::Demand | Self::Prefetch | Self::Settled | Self::Declined | Self::PrecopyZero => RUN_LEN,
            Self::Pages | Self::Precopy | Self::PrecopyLz4 => {
                RUN_LEN + limits::PAGES_PER_FRAME_MAX as usize * PAGE_SIZE
            }
            Self::Ack => 4 + limits::RUNS_PER_ACK_MAX * RUN_LEN,
            Self::Areas => precopy::AREAS_HEAD + limits::AREAS_MAX * precopy::AREA_LEN,
            Self::Round => precopy::ROUND_LEN,
            _ => limits::CONTROL_BODY_MAX,
        }
    }
}

/// A frame header that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Request id or counter.
    pub id: u64,
    /// Bytes of body that follow, within the kind's bound.
    pub body_len: usize,
}

impl Header {
    /// The bytes to send.
    ///
    /// # Panics
    /// Never for bodies within [`limits`]; a longer one is our own bug.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let len = u32::try_from(self.body_len).expect("bodies are bounded far below 4 GiB");
        let mut out = [0; HEADER_LEN];
        out[0..4].copy_from_slice(&len.to_le_bytes());
        out[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        out[8..16].copy_from_slice(&self.id.to_le_bytes());
        out
    }

    /// Reads a header and checks kind and length.
    ///
    /// # Errors
    /// [`CodecError::Meaning`] for an unknown kind, [`CodecError::Bound`] for a body that is too long.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, CodecError> {
        let mut fields = Decoder::new(bytes);
        let len = fields.u32("body length")?;
        let number = fields.u16("kind")?;
        let reserved = fields.u16("reserved")?;
        let id = fields.u64("id")?;
        let kind = Kind::from_number(number)
            .ok_or(CodecError::Meaning { field: "frame kind", value: u64::from(number) })?;
        if reserved != 0 {
            return Err(CodecError::Meaning { field: "reserved bits", value: u64::from(reserved) });
        }
        let body_len = bounded(u64::from(len), kind.body_max(), "frame body")?;
        Ok(Self { kind, id, body_len })
    }
}

/// A run of a task as it stands in lane frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskRun {
    /// Whose pages.
    pub task: TaskId,
    /// Which pages.
    pub run: PageRun,
}

impl TaskRun {
    /// The bytes of the run.
    #[must_use]
    pub fn encode(&self) -> [u8; RUN_LEN] {
        // Runs on the wire are cut to PAGES_PER_FRAME_MAX or are acknowledgements, split likewise.
        let pages = u32::try_from(self.run.pages).unwrap_or(u32::MAX);
        let mut out = [0; RUN_LEN];
        out[0..4].copy_from_slice(&self.task.0.to_le_bytes());
        out[4..8].copy_from_slice(&pages.to_le_bytes());
        out[8..16].copy_from_slice(&self.run.start.get().to_le_bytes());
        out
    }

    /// Reads a run of at most `max` pages.
    ///
    /// # Errors
    /// [`CodecError`] for an empty, unaligned, wrapping or too long run.
    pub fn decode(fields: &mut Decoder<'_>, max: u32) -> Result<Self, CodecError> {
        let task = TaskId(fields.u32("task")?);
        let pages = fields.u32("pages")?;
        let addr = fields.u64("address")?;
        let start =
            ImageAddr::aligned(addr).ok_or(CodecError::Meaning { field: "page address", value: addr })?;
        bounded(u64::from(pages), max as usize, "pages")?;
        let run = PageRun::new(start, u64::from(pages))
            .ok_or(CodecError::Meaning { field: "page run at", value: addr })?;
        Ok(Self { task, run })
    }

    /// A frame header and this run, with `data_len` bytes of pages to follow.
    #[must_use]
    pub fn frame(&self, kind: Kind, id: u64, data_len: usize) -> [u8; RUN_HEADER_LEN] {
        let header = Header { kind, id, body_len: RUN_LEN + data_len };
        let mut out = [0; RUN_HEADER_LEN];
        out[..HEADER_LEN].copy_from_slice(&header.encode());
        out[HEADER_LEN..].copy_from_slice(&self.encode());
        out
    }
}

/// A frame that begins with a run: of a lane, and none of `Ack`, `Areas` and `Round`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunFrame {
    /// One that begins with a run.
    pub kind: Kind,
    /// Request id or counter.
    pub id: u64,
    /// Whose pages and which.
    pub what: TaskRun,
    /// Bytes of page data that follow: `pages * 4096` for `Pages` and `Precopy`, fewer for `PrecopyLz4`, else 0.
    pub data_len: usize,
}

impl RunFrame {
    /// Reads header and run together.
    ///
    /// # Errors
    /// [`CodecError`] for a frame of another kind or one whose length does not fit its pages.
    pub fn decode(bytes: &[u8; RUN_HEADER_LEN]) -> Result<Self, CodecError> {
        let (head, run) = bytes.split_first_chunk::<HEADER_LEN>().expect("16 of 32 bytes");
        let header = Header::decode(head)?;
        let max = match header.kind {
            Kind::Demand | Kind::Prefetch => limits::PAGES_PER_REQUEST_MAX,
            Kind::Pages
            | Kind::Settled
            | Kind::Declined
            | Kind::Precopy
            | Kind::PrecopyZero
            | Kind::PrecopyLz4 => limits::PAGES_PER_FRAME_MAX,
            other => return Err(CodecError::Meaning { field: "frame kind here", value: other as u64 }),
        };
        let what = TaskRun::decode(&mut Decoder::new(run), max)?;
        let whole = usize::try_from(what.run.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
        let data_len = header.body_len.saturating_sub(RUN_LEN);
        let fits = match header.kind {
            Kind::Pages | Kind::Precopy => data_len == whole,
            Kind::PrecopyLz4 => 0 < data_len && data_len < whole,
            _ => data_len == 0,
        };
        if header.body_len < RUN_LEN || !fits {
            return Err(CodecError::Meaning { field: "body length", value: header.body_len as u64 });
        }
        Ok(Self { kind: header.kind, id: header.id, what, data_len })
    }
}

/// A whole `Ack` frame.
#[must_use]
pub fn encode_ack(runs: &[TaskRun]) -> Vec<u8> {
    let runs = &runs[..runs.len().min(limits::RUNS_PER_ACK_MAX)];
    let mut out = Vec::with_capacity(HEADER_LEN + 4 + runs.len() * RUN_LEN);
    let header = Header { kind: Kind::Ack, id: 0, body_len: 4 + runs.len() * RUN_LEN };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&u32::try_from(runs.len()).unwrap_or(u32::MAX).to_le_bytes());
    for run in runs {
        out.extend_from_slice(&run.encode());
    }
    out
}

/// The runs of an `Ack` body.
///
/// # Errors
/// [`CodecError`] for a count past its bound, a malformed run, or bytes left over.
pub fn decode_ack(body: &[u8]) -> Result<Vec<TaskRun>, CodecError> {
    let mut fields = Decoder::new(body);
    let count = bounded(u64::from(fields.u32("run count")?), limits::RUNS_PER_ACK_MAX, "run count")?;
    let runs = (0..count).map(|_| TaskRun::decode(&mut fields, u32::MAX)).collect::<Result<_, _>>()?;
    fields.end()?;
    Ok(runs)
}

/// A control frame: header and body.
#[must_use]
pub fn encode_frame(kind: Kind, id: u64, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN + body.len());
    out.extend_from_slice(&Header { kind, id, body_len: body.len() }.encode());
    out.extend_from_slice(body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn what(task: u32, addr: u64, pages: u64) -> TaskRun {
        TaskRun { task: TaskId(task), run: PageRun::new(ImageAddr::containing(addr), pages).unwrap() }
    }

    #[test]
    fn refuses_each_malformation() {
        let good = what(5, 0x7000, 2).frame(Kind::Pages, 1, 2 * PAGE_SIZE);
        assert_eq!(RunFrame::decode(&good).unwrap().data_len, 8192);
        let broken = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            RunFrame::decode(&bytes)
        };
        assert!(broken(4, 99).is_err(), "unknown kind");
        assert!(broken(4, Kind::Offer as u8).is_err(), "a kind without a run");
        assert!(broken(6, 1).is_err(), "reserved bits");
        assert!(broken(0, 17).is_err(), "length that does not fit the pages");
        assert!(broken(1, 0).is_err(), "a body that is shorter than its run");
        let packed = |len| RunFrame::decode(&what(5, 0x7000, 2).frame(Kind::PrecopyLz4, 1, len));
        assert_eq!(packed(100).unwrap().data_len, 100);
        assert!(packed(0).is_err() && packed(8192).is_err(), "compressed to nothing, or to no less");
        assert!(broken(3, 0xff).is_err(), "oversized body");
        assert!(broken(20, 0).is_err(), "no pages");
        assert!(broken(23, 0xff).is_err(), "too many pages");
        assert!(broken(24, 1).is_err(), "unaligned address");
        let mut wrap = good;
        wrap[24..32].copy_from_slice(&0xffff_ffff_ffff_f000_u64.to_le_bytes());
        assert!(RunFrame::decode(&wrap).is_err(), "run behind the end of the address space");
    }

    #[test]
    fn ack_refuses_count_truncation_and_rest() {
        let frame = encode_ack(&[what(1, 0x1000, 1), what(2, 0x4000, 600)]);
        let body = &frame[HEADER_LEN..];
        assert_eq!(decode_ack(body).unwrap().len(), 2);
        assert!(decode_ack(&body[..body.len() - 1]).is_err());
        assert!(decode_ack(&[body, &[0]].concat()).is_err());
        let mut many = body.to_vec();
        many[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode_ack(&many).is_err());
    }

    proptest! {
        #[test]
        fn run_frames_round_trip(task: u32, page in 0u64..1 << 36, pages in 1u64..=256, id: u64) {
            let run = what(task, page << 12, pages);
            let data_len = usize::try_from(pages).unwrap() * PAGE_SIZE;
            let decoded = RunFrame::decode(&run.frame(Kind::Pages, id, data_len)).unwrap();
            prop_assert_eq!(decoded, RunFrame { kind: Kind::Pages, id, what: run, data_len });
        }

        #[test]
        fn arbitrary_headers_never_panic(bytes: [u8; RUN_HEADER_LEN], body: Vec<u8>) {
            let _ = RunFrame::decode(&bytes);
            let _ = decode_ack(&body);
        }
    }
}
