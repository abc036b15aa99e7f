//! The latency histogram, summed up.

use std::sync::PoisonError;

use protocol::wire::control::LatencySummary;

use crate::fault::LatencyHistogram;

/// Counts and percentiles, in nanoseconds.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a mean of latencies is positive and small
pub fn summary(latency: &LatencyHistogram) -> LatencySummary {
    let histogram = latency.lock().unwrap_or_else(PoisonError::into_inner);
    if histogram.is_empty() {
        return LatencySummary::default();
    }
    let at = |quantile: f64| histogram.value_at_quantile(quantile);
    LatencySummary {
        count: histogram.len(),
        mean_ns: histogram.mean() as u64,
        p50_ns: at(0.50),
        p90_ns: at(0.90),
        p99_ns: at(0.99),
        p99_9_ns: at(0.999),
        max_ns: histogram.max(),
    }
}
