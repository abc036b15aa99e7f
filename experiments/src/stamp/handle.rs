//! The stamping workload as its test sees it.

use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::Context;

use super::Options;
use crate::workload::{Order, Process, field};

/// A running stamping workload, here or, once it was moved, elsewhere on this host.
#[derive(Debug)]
pub struct Handle {
    process: Process,
    shared: Option<PathBuf>,
}

/// The answer to a check: 0 wrong is the only good one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Pages verified now, in all processes.
    pub pages: u64,
    /// Everything wrong since the start, in all processes.
    pub wrong: u64,
}

/// One heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Which process of the tree.
    pub id: u16,
    /// `CLOCK_MONOTONIC` in milliseconds.
    pub t_ms: u64,
    /// Operations of the writing threads so far.
    pub ops: u64,
    /// Pages they looked at so far.
    pub pages: u64,
    /// Operations of the churn thread so far.
    pub churn: u64,
    /// Children forked so far.
    pub forks: u64,
    /// Everything wrong so far in this process.
    pub wrong: u64,
    /// The longest time between two operations of one thread since the last heartbeat.
    pub gap_us: u64,
    /// The inode of the PID namespace that it was in.
    pub place: u64,
}

impl Beat {
    /// The heartbeat in a line, if it is one.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        line.strip_prefix("BEAT ")?;
        Some(Self {
            id: field(line, "id")?,
            t_ms: field(line, "t_ms")?,
            ops: field(line, "ops")?,
            pages: field(line, "pages")?,
            churn: field(line, "churn")?,
            forks: field(line, "forks")?,
            wrong: field(line, "wrong")?,
            gap_us: field(line, "gap_us")?,
            place: field(line, "place")?,
        })
    }
}

impl Handle {
    /// Starts the workload and waits until it runs, for at most `limit`. `program` runs the `experiments` binary, or
    /// something that becomes it and passes arguments on, like `nsenter --net=...`.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(mut program: Command, options: &Options, limit: Duration) -> anyhow::Result<Self> {
        let files = options.files.absolute()?;
        program.args(["workload", "stamp"]);
        for (name, value) in [
            ("--mib", options.mib.to_string()),
            ("--threads", options.threads.to_string()),
            ("--tree", options.tree.to_string()),
            ("--rate-us", options.rate_us.to_string()),
            ("--seconds", options.seconds.to_string()),
        ] {
            program.arg(name).arg(value);
        }
        program.args(options.aligned_stack.then_some("--aligned-stack"));
        program.args(options.churn.then_some("--churn")).args(options.fork.then_some("--fork"));
        program.arg("--status").arg(&files.status).arg("--control").arg(&files.control);
        let shared = (options.tree > 1).then(|| files.status.with_extension("shared"));
        let mut process = Process::start(program, &files)?;
        process
            .wait_for(limit, |line| line.starts_with("READY id=0 ").then_some(()))
            .context("starting stamp")?;
        Ok(Self { process, shared })
    }

    /// The pid of the root process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The file that a tree maps.
    #[must_use]
    pub fn shared_file(&self) -> Option<&PathBuf> {
        self.shared.as_ref()
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

    /// Has the whole memory verified.
    ///
    /// # Errors
    /// If there is no answer within `limit`.
    pub fn check(&mut self, limit: Duration) -> anyhow::Result<Checked> {
        self.ask(Order::Check, "CHECK", limit)
    }

    /// Has the whole memory verified for the last time; the workload exits.
    ///
    /// # Errors
    /// If there is no answer within `limit`.
    pub fn quit(&mut self, limit: Duration) -> anyhow::Result<Checked> {
        self.ask(Order::Quit, "DONE", limit)
    }

    fn ask(&mut self, order: Order, word: &str, limit: Duration) -> anyhow::Result<Checked> {
        let number = self.process.order(order)?;
        let line = self.process.wait_line(word, Some(number), limit)?;
        let count = |key| field(&line, key).with_context(|| format!("no {key} in {line:?}"));
        Ok(Checked { pages: count("pages")?, wrong: count("wrong")? })
    }

    /// The next heartbeat of the root that `accept` accepts, among those not looked at yet.
    ///
    /// # Errors
    /// If there is none within `limit`.
    pub fn wait_beat(&mut self, limit: Duration, accept: impl Fn(&Beat) -> bool) -> anyhow::Result<Beat> {
        self.process.wait_for(limit, |line| Beat::parse(line).filter(|beat| beat.id == 0 && accept(beat)))
    }

    /// Waits until the root has done so many more operations than by now: it runs, wherever that is.
    ///
    /// # Errors
    /// If it has not within `limit`.
    pub fn wait_progress(&mut self, ops: u64, limit: Duration) -> anyhow::Result<Beat> {
        self.process.catch_up()?;
        let done = self.beats().iter().filter(|beat| beat.id == 0).map(|beat| beat.ops).max().unwrap_or(0);
        self.wait_beat(limit, |beat| beat.ops >= done + ops)
    }

    /// All heartbeats read so far.
    #[must_use]
    pub fn beats(&self) -> Vec<Beat> {
        self.process.lines("BEAT").into_iter().filter_map(Beat::parse).collect()
    }

    /// What was reported as wrong, in the lines read so far.
    #[must_use]
    pub fn wrong_lines(&self) -> Vec<&str> {
        self.process.lines("WRONG")
    }
}
