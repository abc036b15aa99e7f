//! The report of a move: one JSON object, and the same in words. Its shape is a contract with scripts.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use protocol::wire::control::{LatencySummary, PageCounts, Summary};
use serde::Serialize;

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done: the destination has every page, the source has let go.
    Released,
    /// Called off before the switchover: the source runs on.
    RolledBack,
    /// Broken after the switchover: the tasks stand still at the destination where pages are missing.
    Paused,
    /// The tasks are gone.
    Lost,
}

impl Outcome {
    /// The exit status that goes with it.
    #[must_use]
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::Released => 0,
            Self::RolledBack => 1,
            Self::Paused | Self::Lost => 3,
        }
    }
}

/// One phase of a move, in milliseconds since the report began.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// `preflight`, `precopy`, `freeze`, `dump`, `ship`, `restore`, `push` or `release`.
    pub name: &'static str,
    /// When it began.
    pub start_ms: f64,
    /// How long it took.
    pub ms: f64,
}

/// Bytes that crossed the link, frame headers included.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Bytes {
    /// Demand requests and answers.
    pub fault_lane: u64,
    /// Pushed pages and acknowledgements.
    pub push_lane: u64,
    /// Memory copied before the freeze.
    pub precopy: u64,
    /// Offer, images and the rest of the control connection.
    pub control: u64,
}

/// Where the lazy pages came from; `lazy` is the sum of all but `redundant`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Pages {
    lazy: u64,
    demand: u64,
    push: u64,
    precopied: u64,
    zero: u64,
    gone: u64,
    redundant: u64,
}

impl From<PageCounts> for Pages {
    fn from(counts: PageCounts) -> Self {
        let PageCounts { lazy, demand, push, precopied, zero, gone, redundant } = counts;
        Self { lazy, demand, push, precopied, zero, gone, redundant }
    }
}

/// Fault latency in microseconds, from the fault being readable to the wake.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct FaultLatency {
    count: u64,
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    p99_9: f64,
    max: f64,
}

#[allow(clippy::cast_precision_loss)] // latencies are far below 2^53 ns
fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

impl From<LatencySummary> for FaultLatency {
    fn from(l: LatencySummary) -> Self {
        Self {
            count: l.count,
            mean: us(l.mean_ns),
            p50: us(l.p50_ns),
            p90: us(l.p90_ns),
            p99: us(l.p99_ns),
            p99_9: us(l.p99_9_ns),
            max: us(l.max_ns),
        }
    }
}

/// A task of the moved tree.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TaskReport {
    /// Pid in the images.
    pub pid: u32,
    /// Its lazy pages.
    pub lazy_pages: u64,
}

/// The report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Session id.
    pub session: String,
    /// `source` or `destination`.
    pub role: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What took how long.
    pub phases: Vec<Phase>,
    /// Freeze on the source to the first instruction on the destination.
    pub blackout_ms: f64,
    /// Resume to the last page settled.
    pub brownout_ms: f64,
    /// The whole move.
    pub total_ms: f64,
    /// What crossed the link.
    pub bytes: Bytes,
    /// Where pages came from.
    pub pages: Pages,
    /// Latency of faults that needed the source.
    pub fault_latency_us: FaultLatency,
    /// The tasks.
    pub tasks: Vec<TaskReport>,
    /// Why it did not end well.
    pub error: Option<String>,
}

/// Collects a report while the move runs.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    report: Report,
    open: Option<(&'static str, Instant)>,
}

fn ms_between(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1000.0
}

impl Recorder {
    /// A report that begins now.
    #[must_use]
    pub fn new(session: String, role: &'static str) -> Self {
        let report = Report {
            session,
            role,
            outcome: Outcome::RolledBack,
            phases: Vec::new(),
            blackout_ms: 0.0,
            brownout_ms: 0.0,
            total_ms: 0.0,
            bytes: Bytes::default(),
            pages: Pages::default(),
            fault_latency_us: FaultLatency::default(),
            tasks: Vec::new(),
            error: None,
        };
        Self { began: Instant::now(), report, open: None }
    }

