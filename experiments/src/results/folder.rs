//! A results folder as it is read afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use super::{
    ENVIRONMENT, Environment, FAILURES, HISTOGRAMS, Percentiles, Record, RunName, TABLE, TIMELINES, Table,
};

/// A results folder.
#[derive(Clone, Debug)]
pub struct Folder {
    /// Where it is.
    pub dir: PathBuf,
    /// What it was measured on.
    pub environment: Environment,
    /// What was measured.
    pub table: Table,
}

impl Folder {
    /// Reads environment and table.
    ///
    /// # Errors
    /// If it is no results folder.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let environment = Environment::read(&dir.join(ENVIRONMENT))?;
        // A run that was ended before its first line has a table without columns.
        let path = dir.join(TABLE);
        let is_empty = fs::metadata(&path)?.len() == 0;
        let table = if is_empty { Table::default() } else { Table::read(&path)? };
        Ok(Self { dir: dir.to_owned(), environment, table })
    }

    /// The latencies of a run, if there are any.
    ///
    /// # Errors
    /// If the file is not what it should be.
    pub fn percentiles(&self, record: &Record) -> anyhow::Result<Option<Percentiles>> {
        let path = self.dir.join(HISTOGRAMS).join(format!("{}.hgrm", record.name()));
        if path.exists() { Percentiles::read(&path).map(Some) } else { Ok(None) }
    }

    /// What happened when in a run, as the text that was written.
    #[must_use]
    pub fn timeline(&self, record: &Record) -> Option<String> {
        fs::read_to_string(self.dir.join(TIMELINES).join(format!("{}.csv", record.name()))).ok()
    }

    /// Runs that failed, a line each.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join(FAILURES)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

impl Record {
    /// What files of this run are called.
    #[must_use]
    pub fn name(&self) -> RunName {
        RunName::new(self.case.iter().map(String::as_str), self.run)
    }
}
