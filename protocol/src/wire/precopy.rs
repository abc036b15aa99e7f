//! What travels on a push lane before the tasks are frozen: copies of pages by address, round by round.
//!
//! ```text
//!   source                                          destination
//!   Areas (task 1)  ──────────────────────────────▶  what it has of the task elsewhere is dropped
//!   Precopy, PrecopyLz4, PrecopyZero … ───────────▶  kept by (task, address); a later copy replaces an earlier one
//!   Areas (task 2) … ─────────────────────────────▶
//!   Round 1 ──────────────────────────────────────▶
//!   ◀────────────────────────────────────── Round 1  all of it is kept
//!   …
//!   Round n, last ────────────────────────────────▶
//!   ◀──────────────────────────────── Round n, last  then the freeze, and the lane carries `Pages`
//! ```
//!
//! `Precopy`, `PrecopyLz4` and `PrecopyZero` are frames that begin with a run ([`super::frame::RunFrame`]); their id is the
//! number of the round. `Areas` and `Round` have these bodies:
//!
//! ```text
//!  Areas  0  u32  task             Round  0  u32  number, from 1
//!         4  u32  1: starts again         4  u32  1: last
//!         8  u32  number of areas
//!            then for each, by ascending address and without overlap:
//!            u64  address
//!            u64  pages
//! ```

use super::codec::{CodecError, Decoder, Encoder, bounded};
use super::frame::{Kind, encode_frame};
use super::limits;
use crate::units::{ImageAddr, PageRun, TaskId};

/// Bytes of a `Round` body.
pub const ROUND_LEN: usize = 8;
/// Bytes of an `Areas` body without areas, and of an area.
pub(super) const AREAS_HEAD: usize = 12;
pub(super) const AREA_LEN: usize = 16;

/// Where a task has memory that can be lazy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Areas {
    /// The task.
    pub task: TaskId,
    /// Whether its address space is another one than before: nothing copied of it is of use.
    pub starts_again: bool,
    /// By ascending address, without overlap; at most [`limits::AREAS_MAX`].
    pub areas: Vec<PageRun>,
}

impl Areas {
    /// The whole frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let areas = &self.areas[..self.areas.len().min(limits::AREAS_MAX)];
        let mut body = Encoder::default();
        body.u32(self.task.0).u32(u32::from(self.starts_again));
        body.u32(u32::try_from(areas.len()).unwrap_or(u32::MAX));
        for area in areas {
            body.u64(area.start.get()).u64(area.pages);
        }
        encode_frame(Kind::Areas, 0, &body.finish())
    }

    /// Reads the body.
    ///
    /// # Errors
    /// [`CodecError`] for too many areas, one that is malformed, overlapping or out of order, or bytes left over.
    pub fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut fields = Decoder::new(body);
        let task = TaskId(fields.u32("task")?);
        let starts_again = flag(fields.u32("starts again")?)?;
        let count = bounded(u64::from(fields.u32("area count")?), limits::AREAS_MAX, "area count")?;
        let mut areas: Vec<PageRun> = Vec::new();
        for _ in 0..count {
            let address = fields.u64("area address")?;
            let pages = fields.u64("area pages")?;
            let no_area = CodecError::Meaning { field: "area at", value: address };
            let start = ImageAddr::aligned(address).ok_or_else(|| no_area.clone())?;
            let area = PageRun::new(start, pages).ok_or_else(|| no_area.clone())?;
            if areas.last().is_some_and(|before| before.end() > start) {
                return Err(no_area);
            }
            areas.push(area);
        }
        fields.end()?;
        Ok(Self { task, starts_again, areas })
    }
}

/// The end of a round: said by the source, and said again by the destination when it has everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Counted from 1.
    pub number: u32,
    /// Whether the freeze comes next.
    pub last: bool,
}

impl Round {
    /// The whole frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Encoder::default();
        body.u32(self.number).u32(u32::from(self.last));
        encode_frame(Kind::Round, u64::from(self.number), &body.finish())
    }

    /// Reads the body.
    ///
    /// # Errors
    /// [`CodecError`] for another length or a flag without meaning.
    pub fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut fields = Decoder::new(body);
        let number = fields.u32("round")?;
        let last = flag(fields.u32("last round")?)?;
        fields.end()?;
        Ok(Self { number, last })
    }
}

fn flag(value: u32) -> Result<bool, CodecError> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(CodecError::Meaning { field: "flag", value: u64::from(value) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{HEADER_LEN, Header};
    use proptest::prelude::*;

    fn area(page: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::containing(page << 12), pages).unwrap()
    }

    fn body(frame: &[u8]) -> &[u8] {
        let head = Header::decode(frame.first_chunk().unwrap()).unwrap();
        assert_eq!(head.body_len, frame.len() - HEADER_LEN);
        &frame[HEADER_LEN..]
    }

    #[test]
    fn areas_are_refused_out_of_order_cut_or_with_a_rest() {
        let areas = |areas| Areas { task: TaskId(7), starts_again: true, areas }.encode();
        let good = areas(vec![area(16, 4), area(20, 1), area(64, 2)]);
        assert_eq!(Areas::decode(body(&good)).unwrap().areas.len(), 3);
        for len in 0..body(&good).len() {
            assert!(Areas::decode(&body(&good)[..len]).is_err(), "cut to {len}");
        }
        assert!(Areas::decode(&[body(&good), &[0]].concat()).is_err());
        assert!(Areas::decode(body(&areas(vec![area(16, 4), area(19, 1)]))).is_err(), "overlap");
        assert!(Areas::decode(body(&areas(vec![area(20, 1), area(16, 1)]))).is_err(), "order");
        let broken = |at: usize, value: u8| {
            let mut bytes = body(&good).to_vec();
            bytes[at] = value;
            Areas::decode(&bytes)
        };
        assert!(broken(4, 2).is_err(), "a flag that is neither");
        assert!(broken(11, 1).is_err(), "more areas than there may be");
        assert!(broken(12, 1).is_err(), "an address inside a page");
        assert!(broken(27, 0xff).is_err(), "an area behind the end of the address space");
    }

    #[test]
    fn rounds_are_refused_cut_or_with_a_strange_flag() {
        let frame = Round { number: 3, last: true }.encode();
        let body = body(&frame);
        assert_eq!(body.len(), ROUND_LEN);
        assert_eq!(Round::decode(body), Ok(Round { number: 3, last: true }));
        assert!(Round::decode(&body[..7]).is_err());
        assert!(Round::decode(&[body, &[0]].concat()).is_err());
        assert!(Round::decode(&[3, 0, 0, 0, 2, 0, 0, 0]).is_err());
    }

    proptest! {
        #[test]
        fn areas_round_trip(task: u32, starts_again: bool, gaps in prop::collection::vec((0u64..99, 1u64..1 << 20), 0..40)) {
            let mut at = 0;
            let areas = gaps.into_iter().map(|(gap, pages)| {
                let area = area(at + gap, pages);
                at += gap + pages;
                area
            });
            let areas = Areas { task: TaskId(task), starts_again, areas: areas.collect() };
            prop_assert_eq!(Areas::decode(body(&areas.encode())).unwrap(), areas);
        }

        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>) {
            let _ = Areas::decode(&body);
            let _ = Round::decode(&body);
        }
    }
}
