//! The fault-latency experiments by name.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::cli::Common;
use crate::results::Folder;
use crate::sweep::{
    fault_latency, hybrid, lanes, memory_size, prefill, protection, push_interference, stores,
};
use crate::{floors, kv_move, links, stream, tracking, vs_criu, vs_qemu};

/// How to run an experiment.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct RunOptions {
    /// A short run that only shows that it works
    #[arg(long)]
    pub smoke: bool,
    /// Runs of each case [default: what the experiment needs]
    #[arg(long, value_name = "N")]
    pub runs: Option<usize>,
    /// Memory of the process that is moved, where the experiment does not vary it
    #[arg(long, value_name = "MIB")]
    pub mib: Option<usize>,
    /// Only cases that have all these words in their name; may be repeated
    #[arg(long, value_name = "WORDS")]
    pub only: Vec<String>,
    /// Where the raw data and the summary go [default: a folder below the target directory]
    #[arg(long, value_name = "DIR")]
    pub results: Option<PathBuf>,
}

impl RunOptions {
    /// The results folder of the scenario `name`.
    #[must_use]
    pub fn results_dir(&self, name: &str) -> PathBuf {
        self.results.clone().unwrap_or_else(|| {
            let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
            // What a smoke run shows must not replace what was measured.
            let folder = if self.smoke { "experiments-smoke" } else { "experiments" };
            target.join(folder).join(name)
        })
    }

    /// How often each case is measured: what was asked for, once in a smoke run, or `usual`.
    #[must_use]
    pub fn runs_or(&self, usual: usize) -> usize {
        self.runs.unwrap_or(if self.smoke { 1 } else { usual })
    }
}

/// One experiment.
pub struct Scenario {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it measures, in one line.
    pub about: &'static str,
    /// Runs it.
    pub run: fn(&RunOptions, &Common) -> anyhow::Result<ExitCode>,
    /// What its results show, as Markdown; draws the plots into the folder.
    /// [`standard`](crate::page::standard) fits any table.
    pub page: fn(&Folder) -> anyhow::Result<String>,
}

/// All of them, in the order in which `list` shows them.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: floors::NAME,
        about: "what this machine can do at best: wake-ups, round trips, whole faults, installing, sending",
        run: floors::run,
        page: floors::page,
    },
    Scenario {
        name: fault_latency::NAME,
        about: "what a fault costs, by pattern, read or write, threads, with and without push",
        run: fault_latency::run,
        page: fault_latency::page,
    },
    Scenario {
        name: push_interference::NAME,
        about: "the push from off to unlimited: how long the brownout is, and what it costs the faults",
        run: push_interference::run,
        page: push_interference::page,
    },
    Scenario {
        name: lanes::NAME,
        about: "one connection or several for faults, and for the push",
        run: lanes::run,
        page: lanes::page,
    },
    Scenario {
        name: stores::NAME,
        about: "where the pages wait: pipes, the frozen task, the images of a checkpoint",
        run: stores::run,
        page: stores::page,
    },
    Scenario {
        name: memory_size::NAME,
        about: "what grows with the memory: 64 MiB to 8 GiB, as far as this machine has room",
        run: memory_size::run,
        page: memory_size::page,
    },
    Scenario {
        name: hybrid::NAME,
        about: "copies ahead or not, and stop-and-copy, by how much is written between the last round and the freeze",
        run: hybrid::run,
        page: hybrid::page,
    },
    Scenario {
        name: prefill::NAME,
        about: "copies ahead that are installed before the process runs: what it costs the blackout and saves behind it",
        run: prefill::run,
        page: prefill::page,
    },
    Scenario {
        name: protection::NAME,
        about: "what it costs that another program can take over if one is killed",
        run: protection::run,
        page: protection::page,
    },
    Scenario {
        name: vs_criu::NAME,
        about: "fault latency, drain time, CPU and memory beside CRIU's own lazy pages, interleaved",
        run: vs_criu::run,
        page: vs_criu::page,
    },
    Scenario {
        name: vs_qemu::NAME,
        about: "fault latency and drain time beside QEMU's post-copy with preempt, interleaved",
        run: vs_qemu::run,
        page: vs_qemu::page,
    },
    Scenario {
        name: links::NAME,
        about: "fault latency and push by kind of link, over rates, delay and loss",
        run: links::run,
        page: links::page,
    },
    Scenario {
        name: stream::NAME,
        about: "an established bulk stream through a move of its server, in bins of 10 ms",
        run: stream::run,
        page: stream::page,
    },
    Scenario {
        name: kv_move::NAME,
        about: "what the clients of a redis at 70 % of its peak see of its move",
        run: kv_move::run,
        page: kv_move::page,
    },
    Scenario {
        name: tracking::NAME,
        about: "what it costs to know which pages a process writes: scans, first writes, stops",
        run: tracking::run,
        page: tracking::page,
    },
];

/// The scenario of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}
