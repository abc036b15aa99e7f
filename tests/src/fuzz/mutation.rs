//! Mutations of known inputs, each from a number: the same corpus and the same number give the same bytes.

use experiments::random::Random;

/// Longest input: long enough for a few page frames, short enough to be tried thousands of times.
const LENGTH_MAX: usize = 64 << 10;

/// Numbers at which something ends: of a byte, of a page, of a word, of a bound.
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0xfff,
    0x1000,
    0xffff,
    0x10_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_f000,
    u64::MAX >> 1,
    !0xfff,
    u64::MAX,
];

/// One of `corpus`, changed in up to eight places.
#[must_use]
pub fn mutated(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut data = corpus.get(random.below(corpus.len())).cloned().unwrap_or_default();
    for _ in 0..1 << random.below(4) {
        change(&mut data, corpus, &mut random);
    }
    data.truncate(LENGTH_MAX);
    data
}

fn change(data: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    let at = random.below(data.len());
    let length = 1 + random.below(16);
    let range = at..(at + length).min(data.len());
    match random.below(10) {
        0 => data.truncate(at),
        1 => drop(data.drain(range)),
        2 => data.extend((0..length).map(|_| byte(random))),
        3 => drop(data.splice(at..at, (0..length).map(|_| byte(random)))),
        4 => {
            let copy = data[range].to_vec();
            let to = random.below(data.len());
            drop(data.splice(to..to, copy));
        }
        5 => {
            // The end of one input behind the beginning of another.
            let other = corpus.get(random.below(corpus.len())).map_or(&[][..], Vec::as_slice);
            data.truncate(at);
            data.extend_from_slice(&other[random.below(other.len())..]);
        }
        6 => {
            let edge = EDGES[random.below(EDGES.len())].wrapping_add(random.next() % 3).wrapping_sub(1);
            let width = 1 << random.below(4);
            for (slot, byte) in data[at..].iter_mut().zip(edge.to_le_bytes()).take(width) {
                *slot = byte;
            }
        }
        7 => {
            for slot in &mut data[range] {
                *slot = byte(random);
            }
        }
        8 => {
            for slot in data[at..].iter_mut().take(1) {
                *slot = slot.wrapping_add(1 + byte(random) % 3).wrapping_sub(2);
            }
        }
        _ => {
            for slot in data[at..].iter_mut().take(1) {
                *slot ^= 1 << random.below(8);
            }
        }
    }
}

fn byte(random: &mut Random) -> u8 {
    random.next().to_le_bytes()[0]
}
