//! The fault-latency experiments by name.

use std::process::ExitCode;

use crate::cli::Common;

/// One experiment.
pub struct Scenario {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it measures, in one line.
    pub about: &'static str,
    /// Runs it.
    pub run: fn(&Common) -> anyhow::Result<ExitCode>,
}

/// All of them, in the order in which `list` shows them.
pub const ALL: &[Scenario] = &[];

/// The scenario of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}
