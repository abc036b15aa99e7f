//! The fault-latency workload as its experiment sees it.

use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::Context;

use super::{Options, Samples};
use crate::workload::{Files, Order, Process, field};

/// A running fault-latency workload.
#[derive(Debug)]
pub struct Handle {
    process: Process,
    samples_file: PathBuf,
    files: Files,
}

/// What it says at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Pages read.
    pub pages: u64,
    /// Wrong ones among them.
    pub wrong: u64,
    /// The longest gap of the sampling thread: the blackout.
    pub gap_us: u64,
}

impl Handle {
    /// Starts the workload and waits until its memory is filled, for at most `limit`. `program` runs the
    /// `experiments` binary, or something that becomes it and passes arguments on.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(mut program: Command, options: &Options, limit: Duration) -> anyhow::Result<Self> {
        let files = options.files.absolute()?;
        let samples_file = std::path::absolute(&options.samples_file)?;
        program.args(["workload", "touch"]);
        for (name, value) in [
            ("--mib", options.mib.to_string()),
            ("--pattern", options.pattern.to_string()),
            ("--access", options.access.to_string()),
            ("--stride-pages", options.stride_pages.to_string()),
            ("--interval-us", options.interval_us.to_string()),
            ("--threads", options.threads.to_string()),
            ("--start-after-gap-ms", options.start_after_gap_ms.to_string()),
            ("--dirty-percent", options.dirty_percent.to_string()),
            ("--seconds", options.seconds.to_string()),
        ] {
            program.arg(name).arg(value);
        }
        program.arg("--samples-file").arg(&samples_file);
        program.arg("--status").arg(&files.status).arg("--control").arg(&files.control);
        let mut process = Process::start(program, &files)?;
        process.wait_line("READY", None, limit).context("starting touch")?;
        Ok(Self { process, samples_file, files })
    }

    /// A shell command that has it rewrite a part of its memory, and ends once that is done: for a hook that runs before any
    /// other order is given.
    #[must_use]
    pub fn dirty_command(&mut self) -> String {
        let command = self.process.next_command(Order::Dirty);
        let (control, status) = (self.files.control.display(), self.files.status.display());
        format!(
            "echo {command} > {control}.hook && mv {control}.hook {control} && \
             until grep -q '^DIRTIED {} ' {status}; do sleep 0.002; done",
            command.number
        )
    }

    /// The pid it was started with.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// From now on the workload runs elsewhere, and the end of what was started here is no error.
    pub const fn mark_moved(&mut self) {
        self.process.mark_moved();
    }

    /// Waits for the end of what was started here, and reaps it.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn wait_gone(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.process.wait_gone(limit)
    }

    /// Starts the reads.
    ///
    /// # Errors
    /// If the control file cannot be written.
    pub fn go(&mut self) -> anyhow::Result<()> {
        self.process.order(Order::Go).map(drop)
    }

    /// Whether it has begun to read.
    ///
    /// # Errors
    /// If the status file cannot be read.
    pub fn has_started(&mut self) -> anyhow::Result<bool> {
        self.process.catch_up()?;
        Ok(!self.process.lines("STARTED").is_empty())
    }

    /// Waits until every page was read, for at most `limit`.
    ///
    /// # Errors
    /// If it is not done by then.
    pub fn wait_done(&mut self, limit: Duration) -> anyhow::Result<Summary> {
        let line = self.process.wait_line("DONE", None, limit)?;
        let count = |key| field(&line, key).with_context(|| format!("no {key} in {line:?}"));
        Ok(Summary { pages: count("pages")?, wrong: count("wrong")?, gap_us: count("gap_us")? })
    }

    /// Ends it before every page was read.
    ///
    /// # Errors
    /// If it does not end within `limit`.
    pub fn quit(&mut self, limit: Duration) -> anyhow::Result<Summary> {
        self.process.order(Order::Quit)?;
        self.wait_done(limit)
    }

    /// The samples so far.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn samples(&self) -> anyhow::Result<Samples> {
        Samples::read(&self.samples_file)
    }
}
