//! `vs-criu`: the same workload moved by us and by CRIU's own lazy pages, interleaved, in one run.
//!
//! Per run a process fills its memory, is moved on this host over TCP loopback into a PID namespace of its own,
//! and then reads its pages: not at all (idle), one per 100 us (paced), or back to back. What is measured is what
//! the application sees: each read that had to wait for its page, and the time from its first instruction after
//! the move until the side that moves it has installed the last page and ended.
//!
//! ```text
//! results/  runs.csv         a line per run
//!           failures.txt     runs that were tried again, and why
//!           environment.txt  kernel, processor, versions, load before and after
//!           summary.md       medians and ratios
//! ```

mod contender;
mod summary;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use crate::cli::Common;
use crate::scenario::RunOptions;
use contender::{Contender, Setting, measure};

/// Tries of a run: stock CRIU hangs now and then, and one process in some hundred is copied as a whole.
const TRIES: u32 = 3;

/// How the application uses its memory after the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// It reads nothing before every page has arrived.
    Idle,
    /// One random read per 100 us.
    Paced,
    /// Random reads back to back.
    BackToBack,
}

impl Load {
    const ALL: [Self; 3] = [Self::Idle, Self::Paced, Self::BackToBack];

    /// Its name in files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Paced => "paced",
            Self::BackToBack => "back-to-back",
        }
    }
}

/// Runs the scenario.
///
/// # Errors
/// If a move fails, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let sizes: &[usize] = if options.smoke { &[64] } else { &[512, 2048] };
    let runs = options.runs.unwrap_or(if options.smoke { 1 } else { 5 });
    let results = options.results_dir("vs-criu");
    fs::create_dir_all(&results).with_context(|| format!("creating {results:?}"))?;
    let setting = Setting::find(common)?;
    write_environment(&results, &setting)?;
    let _ = fs::remove_file(results.join("failures.txt"));
    let mut table = File::create(results.join("runs.csv"))?;
    writeln!(table, "{}", contender::CSV_HEADER)?;
    let total = sizes.len() * Load::ALL.len() * runs * Contender::ALL.len();
    let mut measured = Vec::new();
    for &mib in sizes {
        for load in Load::ALL {
            for run in 1..=runs {
                // Interleaved, and each goes first half of the time: the machine's speed drifts.
                let mut order = Contender::ALL;
                if run % 2 == 0 {
                    order.reverse();
                }
                for contender in order {
                    let row = measure_surely(&setting, contender, (mib, load, run), &results, common)?;
                    writeln!(table, "{}", row.csv())?;
                    table.flush()?;
                    measured.push(row);
                    let last = &measured[measured.len() - 1];
                    common.say(&format!("[{}/{total}] {}", measured.len(), last.in_words()));
                    // After every run: what was measured survives a run that is cut short.
                    fs::write(results.join("summary.md"), summary::markdown(&measured, &setting))?;
                }
            }
        }
    }
    println!("{}", summary::markdown(&measured, &setting));
    common.say(&format!("results are in {}", results.display()));
    Ok(ExitCode::SUCCESS)
}

/// Measures, again if need be; what failed is recorded.
fn measure_surely(
    setting: &Setting,
    contender: Contender,
    (mib, load, run): (usize, Load, usize),
    results: &Path,
    common: &Common,
) -> anyhow::Result<contender::Row> {
    let name = format!("{} {mib} MiB {} run {run}", contender.name(), load.name());
    let mut tries = 0;
    loop {
        tries += 1;
        let error = match measure(setting, contender, mib, load, run) {
            Ok(row) => return Ok(row),
            Err(error) if tries == TRIES => return Err(error.context(name)),
            Err(error) => error,
        };
        common.say(&format!("{name}, try {tries}: {error:#}"));
        let mut failures = File::options().create(true).append(true).open(results.join("failures.txt"))?;
        writeln!(failures, "{name}, try {tries}: {error:#}")?;
    }
}

fn write_environment(results: &Path, setting: &Setting) -> anyhow::Result<PathBuf> {
    let path = results.join("environment.txt");
    let mut text = String::new();
    let mut add = |key: &str, value: &str| text.push_str(&format!("{key}: {}\n", value.trim()));
    for key in ["ostype", "osrelease", "version"] {
        add(key, &fs::read_to_string(format!("/proc/sys/kernel/{key}")).unwrap_or_default());
    }
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models: Vec<&str> = cpus.lines().filter_map(|line| line.strip_prefix("model name")).collect();
    add("processors", &models.len().to_string());
    add("model", models.first().copied().unwrap_or_default().trim_start_matches(['\t', ' ', ':']));
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    add("memory", memory.lines().next().unwrap_or_default());
    add("load", &fs::read_to_string("/proc/loadavg").unwrap_or_default());
    add("criu", &setting.criu_version);
    add("release", env!("CARGO_PKG_VERSION"));
    add("tcp congestion control", &fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?);
    fs::write(&path, text)?;
    Ok(path)
}
