//! Clocks as numbers.
//!
//! CRIU restores a tree into a time namespace in which `CLOCK_MONOTONIC` goes on from where it was dumped: between
//! two reads of one process it is right, but it hides most of a blackout and differs from the host's. What spans
//! a move is measured with `CLOCK_REALTIME`, which has no namespaces.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`: for times within one process that is not moved in between.
#[must_use]
pub fn monotonic_ns() -> u64 {
    read_ns(ClockId::CLOCK_MONOTONIC)
}

/// Nanoseconds of `CLOCK_REALTIME`: for what spans a move, or is compared between processes.
#[must_use]
pub fn wall_ns() -> u64 {
    read_ns(ClockId::CLOCK_REALTIME)
}

fn read_ns(clock: ClockId) -> u64 {
    // The call fails only for a clock that does not exist.
    let Ok(now) = clock_gettime(clock) else { return 0 };
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec()).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec()))
}

/// Milliseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic_ms() -> u64 {
    monotonic_ns() / 1_000_000
}
