//! What is sent: bytes that follow from their place, so that a byte that is lost, doubled or stale is noticed.

use crate::random::mix;

const WORD: usize = 8;

/// Fills `bytes` with what stands at `place` of a memory of `length` bytes that is sent round and round; `length` is a
/// multiple of 8.
pub(super) fn fill(bytes: &mut [u8], place: u64, length: u64) {
    let mut place = place % length;
    let mut rest = bytes;
    while !rest.is_empty() {
        let word = mix(place / WORD as u64).to_le_bytes();
        let skip = usize::try_from(place % WORD as u64).unwrap_or(0);
        let count = rest.len().min(WORD - skip);
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&word[skip..skip + count]);
        rest = later;
        place = (place + count as u64) % length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_however_it_is_cut_and_goes_round() {
        let mut whole = vec![0; 300];
        fill(&mut whole, 0, 104);
        for cut in [1, 7, 8, 13] {
            let mut pieces = Vec::new();
            while pieces.len() < whole.len() {
                let mut piece = vec![0; cut.min(whole.len() - pieces.len())];
                fill(&mut piece, pieces.len() as u64, 104);
                pieces.extend(piece);
            }
            assert_eq!(pieces, whole, "cut into {cut}");
        }
        assert_eq!(whole[..96], whole[104..200]);
        assert_ne!(whole[..8], whole[8..16]);
    }
}