    /// Ends the phase before and begins `name`.
    pub fn phase(&mut self, name: &'static str) {
        self.phase_at(name, Instant::now());
    }

    /// As [`Recorder::phase`], for a moment that was only noticed later. The phase that is open goes on.
    pub fn phase_at(&mut self, name: &'static str, at: Instant) {
        if self.open.is_some_and(|(open, _)| open == name) {
            return;
        }
        self.close(at);
        // The first begins with the whole: nothing is left out between them.
        let first = self.report.phases.is_empty();
        self.open = Some((name, if first { self.began } else { at }));
        tracing::info!(phase = name, "phase");
    }

    fn close(&mut self, at: Instant) {
        if let Some((name, start)) = self.open.take() {
            let start_ms = ms_between(self.began, start);
            self.report.phases.push(Phase { name, start_ms, ms: ms_between(start, at) });
        }
    }

    /// The report so far, to fill in.
    pub const fn report(&mut self) -> &mut Report {
        &mut self.report
    }

    /// Takes over the destination's account.
    pub fn settle(&mut self, summary: &Summary) {
        self.report.pages = summary.pages.into();
        self.report.fault_latency_us = summary.latency.into();
        self.report.bytes.fault_lane = summary.fault_lane_bytes;
        self.report.bytes.push_lane = summary.push_lane_bytes;
        self.report.brownout_ms = us(summary.brownout_us);
    }

    /// Ends the report.
    #[must_use]
    pub fn finish(mut self, outcome: Outcome, error: Option<String>) -> Report {
        let now = Instant::now();
        self.close(now);
        self.report.outcome = outcome;
        self.report.error = error;
        self.report.total_ms = ms_between(self.began, now);
        self.report
    }
}

impl Report {
    /// Writes the JSON object to `path`, whole or not at all.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_json(&self, path: &Path) -> std::io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        if !path.is_file() && path.exists() {
            // A pipe or a device such as /dev/stdout: nothing to replace.
            return std::fs::write(path, text);
        }
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        file.as_file().set_permissions(mode)?;
        file.persist(path)?;
        Ok(())
    }

    /// The report in words.
    #[must_use]
    pub fn in_words(&self) -> String {
        let mut out = String::new();
        let p = &self.pages;
        let f = &self.fault_latency_us;
        let outcome = match self.outcome {
            Outcome::Released => "released",
            Outcome::RolledBack => "rolled back",
            Outcome::Paused => "paused",
            Outcome::Lost => "lost",
        };
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "{outcome}: blackout {:.1} ms, brownout {:.1} ms, total {:.1} ms; {} lazy pages = {} demand + {} push \
             + {} precopied + {} zero + {} gone; {} faults, p50 {:.0} us, p99 {:.0} us, max {:.0} us",
            self.blackout_ms,
            self.brownout_ms,
            self.total_ms,
            p.lazy,
            p.demand,
            p.push,
            p.precopied,
            p.zero,
            p.gone,
            f.count,
            f.p50,
            f.p99,
            f.max
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_contracts_keys() {
        let mut recorder = Recorder::new("ab".into(), "source");
        recorder.phase("preflight");
        recorder.phase("freeze");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        recorder.finish(Outcome::RolledBack, Some("why".into())).write_json(&path).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for key in ["session", "role", "outcome", "phases", "blackout_ms", "brownout_ms", "total_ms", "bytes"]
        {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(json["outcome"], "rolled_back");
        assert_eq!(json["error"], "why");
        assert_eq!(json["phases"][1]["name"], "freeze");
        for key in ["lazy", "demand", "push", "precopied", "zero", "gone", "redundant"] {
            assert!(json["pages"][key].is_u64(), "{key}");
        }
        for key in ["count", "mean", "p50", "p90", "p99", "p99_9", "max"] {
            assert!(json["fault_latency_us"][key].is_number(), "{key}");
        }
    }
}
