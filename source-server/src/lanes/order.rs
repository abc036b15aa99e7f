//! In which order chunks are pushed: on from where the last fault was, each once.

use protocol::bitmap::Bitmap;

/// The chunks that are still to be pushed.
#[derive(Debug)]
pub struct Order {
    done: Bitmap,
    at: u64,
    left: u64,
}

impl Order {
    /// Nothing pushed yet of `chunks` chunks.
    #[must_use]
    pub fn new(chunks: u64) -> Self {
        Self { done: Bitmap::clear(chunks), at: 0, left: chunks }
    }

    /// The next chunk: `wanted` if it is still to be pushed, else the one behind the last, around the end.
    pub fn next(&mut self, wanted: Option<u64>) -> Option<u64> {
        if self.left == 0 {
            return None;
        }
        let chunks = self.done.len();
        if let Some(wanted) = wanted.filter(|wanted| *wanted < chunks && !self.done.get(*wanted)) {
            self.at = wanted;
        }
        loop {
            let chunk = if self.at < chunks { self.at } else { 0 };
            if self.done.set(chunk) {
                self.at = chunk + 1;
                self.left -= 1;
                return Some(chunk);
            }
            self.at = self.done.run_in(chunk, chunks).map_or(chunks, |(_, behind)| behind);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn goes_on_behind_a_fault_and_around_the_end() {
        let mut order = Order::new(6);
        assert_eq!(order.next(None), Some(0));
        assert_eq!(order.next(Some(4)), Some(4));
        assert_eq!(order.next(Some(4)), Some(5), "pushed already: no way back");
        assert_eq!(order.next(Some(99)), Some(1));
        assert_eq!(order.next(Some(3)), Some(3));
        assert_eq!(order.next(None), Some(2));
        assert_eq!(order.next(Some(2)), None);
    }

    proptest! {
        #[test]
        fn every_chunk_comes_once(chunks in 0_u64..200, wanted in prop::collection::vec(prop::option::of(0_u64..220), 200)) {
            let mut order = Order::new(chunks);
            let mut seen: Vec<u64> = wanted.into_iter().map_while(|wanted| order.next(wanted)).collect();
            prop_assert_eq!(order.next(None), None);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..chunks).collect::<Vec<_>>());
        }
    }
}
