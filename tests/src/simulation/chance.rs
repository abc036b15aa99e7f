//! Time and chance of one simulated move: both come from its seed alone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use experiments::random::Random;

/// Microseconds since the move began.
pub type Us = u64;

/// A millisecond.
pub const MS: Us = 1000;
/// A second.
pub const SECOND: Us = 1000 * MS;

/// The clock and the dice that everybody in one world shares.
#[derive(Clone, Debug)]
pub struct Chance(Arc<State>);

#[derive(Debug)]
struct State {
    now: AtomicU64,
    began: Instant,
    random: Mutex<Random>,
}

impl Chance {
    /// Those of a seed; it is time 0.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let random = Mutex::new(Random::new(seed));
        Self(Arc::new(State { now: AtomicU64::new(0), began: Instant::now(), random }))
    }

    /// What time it is.
    #[must_use]
    pub fn now(&self) -> Us {
        self.0.now.load(Ordering::Relaxed)
    }

    /// The same for who asks for the time of a real clock.
    #[must_use]
    pub fn instant(&self) -> Instant {
        self.0.began + Duration::from_micros(self.now())
    }

    /// It is later now.
    pub fn set(&self, now: Us) {
        self.0.now.store(now, Ordering::Relaxed);
    }

    /// A number from `low` to `high`, both included.
    #[must_use]
    pub fn between(&self, low: u64, high: u64) -> u64 {
        self.0.random.lock().unwrap_or_else(PoisonError::into_inner).between(low, high)
    }

    /// A number less than `bound`; 0 for a bound of 0.
    #[must_use]
    pub fn below(&self, bound: usize) -> usize {
        self.0.random.lock().unwrap_or_else(PoisonError::into_inner).below(bound)
    }

    /// True once in `of`.
    #[must_use]
    pub fn once_in(&self, of: u64) -> bool {
        self.between(1, of) == 1
    }
}
