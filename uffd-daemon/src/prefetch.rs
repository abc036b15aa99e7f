//! Which pages are worth asking for before a thread needs them.
//!
//! Faults at equal distances are a stream: after two equal steps the next pages are asked for ahead, more each time
//! the stream goes on where it was expected. A fault near a stream but beside its steps shows that the guess was wrong
//! and ends it. Random access never makes two equal steps in a row but by chance, so it pays nothing.
//!
//! ```text
//!   fault 10 ─▶ 11 ─▶ 12 : proven, ask for 13..16 ─▶ fault 17 : ask for 18..25 ─▶ …
//! ```
//!
//! Threads are not told apart (CRIU negotiates userfaultfds without thread ids); each stream is known by where it is.

use crate::limits;

/// Pages to ask for ahead: `first`, `first + stride`, and so on. Indices within a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// Index of the first.
    pub first: u64,
    /// From one to the next; never 0.
    pub stride: i64,
    /// How many.
    pub pages: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    last: u64,
    /// The last step; 0 before there was one.
    stride: i64,
    /// How many pages of the stream are asked for at a time; 0 until two steps were equal.
    window: u64,
    /// How many behind `last` were asked for.
    ahead: u64,
    used_at: u64,
}

/// The streams of one family.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    streams: [Stream; limits::STREAMS],
    clock: u64,
}

impl Streams {
    /// A thread waits for the page `index`.
    pub fn fault(&mut self, index: u64) -> Option<Ahead> {
        self.clock += 1;
        let expected = self.streams.iter_mut().find(|stream| stream.expects(index));
        if let Some(stream) = expected {
            stream.used_at = self.clock;
            return stream.go_on(index);
        }
        let used = |stream: &&mut Stream| stream.used_at > 0;
        let near = self.streams.iter_mut().filter(used).min_by_key(|stream| stream.last.abs_diff(index));
        match near {
            Some(stream) if stream.last.abs_diff(index) <= limits::STREAM_STEP_MAX => {
                stream.used_at = self.clock;
                stream.step(index)
            }
            _ => {
                let oldest = self.streams.iter_mut().min_by_key(|stream| stream.used_at)?;
                *oldest = Stream { last: index, used_at: self.clock, ..Stream::default() };
                None
            }
        }
    }
}

impl Stream {
    /// Steps from the last fault to `index`, if it lies on them.
    fn steps_to(&self, index: u64) -> Option<u64> {
        let distance = i64::try_from(index).ok()?.checked_sub(i64::try_from(self.last).ok()?)?;
        let whole = self.stride != 0 && distance % self.stride == 0;
        whole.then(|| distance / self.stride).and_then(|steps| u64::try_from(steps).ok())
    }

    fn expects(&self, index: u64) -> bool {
        // The page behind the last that was asked for is the one that a stream faults on if all goes well.
        self.window > 0 && self.steps_to(index).is_some_and(|steps| (1..=self.ahead + 1).contains(&steps))
    }

    fn go_on(&mut self, index: u64) -> Option<Ahead> {
        self.ahead = self.ahead.saturating_sub(self.steps_to(index)?);
        self.last = index;
        if self.ahead > self.window / 2 {
            return None;
        }
        self.window = (self.window * 2).min(limits::PREFETCH_PAGES);
        self.ask()
    }

    fn step(&mut self, index: u64) -> Option<Ahead> {
        let step = i64::try_from(index).ok()?.checked_sub(i64::try_from(self.last).ok()?)?;
        let again = step == self.stride && step != 0;
        // A thread that comes back to the page it waited for is no step.
        if step != 0 {
            *self = Self { last: index, stride: step, window: 0, ahead: 0, used_at: self.used_at };
        }
        if !again {
            return None;
        }
        self.window = limits::PREFETCH_START_PAGES;
        self.ask()
    }

    /// Asks for what the window still lacks.
    fn ask(&mut self) -> Option<Ahead> {
        let from = i64::try_from(self.ahead + 1).ok()?;
        let first = self.last.checked_add_signed(self.stride.checked_mul(from)?)?;
        let pages = self.window - self.ahead;
        self.ahead = self.window;
        Some(Ahead { first, stride: self.stride, pages })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// Faults and pages that came ahead when these pages are touched one after the other.
    fn touch(pages: impl IntoIterator<Item = u64>) -> (u64, u64) {
        let (mut streams, mut there) = (Streams::default(), HashSet::new());
        let (mut faults, mut ahead) = (0, 0);
        for page in pages {
            if !there.insert(page) {
                continue;
            }
            faults += 1;
            let Some(Ahead { first, stride, pages }) = streams.fault(page) else { continue };
            for k in 0..i64::try_from(pages).unwrap() {
                let page = first.checked_add_signed(stride * k);
                ahead += u64::from(page.is_some_and(|page| there.insert(page)));
            }
        }
        (faults, ahead)
    }

    #[test]
    fn a_stream_faults_once_in_more_than_sixteen_pages() {
        for stride in [1, 2, 7, -1, -3, 64] {
            let start = 1_000_000_u64;
            let (faults, _) = touch((0..4096).map(|k| start.checked_add_signed(stride * k).unwrap()));
            assert!(faults * 16 <= 4096, "stride {stride}: {faults} faults");
        }
    }

    #[test]
    fn many_streams_at_once() {
        let (faults, _) = touch((0..1024).flat_map(|k| (0..16).map(move |thread| thread * 100_000 + k)));
        assert!(faults * 16 <= 16 * 1024, "{faults} faults");
    }

    #[test]
    fn a_stream_that_turns_away_is_told_so() {
        let mut streams = Streams::default();
        assert_eq!(streams.fault(10), None);
        assert_eq!(streams.fault(11), None);
        let pages = limits::PREFETCH_START_PAGES;
        assert_eq!(streams.fault(12), Some(Ahead { first: 13, stride: 1, pages }));
        // Beside its steps: no more.
        assert_eq!(streams.fault(5), None);
        assert_eq!(streams.fault(13 + pages), None);
    }

    proptest! {
        #[test]
        fn random_access_pays_next_to_nothing(pages in prop::collection::vec(0_u64..1 << 19, 4000)) {
            let (faults, ahead) = touch(pages);
            prop_assert!(ahead * 100 <= faults, "{} pages ahead for {} faults", ahead, faults);
        }

        #[test]
        fn no_index_is_too_wild(pages in prop::collection::vec(prop::num::u64::ANY, 0..200)) {
            let mut streams = Streams::default();
            for page in pages {
                let asked = streams.fault(page).map_or(0, |ahead| ahead.pages);
                prop_assert!(asked <= limits::PREFETCH_PAGES);
            }
        }
    }
}
