//! The results folder of an experiment, written run by run: what was measured survives a run that is cut short.
//!
//! ```text
//! environment.txt   scenario, kernel, processor, memory, versions, load before and after
//! runs.csv          a line per run: the case, the number of the run, what was measured
//! histograms/       CASE-runN.hgrm: the latencies of a run by percentile, in microseconds
//! timelines/        CASE-runN.csv: what happened when, counted from the resume
//! failures.txt      runs that were tried again, and why
//! plots/            SVG, drawn from the files above
//! summary.md        medians, their spread, and the plots
//! ```
//!
//! The last two are made from the others and can be made again: `experiments report FOLDER` does.

mod environment;
mod folder;
mod hgrm;
mod table;

use std::fmt;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;

pub use environment::Environment;
pub use folder::Folder;
pub use hgrm::{Percentile, Percentiles};
pub use table::{Group, Record, Spread, Table, number};

use crate::report::Latency;

/// The file with a line per run.
pub const TABLE: &str = "runs.csv";
/// The file that says what it was measured on.
pub const ENVIRONMENT: &str = "environment.txt";
/// The page.
pub const SUMMARY: &str = "summary.md";
/// The file with what went wrong.
pub const FAILURES: &str = "failures.txt";
/// The folder of the latencies.
pub const HISTOGRAMS: &str = "histograms";
/// The folder of the time lines.
pub const TIMELINES: &str = "timelines";
/// The folder of the plots.
pub const PLOTS: &str = "plots";

/// A results folder that is being filled.
#[derive(Debug)]
pub struct Results {
    dir: PathBuf,
    table: Table,
    csv: File,
    environment: Environment,
}

impl Results {
    /// Makes the folder, or clears it of what an earlier run of the scenario left there, and notes the environment.
    /// `versions` are those of the programs measured.
    ///
    /// # Errors
    /// If it cannot be written, or holds something that is no results folder.
    pub fn create(dir: &Path, scenario: &str, versions: &[(&str, String)]) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("creating {dir:?}"))?;
        let known = dir.join(ENVIRONMENT).exists() || fs::read_dir(dir)?.next().is_none();
        ensure!(known, "{dir:?} is not empty and no results folder: give another one");
        for name in [HISTOGRAMS, TIMELINES, PLOTS] {
            absent_is_fine(fs::remove_dir_all(dir.join(name)))?;
        }
        for name in [FAILURES, SUMMARY] {
            absent_is_fine(fs::remove_file(dir.join(name)))?;
        }
        let environment = Environment::begin(scenario, versions);
        environment.write(&dir.join(ENVIRONMENT))?;
        let csv = File::create(dir.join(TABLE))?;
        Ok(Self { dir: dir.to_owned(), table: Table::default(), csv, environment })
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What was measured so far.
    #[must_use]
    pub const fn table(&self) -> &Table {
        &self.table
    }

    /// Adds a run to `runs.csv`.
    ///
    /// # Errors
    /// If it has other columns than the first one, or cannot be written.
    pub fn add(&mut self, row: &Row) -> anyhow::Result<()> {
        if self.table.rows.is_empty() {
            self.table = Table::with_columns_of(row);
            writeln!(self.csv, "{}", self.table.header())?;
        }
        self.table.push(row)?;
        let last = self.table.rows.last().context("a row was added")?;
        writeln!(self.csv, "{}", last.csv())?;
        Ok(self.csv.flush()?)
    }

    /// Writes the latencies of a run, a histogram of nanoseconds; nothing if there are none.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn histogram(&self, name: &RunName, histogram: &Histogram<u64>) -> anyhow::Result<()> {
        if histogram.is_empty() {
            return Ok(());
        }
        self.write(HISTOGRAMS, &format!("{name}.hgrm"), &Percentiles::of_ns(histogram).to_string())
    }

    /// Writes what happened when in a run, as CSV.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn timeline(&self, name: &RunName, csv: &str) -> anyhow::Result<()> {
        self.write(TIMELINES, &format!("{name}.csv"), csv)
    }

    /// Notes a run that failed.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn failure(&self, what: &str) -> anyhow::Result<()> {
        let mut file = File::options().create(true).append(true).open(self.dir.join(FAILURES))?;
        Ok(writeln!(file, "{what}")?)
    }

    /// Writes `summary.md`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn summary(&self, markdown: &str) -> anyhow::Result<()> {
        fs::write(self.dir.join(SUMMARY), markdown).context("writing the summary")
    }

    /// Notes the load afterwards.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        self.environment.end();
        self.environment.write(&self.dir.join(ENVIRONMENT))
    }

    fn write(&self, folder: &str, name: &str, content: &str) -> anyhow::Result<()> {
        let folder = self.dir.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("creating {folder:?}"))?;
        let path = folder.join(name);
        fs::write(&path, content).with_context(|| format!("writing {path:?}"))
    }
}

