//! What a load client reports.

use std::fmt;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::report::Latency;

/// Stalls kept one by one; the longest is kept in any case.
pub(super) const STALLS_MAX: usize = 1000;
/// A request that took at least this long is a stall.
pub(super) const STALL_US_MIN: u64 = 5000;

/// A request that took long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// When it was sent, in milliseconds of `CLOCK_MONOTONIC`.
    pub at_ms: u64,
    /// How long it took, in microseconds.
    pub us: u64,
}

/// What one client saw over its one connection.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KvReport {
    /// Requests under load, loading and verifying not counted.
    pub ops: u64,
    /// Reads among them.
    pub gets: u64,
    /// Writes among them.
    pub sets: u64,
    /// Keys that were loaded.
    pub keys: u64,
    /// Values that were not the one written last, under load or in verification.
    pub wrong: u64,
    /// Keys verified, all rounds together.
    pub verified: u64,
    /// Why the connection ended early, if it did. There is only ever one.
    pub error: Option<String>,
    /// The longest request: the blackout as this client saw it.
    pub longest_stall: Stall,
    /// All requests of 5 ms and more, the first thousand.
    pub stalls: Vec<Stall>,
    /// Latency of the requests under load.
    pub latency_us: Latency,
}

impl KvReport {
    /// Whether the connection held and every value was right.
    #[must_use]
    pub const fn is_good(&self) -> bool {
        self.wrong == 0 && self.error.is_none()
    }

    /// Reads a report.
    ///
    /// # Errors
    /// If the file cannot be read or is no report.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("reading the client's report {path:?}"))?;
        serde_json::from_slice(&text).with_context(|| format!("understanding the client's report {path:?}"))
    }

    /// Writes it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text + "\n").with_context(|| format!("writing the client's report {path:?}"))
    }
}

impl fmt::Display for KvReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ops, gets, sets, keys, wrong, verified, longest_stall, latency_us, .. } = self;
        writeln!(f, "client: {ops} requests ({gets} GET, {sets} SET) over one connection, {keys} keys")?;
        writeln!(f, "  longest stall {} ms", Milliseconds(longest_stall.us))?;
        writeln!(f, "  latency {latency_us}")?;
        writeln!(f, "  {verified} keys verified, {wrong} wrong")?;
        if let Some(error) = &self.error {
            writeln!(f, "  CONNECTION LOST: {error}")?;
        }
        Ok(())
    }
}

/// Microseconds, shown as milliseconds.
struct Milliseconds(u64);

impl fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 100)
    }
}
