//! The command line of `experiments`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};

use crate::lab::Lab;
use crate::report::MoveReport;
use crate::scenario::RunOptions;
use crate::workload::{SpinOptions, report_failure, spin};
use crate::{demo, kv, page, scenario, stamp, stream, touch, vs_qemu};

/// Workloads, fault-latency experiments and the demo of post-copy migration.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

/// What every subcommand takes.
#[derive(Clone, Debug, Default, Args)]
pub struct Common {
    /// CRIU to use
    #[arg(long, global = true, env = "CRIU")]
    pub criu: Option<PathBuf>,
    /// Allow plain tcp off loopback; between the hosts of a lab it always is
    #[arg(long, global = true)]
    pub insecure: bool,
    /// Where logs, reports and samples go
    #[arg(long, global = true)]
    pub work_dir: Option<PathBuf>,
    /// Print the result only
    #[arg(long, global = true)]
    pub quiet: bool,
    /// Have the tools say more; may be repeated
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Common {
    /// Prints a line about progress, unless told to be quiet.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            println!("{text}");
        }
    }

    /// Removes what labs left behind whose process is gone, and says so.
    pub fn sweep_labs(&self) {
        for stale in Lab::sweep() {
            self.say(&format!("removed {stale}, left behind by a lab whose process is gone"));
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show which experiments there are
    List,
    /// Run an experiment
    Run {
        /// Its name, as `list` shows it
        scenario: String,
        #[command(flatten)]
        options: RunOptions,
    },
    /// Print reports that a move wrote with --json, or make the pages of results folders anew
    Report {
        /// The files and folders
        #[arg(required = true)]
        paths: Vec<PathBuf>,
    },
    /// Move a redis under load between two hosts that are network namespaces
    Demo(demo::Options),
    /// Be a process that is moved, or its client
    #[command(subcommand, hide = true)]
    Workload(Workload),
}

#[derive(Debug, Subcommand)]
enum Workload {
    /// Stamp every page and check the stamps
    Stamp(stamp::Options),
    /// Fill memory, wait, then measure the first read of each page
    Touch(touch::Options),
    /// Send memory over one connection
    StreamServer(stream::Options),
    /// Be the only program of a virtual machine
    Guest(vs_qemu::Options),
    /// Load a redis over one connection and check every reply
    KvClient(kv::Options),
    /// Keep a processor busy
    Spin(SpinOptions),
}

impl Workload {
    fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Stamp(options) => report_failure(&options.files, stamp::run(&options)),
            Self::Touch(options) => report_failure(&options.files, touch::run(&options)),
            Self::StreamServer(options) => report_failure(&options.files, stream::serve(&options)),
            Self::Guest(options) => vs_qemu::run_guest(&options),
            Self::KvClient(options) => report_failure(&options.files, kv::run(&options)),
            Self::Spin(options) => spin(&options),
        }
    }
}

impl Cli {
    /// Does what was asked for; the result is the exit status.
    ///
    /// # Errors
    /// If it cannot be done.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        kernel::spawn::keep_descriptors().context("close_range")?;
        match self.command {
            Command::List => list(),
            Command::Run { scenario, options } => run(&scenario, &options, &self.common),
            Command::Report { paths } => report(&paths),
            Command::Demo(options) => demo::run(&options, &self.common),
            Command::Workload(workload) => workload.run(),
        }
    }
}

fn list() -> anyhow::Result<ExitCode> {
    for scenario in scenario::ALL {
        println!("{:<24} {}", scenario.name, scenario.about);
    }
    Ok(ExitCode::SUCCESS)
}

fn run(name: &str, options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    match scenario::find(name) {
        Some(scenario) => (scenario.run)(options, common),
        None => bail!("no experiment is called {name:?}; `experiments list` shows them"),
    }
}

fn report(paths: &[PathBuf]) -> anyhow::Result<ExitCode> {
    for path in paths {
        if path.is_dir() {
            println!("{}", page::write(path)?);
        } else {
            println!("{}", MoveReport::read(path)?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn common_flags_may_follow_the_subcommand() {
        let cli =
            Cli::try_parse_from(["experiments", "demo", "--mib", "64", "--criu", "/x/criu", "-vv"]).unwrap();
        assert_eq!((cli.common.criu, cli.common.verbose), (Some("/x/criu".into()), 2));
        assert!(matches!(cli.command, Command::Demo(options) if options.mib == 64));
    }
}
