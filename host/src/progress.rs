//! Progress of long work: one line that is redrawn on a terminal, a plain line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const ON_A_TERMINAL: Duration = Duration::from_millis(100);
const ELSEWHERE: Duration = Duration::from_secs(2);

/// Shows progress on standard error.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
    quiet: bool,
    shown: Option<Instant>,
    drawn: bool,
}

impl Progress {
    /// Progress for a person, or none with `quiet`.
    #[must_use]
    pub fn new(quiet: bool) -> Self {
        Self { terminal: std::io::stderr().is_terminal(), quiet, shown: None, drawn: false }
    }

    /// How often [`Progress::show`] is worth calling.
    #[must_use]
    pub const fn interval(&self) -> Duration {
        if self.terminal { ON_A_TERMINAL } else { ELSEWHERE }
    }

    /// Shows `line()` if it is time to.
    pub fn show(&mut self, line: impl FnOnce() -> String) {
        let due = self.shown.is_none_or(|shown| shown.elapsed() >= self.interval());
        if self.quiet || !due {
            return;
        }
        // The first interval of a move is not worth a plain line.
        let first = self.shown.replace(Instant::now()).is_none();
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K{}", line());
            self.drawn = true;
        } else if !first {
            tracing::info!("{}", line());
        }
    }

    /// Clears the line, before something else is printed.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Bytes for people.
#[must_use]
#[allow(clippy::cast_precision_loss)] // for people
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
