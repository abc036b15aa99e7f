//! In which order chunks are pushed: on from where the last fault was, each once; before any fault, hot ones first.

use std::ops::Range;

use protocol::bitmap::Bitmap;

/// The chunks that are still to be pushed.
#[derive(Debug)]
pub struct Order {
    done: Bitmap,
    at: u64,
    left: u64,
    /// By descending number.
    hot: Vec<u64>,
}

impl Order {
    /// Nothing pushed yet of `chunks` chunks.
    #[must_use]
    pub fn new(chunks: u64) -> Self {
        Self::hot_first(chunks, Vec::new())
    }

    /// As [`Order::new`], with chunks that are likely to be needed soon.
    #[must_use]
    pub fn hot_first(chunks: u64, mut hot: Vec<u64>) -> Self {
        hot.retain(|chunk| *chunk < chunks);
        hot.reverse();
        Self { done: Bitmap::clear(chunks), at: 0, left: chunks, hot }
    }

    /// The next chunk: `wanted` if it is still to be pushed, else the next hot one, else the one behind the last, around the
    /// end. Only the first `ready` chunks are there; one behind them is the next only if none of them is left.
    pub fn next(&mut self, wanted: Option<u64>, ready: u64) -> Option<u64> {
        if self.left == 0 {
            return None;
        }
        let ready = ready.min(self.done.len());
        if let Some(wanted) = wanted.filter(|wanted| *wanted < ready && !self.done.get(*wanted)) {
            self.at = wanted;
        } else if let Some(hot) = self.next_hot(ready) {
            return Some(hot);
        }
        let chunk = [self.at..ready, 0..self.at.min(ready), ready..self.done.len()];
        let chunk = chunk.into_iter().find_map(|chunks| self.first_left(chunks))?;
        self.take(chunk);
        self.at = chunk + 1;
        Some(chunk)
    }

    fn first_left(&self, chunks: Range<u64>) -> Option<u64> {
        let behind = self.done.run_in(chunks.start, chunks.end).filter(|(first, _)| *first == chunks.start);
        let first = behind.map_or(chunks.start, |(_, behind)| behind);
        (first < chunks.end).then_some(first)
    }

    fn take(&mut self, chunk: u64) -> bool {
        let fresh = self.done.set(chunk);
        self.left -= u64::from(fresh);
        fresh
    }

    fn next_hot(&mut self, ready: u64) -> Option<u64> {
        while let Some(chunk) = self.hot.last().copied().filter(|chunk| *chunk < ready) {
            self.hot.pop();
            if self.take(chunk) {
                return Some(chunk);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn goes_on_behind_a_fault_and_around_the_end() {
        let mut order = Order::new(6);
        assert_eq!(order.next(None, 6), Some(0));
        assert_eq!(order.next(Some(4), 6), Some(4));
        assert_eq!(order.next(Some(4), 6), Some(5), "pushed already: no way back");
        assert_eq!(order.next(Some(99), 6), Some(1));
        assert_eq!(order.next(Some(3), 6), Some(3));
        assert_eq!(order.next(None, 6), Some(2));
        assert_eq!(order.next(Some(2), 6), None);
    }

    #[test]
    fn what_is_not_there_yet_is_not_waited_for() {
        let mut order = Order::hot_first(6, vec![1, 4]);
        assert_eq!(order.next(Some(5), 2), Some(1), "hot, and there");
        assert_eq!(order.next(Some(5), 2), Some(0));
        assert_eq!(order.next(Some(5), 2), Some(2), "nothing else is left");
        assert_eq!(order.next(Some(5), 6), Some(5));
        assert_eq!(order.next(None, 6), Some(4));
        assert_eq!(order.next(None, 6), Some(3));
        assert_eq!(order.next(None, 6), None);
    }

    #[test]
    fn hot_chunks_come_first_and_a_fault_before_them() {
        let mut order = Order::hot_first(6, vec![1, 4, 5, 99]);
        assert_eq!(order.next(None, 6), Some(1));
        assert_eq!(order.next(Some(2), 6), Some(2));
        assert_eq!(order.next(Some(5), 6), Some(5));
        assert_eq!(order.next(None, 6), Some(4));
        assert_eq!(order.next(None, 6), Some(0), "on from the last fault, around the end");
        assert_eq!(order.next(None, 6), Some(3));
        assert_eq!(order.next(None, 6), None);
    }

    proptest! {
        #[test]
        fn every_chunk_comes_once(
            chunks in 0_u64..200,
            hot in prop::collection::vec(0_u64..220, 0..50),
            wanted in prop::collection::vec((prop::option::of(0_u64..220), 0_u64..220), 200),
        ) {
            let mut order = Order::hot_first(chunks, hot);
            let mut seen: Vec<u64> = wanted.into_iter().map_while(|(wanted, ready)| order.next(wanted, ready)).collect();
            prop_assert_eq!(order.next(None, chunks), None);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..chunks).collect::<Vec<_>>());
        }
    }
}
