//! Reports: the objects that `source-server move --json` and `uffd-daemon serve --json` write, and latencies.

use std::fmt;
use std::path::Path;

use anyhow::Context;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// A latency distribution in microseconds, as it stands in every report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// Samples.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p99_9: f64,
    /// The longest.
    pub max: f64,
}

impl Latency {
    /// The summary of a histogram of nanoseconds.
    #[must_use]
    pub fn of_ns(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| us(histogram.value_at_quantile(quantile));
        if histogram.is_empty() {
            return Self::default();
        }
        Self {
            count: histogram.len(),
            mean: histogram.mean() / 1000.0,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: us(histogram.max()),
        }
    }
}

/// Nanoseconds as microseconds; exact up to 104 days.
#[expect(clippy::cast_precision_loss, reason = "times that fit 53 bits")]
fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, mean, p50, p90, p99, p99_9, max } = self;
        write!(
            f,
            "n={count} mean={mean:.0} p50={p50:.0} p90={p90:.0} p99={p99:.0} p99.9={p99_9:.0} max={max:.0} us"
        )
    }
}

/// What one side of a move reports. Fields that a side leaves out read as zero.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveReport {
    /// The session's name, the same on both sides.
    pub session: String,
    /// `source` or `destination`.
    pub role: String,
    /// `released`, `rolled_back`, `paused` or `lost`.
    pub outcome: String,
    /// What was done, in order.
    pub phases: Vec<Phase>,
    /// From the freeze to the first instruction on the destination, in milliseconds.
    pub blackout_ms: f64,
    /// From the resume to the last page installed, in milliseconds.
    pub brownout_ms: f64,
    /// The whole move, in milliseconds.
    pub total_ms: f64,
    /// Bytes by the way they took.
    pub bytes: BytesByWay,
    /// Lazy pages by how they came to be there.
    pub pages: PagesByOrigin,
    /// Faults that needed the source.
    pub fault_latency_us: Latency,
    /// The processes moved.
    pub tasks: Vec<TaskPages>,
    /// What went wrong.
    pub error: Option<String>,
}

/// One phase of a move.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// When it began, in milliseconds since the start of the move.
    pub start_ms: f64,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// Bytes by the way they took.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BytesByWay {
    /// Answers to demand requests.
    pub fault_lane: u64,
    /// Pushed.
    pub push_lane: u64,
    /// Copied before the freeze.
    pub precopy: u64,
    /// Everything else.
    pub control: u64,
}

/// Lazy pages by how they came to be there: `lazy` is the sum of all but `redundant`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PagesByOrigin {
    /// Pages left on the source at the freeze.
    pub lazy: u64,
    /// Asked for by a fault.
    pub demand: u64,
    /// Sent unasked.
    pub push: u64,
    /// Copied before the freeze.
    pub precopied: u64,
    /// Zero pages.
    pub zero: u64,
    /// Removed by the task before they arrived.
    pub gone: u64,
    /// Copies that found the page present.
    pub redundant: u64,
}

impl PagesByOrigin {
    /// Whether every lazy page is accounted for exactly once.
    #[must_use]
    pub const fn adds_up(&self) -> bool {
        self.lazy == self.demand + self.push + self.precopied + self.zero + self.gone
    }
}

/// The lazy pages of one process.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskPages {
    /// The process, by the pid in its images.
    pub pid: u32,
    /// Its lazy pages.
    pub lazy_pages: u64,
}

impl MoveReport {
    /// Reads a report.
    ///
    /// # Errors
    /// If the file cannot be read or is no report.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("reading the report {path:?}"))?;
        serde_json::from_slice(&text).with_context(|| format!("understanding the report {path:?}"))
    }
}

impl fmt::Display for MoveReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}: {}", self.role, self.session, self.outcome)?;
        for Phase { name, start_ms, ms } in &self.phases {
            writeln!(f, "  {name:<10} at {start_ms:>9.1} ms  took {ms:>9.1} ms")?;
        }
        let Self { blackout_ms, brownout_ms, total_ms, pages, bytes, .. } = self;
        writeln!(f, "  blackout {blackout_ms:.1} ms, brownout {brownout_ms:.1} ms, total {total_ms:.1} ms")?;
        let PagesByOrigin { lazy, demand, push, precopied, zero, gone, redundant } = pages;
        writeln!(
            f,
            "  pages: {lazy} lazy = {demand} demand + {push} push + {precopied} precopied + {zero} zero + {gone} gone"
        )?;
        writeln!(
            f,
            "         {redundant} redundant{}",
            if pages.adds_up() { "" } else { " (DOES NOT ADD UP)" }
        )?;
        let BytesByWay { fault_lane, push_lane, precopy, control } = bytes;
        writeln!(
            f,
            "  bytes: fault lane {fault_lane}, push lane {push_lane}, precopy {precopy}, control {control}"
        )?;
        if self.fault_latency_us.count > 0 {
            writeln!(f, "  faults: {}", self.fault_latency_us)?;
        }
        if let Some(error) = &self.error {
            writeln!(f, "  error: {error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_adds_up() {
        let text = r#"{"session": "s", "role": "destination", "outcome": "released",
            "phases": [{"name": "restore", "start_ms": 1, "ms": 2.5}], "blackout_ms": 40, "brownout_ms": 900.5,
            "pages": {"lazy": 10, "demand": 2, "push": 5, "precopied": 1, "zero": 1, "gone": 1, "redundant": 3},
            "fault_latency_us": {"count": 2, "mean": 90, "p50": 80, "p90": 99, "p99": 99, "p99_9": 99, "max": 100},
            "tasks": [{"pid": 7, "lazy_pages": 10}], "error": null, "added_later": 1}"#;
        let report: MoveReport = serde_json::from_str(text).unwrap();
        assert!(report.pages.adds_up());
        assert_eq!((report.phases[0].ms, report.tasks[0].pid), (2.5, 7));
        assert!(report.to_string().contains("10 lazy = 2 demand + 5 push"));
    }

    #[test]
    fn latencies_are_in_microseconds() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        for us in 1..=1000 {
            histogram.record(us * 1000).unwrap();
        }
        let latency = Latency::of_ns(&histogram);
        assert!((latency.p50 - 500.0).abs() < 2.0 && (latency.max - 1000.0).abs() < 2.0, "{latency}");
        assert_eq!(Latency::of_ns(&Histogram::new(3).unwrap()), Latency::default());
    }
}
