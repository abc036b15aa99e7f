//! What is settled at the destination, a bit per page of the lazy map, in pieces that fit into control messages.
//!
//! After a lost link the destination sends the whole map; the source counts what is set as acknowledged, and sends
//! again what is not.

use super::codec::{CodecError, Decoder, Encoder};
use super::limits::PAGES_PER_MAP_PIECE;
use crate::bitmap::Bitmap;

/// Bytes of the bits of the longest piece.
#[allow(clippy::cast_possible_truncation)] // a constant of 512 KiB
const BITS_MAX: usize = (PAGES_PER_MAP_PIECE / 8) as usize;

/// A piece of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapPiece {
    /// Index of its first page.
    pub first: u64,
    /// How many pages it is about.
    pub pages: u64,
    /// A bit per page, lowest first, set if the page is settled.
    pub bits: Vec<u8>,
}

impl MapPiece {
    pub(super) fn encode(&self, body: &mut Encoder) {
        body.u64(self.first).u64(self.pages).blob(&self.bits);
    }

    pub(super) fn decode(fields: &mut Decoder<'_>) -> Result<Self, CodecError> {
        let (first, pages) = (fields.u64("first page")?, fields.u64("pages")?);
        if pages > PAGES_PER_MAP_PIECE {
            return Err(CodecError::Bound {
                field: "pages of a map",
                value: pages,
                max: PAGES_PER_MAP_PIECE,
            });
        }
        let bits = fields.blob(BITS_MAX, "bits of a map")?.to_vec();
        let beyond = match (bits.last(), pages % 8) {
            (Some(byte), rest @ 1..) => byte >> rest != 0,
            _ => false,
        };
        if bits.len() as u64 != pages.div_ceil(8) || beyond {
            return Err(CodecError::Meaning { field: "bits of a map", value: bits.len() as u64 });
        }
        Ok(Self { first, pages, bits })
    }
}

/// The pieces of a map, in order.
pub fn pieces(map: &Bitmap) -> impl Iterator<Item = MapPiece> + '_ {
    let count = map.len().div_ceil(PAGES_PER_MAP_PIECE);
    (0..count).map(|piece| {
        let first = piece * PAGES_PER_MAP_PIECE;
        let end = (first + PAGES_PER_MAP_PIECE).min(map.len());
        MapPiece { first, pages: end - first, bits: map.bytes(first, end) }
    })
}

/// A map that is put together again: each piece must continue it.
#[derive(Debug)]
pub struct Assembly {
    map: Bitmap,
    filled: u64,
}

impl Assembly {
    /// Of a map of `pages` pages, none here yet.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { map: Bitmap::clear(pages), filled: 0 }
    }

    /// Adds the next piece.
    ///
    /// # Errors
    /// [`CodecError::Meaning`] if it does not continue the map, or reaches beyond it.
    pub fn add(&mut self, piece: &MapPiece) -> Result<(), CodecError> {
        let end = piece.first.checked_add(piece.pages).filter(|end| *end <= self.map.len());
        let (true, Some(end)) = (piece.first == self.filled, end) else {
            return Err(CodecError::Meaning { field: "first page of a piece", value: piece.first });
        };
        for (at, byte) in (piece.first..end).step_by(8).zip(&piece.bits) {
            match byte {
                0 => {}
                0xff => {
                    self.map.set_range(at, at + 8);
                }
                byte => {
                    for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                        self.map.set(at + bit);
                    }
                }
            }
        }
        self.filled = end;
        Ok(())
    }

    /// The map.
    ///
    /// # Errors
    /// [`CodecError::Short`] if pieces are missing.
    pub fn finish(self) -> Result<Bitmap, CodecError> {
        if self.filled == self.map.len() { Ok(self.map) } else { Err(CodecError::Short { field: "map" }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sent(map: &Bitmap) -> Bitmap {
        let mut assembly = Assembly::new(map.len());
        for piece in pieces(map) {
            let mut body = Encoder::default();
            piece.encode(&mut body);
            let body = body.finish();
            assembly.add(&MapPiece::decode(&mut Decoder::new(&body)).unwrap()).unwrap();
        }
        assembly.finish().unwrap()
    }

    proptest! {
        #[test]
        fn a_map_arrives_as_it_was(len in 0_u64..3000, set in prop::collection::vec(0_u64..3000, 0..200)) {
            let mut map = Bitmap::clear(len);
            for bit in set {
                map.set(bit);
            }
            prop_assert_eq!(sent(&map), map);
        }
    }

    #[test]
    fn a_large_map_takes_several_pieces() {
        let mut map = Bitmap::clear(PAGES_PER_MAP_PIECE + 9);
        map.set_range(PAGES_PER_MAP_PIECE - 3, PAGES_PER_MAP_PIECE + 9);
        map.set(17);
        assert_eq!(pieces(&map).count(), 2);
        assert_eq!(sent(&map), map);
        assert_eq!(sent(&Bitmap::clear(0)), Bitmap::clear(0));
    }

    #[test]
    fn gaps_repeats_and_surplus_are_refused() {
        let piece = |first, pages: u64| MapPiece { first, pages, bits: vec![0; 2] };
        let mut assembly = Assembly::new(20);
        assert!(assembly.add(&piece(8, 12)).is_err(), "gap");
        assembly.add(&piece(0, 16)).unwrap();
        assert!(assembly.add(&piece(0, 16)).is_err(), "repeat");
        assert!(assembly.add(&piece(16, 16)).is_err(), "beyond the end");
        assert!(assembly.add(&MapPiece { first: u64::MAX, pages: 9, bits: vec![0; 2] }).is_err());
        assert!(assembly.finish().is_err(), "not whole");
        for (pages, bits) in [(9, vec![0]), (9, vec![0, 2]), (0, vec![0]), (u64::MAX, vec![])] {
            let mut body = Encoder::default();
            MapPiece { first: 0, pages, bits }.encode(&mut body);
            assert!(MapPiece::decode(&mut Decoder::new(&body.finish())).is_err());
        }
    }
}
