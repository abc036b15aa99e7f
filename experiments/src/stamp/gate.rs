//! Workers that all stop for a check, and go on or end after it.
//!
//! ```text
//! workers   step step step | verify own pages | step step ...        (or end)
//!                          ^ barrier          ^ barrier
//! control       check() ---+------------------+--> pages verified
//! ```
//!
//! Between the barriers nobody writes: what a check finds is the whole memory at one moment.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// What a thread of the workload does.
pub(super) trait Work: Send {
    /// One operation, or a few; at most some 50 ms of them, as a check waits for its end.
    fn step(&mut self);
    /// Verifies every page it owns; returns how many there are.
    fn verify(&mut self) -> u64;
}

/// Where all workers meet.
#[derive(Debug)]
pub(super) struct Gate {
    round: AtomicU64,
    last: AtomicBool,
    pages: AtomicU64,
    barrier: Barrier,
}

impl Gate {
    /// A gate for so many workers and one control thread.
    #[must_use]
    pub(super) fn new(workers: usize) -> Self {
        let barrier = Barrier::new(workers + 1);
        Self { round: AtomicU64::new(0), last: AtomicBool::new(false), pages: AtomicU64::new(0), barrier }
    }

    /// A worker's life: steps and checks until the last check.
    pub(super) fn drive(&self, work: &mut dyn Work) {
        let mut seen = 0;
        loop {
            let round = self.round.load(SeqCst);
            if round == seen {
                work.step();
                continue;
            }
            seen = round;
            self.barrier.wait();
            // Read before the second barrier: behind it, this may already be about the next check.
            let last = self.last.load(SeqCst);
            self.pages.fetch_add(work.verify(), SeqCst);
            self.barrier.wait();
            if last {
                return;
            }
        }
    }

    /// Stops all workers, has everything verified and lets them go on; returns the number of pages verified.
    pub(super) fn check(&self) -> u64 {
        self.meet(false)
    }

    /// As [`check`](Self::check), but the workers end.
    pub(super) fn check_and_end(&self) -> u64 {
        self.meet(true)
    }

    fn meet(&self, last: bool) -> u64 {
        self.pages.store(0, SeqCst);
        self.last.store(last, SeqCst);
        self.round.fetch_add(1, SeqCst);
        self.barrier.wait();
        self.barrier.wait();
        self.pages.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter<'a>(&'a AtomicU64, u64);

    impl Work for Counter<'_> {
        fn step(&mut self) {
            self.0.fetch_add(1, SeqCst);
        }

        fn verify(&mut self) -> u64 {
            let before = self.0.load(SeqCst);
            std::thread::yield_now();
            assert_eq!(self.0.load(SeqCst), before, "somebody works during a check");
            self.1
        }
    }

    #[test]
    fn nobody_works_during_a_check_and_everybody_ends_after_the_last() {
        let (gate, steps) = (Gate::new(3), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for worker in 1..=3 {
                let (gate, steps) = (&gate, &steps);
                scope.spawn(move || gate.drive(&mut Counter(steps, worker)));
            }
            for _ in 0..50 {
                assert_eq!(gate.check(), 6);
            }
            assert_eq!(gate.check_and_end(), 6);
        });
    }
}