fn absent_is_fine(result: std::io::Result<()>) -> std::io::Result<()> {
    result.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// One run, for the table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// What was measured: column and value. Rows that agree in all of them are runs of one case.
    pub case: Vec<(&'static str, String)>,
    /// Which run of the case this is, from 1.
    pub run: usize,
    /// Results: column, and the value if there is one.
    pub numbers: Vec<(&'static str, Option<f64>)>,
}

impl Row {
    /// A row without results yet.
    #[must_use]
    pub const fn new(case: Vec<(&'static str, String)>, run: usize) -> Self {
        Self { case, run, numbers: Vec::new() }
    }

    /// Adds a result.
    pub fn push(&mut self, column: &'static str, value: impl Into<Option<f64>>) {
        self.numbers.push((column, value.into()));
    }

    /// Adds the columns of a latency, in microseconds; without a sample, only that there was none.
    pub fn push_latency(&mut self, latency: &Latency) {
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
        self.push("faults", latency.count as f64);
        for (column, value) in [
            ("mean_us", latency.mean),
            ("p50_us", latency.p50),
            ("p90_us", latency.p90),
            ("p99_us", latency.p99),
            ("p99_9_us", latency.p99_9),
            ("max_us", latency.max),
        ] {
            self.push(column, (latency.count > 0).then_some(value));
        }
    }

    /// What files of this run are called.
    #[must_use]
    pub fn name(&self) -> RunName {
        RunName::new(self.case.iter().map(|(_, value)| value.as_str()), self.run)
    }
}

/// What files of a run are called: the values of its case and its number, in letters that need no quoting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunName(String);

impl RunName {
    /// The name of run `run` of the case with these values.
    pub fn new<'a>(case: impl IntoIterator<Item = &'a str>, run: usize) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() || ".-".contains(c) { c } else { '-' };
        let words: Vec<String> = case.into_iter().map(|value| value.chars().map(plain).collect()).collect();
        Self(format!("{}-run{run}", words.join("-")))
    }
}

impl fmt::Display for RunName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(mover: &str, run: usize, p50: impl Into<Option<f64>>) -> Row {
        let mut row = Row::new(vec![("mover", mover.to_owned()), ("load", "one, or 2".to_owned())], run);
        row.push("p50_us", p50);
        row
    }

    #[test]
    fn what_is_added_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("folder");
        let mut results = Results::create(&dir, "test", &[("criu", "9.9".to_owned())]).unwrap();
        results.add(&row("ours", 1, 12.0)).unwrap();
        results.add(&row("ours", 2, None)).unwrap();
        let mut other = row("ours", 3, 1.0);
        other.push("more", 1.0);
        assert!(results.add(&other).is_err(), "a row with other columns");
        let mut histogram = Histogram::new(3).unwrap();
        histogram.record(1500).unwrap();
        results.histogram(&row("ours", 1, 0.0).name(), &histogram).unwrap();
        results.finish().unwrap();
        assert_eq!(&Table::read(&dir.join(TABLE)).unwrap(), results.table());
        assert!(dir.join(HISTOGRAMS).join("ours-one--or-2-run1.hgrm").exists());
        let environment = fs::read_to_string(dir.join(ENVIRONMENT)).unwrap();
        assert!(environment.contains("scenario: test") && environment.contains("criu: 9.9"), "{environment}");
        assert!(environment.contains("load after: "), "{environment}");
    }

    #[test]
    fn an_earlier_run_is_cleared_and_anything_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Results::create(dir.path(), "test", &[]).unwrap();
        first.failure("one").unwrap();
        let again = Results::create(dir.path(), "test", &[]).unwrap();
        assert!(!again.dir().join(FAILURES).exists());
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("letter"), "dear").unwrap();
        assert!(Results::create(other.path(), "test", &[]).is_err());
        assert!(other.path().join("letter").exists());
    }
}
