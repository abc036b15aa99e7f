//! `CLOCK_MONOTONIC` as a number, comparable between processes of one host.
//!
//! A restored process keeps reading it without a jump on the same host; on another one CRIU gives it a time
//! namespace. Nothing in a workload ends or fails because this clock jumped.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    // The call fails only for a clock that does not exist.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec()).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec()))
}

/// Milliseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic_ms() -> u64 {
    monotonic_ns() / 1_000_000
}
