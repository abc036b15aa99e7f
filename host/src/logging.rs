//! How `-v` and `--quiet` become log lines on standard error.

use std::fs::File;
use std::io::IsTerminal;
use std::sync::Mutex;

use tracing::Level;
use tracing_subscriber::EnvFilter;

/// Starts logging: phases and the report by default, more with each `-v`, only errors with `quiet`.
/// `RUST_LOG` overrides both.
pub fn start(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => Level::ERROR,
        (false, 0) => Level::INFO,
        (false, 1) => Level::DEBUG,
        (false, _) => Level::TRACE,
    };
    start_at(level, None);
}

/// Starts logging at `level`, to `file` or to standard error.
pub fn start_at(level: Level, file: Option<File>) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level.as_str()));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    // Both fail only if a subscriber is there already, as in tests.
    let _ = match file {
        Some(file) => lines.with_ansi(false).with_writer(Mutex::new(file)).try_init(),
        None => lines.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).try_init(),
    };
}
