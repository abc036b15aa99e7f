//! Pages in fewer bytes: one LZ4 block, without a frame of its own around it.
//!
//! What it expands to is not taken from it: the receiver knows the number of pages, and a block that does not hold
//! exactly these is refused. Nothing is allocated by what the peer says.

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

use super::codec::CodecError;
use super::limits::PAGES_PER_FRAME_MAX;
use crate::units::PAGE_SIZE;

/// A block that saves less than this part of its pages is not worth the receiver's time.
const LEAST_SAVING: usize = 16;

/// Compresses pages; keep one per sending thread.
#[derive(Debug)]
pub struct Compressor(Vec<u8>);

impl Default for Compressor {
    fn default() -> Self {
        Self(vec![0; get_maximum_output_size(PAGES_PER_FRAME_MAX as usize * PAGE_SIZE)])
    }
}

impl Compressor {
    /// The block of these pages, at most as many as a frame has; `None` if it would hardly be smaller than they are.
    pub fn compress(&mut self, pages: &[u8]) -> Option<&[u8]> {
        let len = compress_into(pages, &mut self.0).ok()?;
        (len <= pages.len() - pages.len() / LEAST_SAVING).then(|| &self.0[..len])
    }
}

/// Fills `pages` with what a block holds.
///
/// # Errors
/// [`CodecError::Meaning`] if it is malformed, or holds more or less than that.
pub fn decompress(block: &[u8], pages: &mut [u8]) -> Result<(), CodecError> {
    let refused = CodecError::Meaning { field: "lz4 block of bytes", value: block.len() as u64 };
    match decompress_into(block, pages) {
        Ok(len) if len == pages.len() => Ok(()),
        _ => Err(refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(pages: usize) -> Vec<u8> {
        b"what is written again and again ".iter().copied().cycle().take(pages * PAGE_SIZE).collect()
    }

    #[test]
    fn what_cannot_be_made_smaller_is_left_as_it_is() {
        let mut state = 1_u64;
        let noise = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        let noise: Vec<u8> = (0..PAGE_SIZE / 8 * 4).flat_map(noise).collect();
        let mut compressor = Compressor::default();
        assert_eq!(compressor.compress(&noise), None);
        assert!(compressor.compress(&text(4)).unwrap().len() < PAGE_SIZE);
        assert!(compressor.compress(&text(PAGES_PER_FRAME_MAX as usize)).is_some());
    }

    #[test]
    fn a_block_of_other_pages_than_were_named_is_refused() {
        let mut compressor = Compressor::default();
        let block = compressor.compress(&text(4)).unwrap().to_vec();
        for pages in [1, 3, 5, 256] {
            assert!(decompress(&block, &mut vec![0; pages * PAGE_SIZE]).is_err(), "{pages} instead of 4");
        }
        for len in 0..block.len() {
            assert!(decompress(&block[..len], &mut [0; 4 * PAGE_SIZE]).is_err(), "cut to {len}");
        }
        // Says that it repeats the byte before it, over and over: 255 for each of its bytes.
        let bomb = [&[0x1f, 0, 1, 0][..], &[255; 1 << 16]].concat();
        assert!(decompress(&bomb, &mut [0; 4 * PAGE_SIZE]).is_err());
    }

    proptest! {
        #[test]
        fn blocks_round_trip(words in prop::collection::vec(0u8..4, 1..64), pages in 1usize..20) {
            let data: Vec<u8> = words.iter().copied().cycle().take(pages * PAGE_SIZE).collect();
            let mut compressor = Compressor::default();
            if let Some(block) = compressor.compress(&data) {
                let mut out = vec![7; data.len()];
                prop_assert!(decompress(block, &mut out).is_ok());
                prop_assert_eq!(out, data);
            }
        }

        #[test]
        fn arbitrary_blocks_never_panic(block: Vec<u8>, pages in 1usize..4) {
            let _ = decompress(&block, &mut vec![0; pages * PAGE_SIZE]);
        }
    }
}
