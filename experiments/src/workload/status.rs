//! The workload's side: lines out, orders in.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::str::FromStr;

/// Polls in a row that find no control file before the workload takes itself for forgotten. At the usual 20 ms a
/// poll this is 5 s: much longer than replacing the file takes, and short enough for a moved copy to end by
/// itself when the directory of its test is gone.
const MISSING_POLLS_MAX: u32 = 250;

/// Appends lines to the status file.
#[derive(Clone, Debug)]
pub struct StatusLog {
    path: PathBuf,
}

impl StatusLog {
    /// A log at `path`, which is created with the first line.
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Appends `text` as one line. One `write` with `O_APPEND`: lines of several processes do not mix. A line that
    /// cannot be written is lost; whoever waits for it has a deadline.
    pub fn line(&self, text: &str) {
        if let Ok(mut file) = OpenOptions::new().append(true).create(true).open(&self.path) {
            let _ = file.write_all(format!("{text}\n").as_bytes());
        }
    }
}

/// The value of `key=value` in a line, if it is there and has the right form.
#[must_use]
pub fn field<T: FromStr>(line: &str, key: &str) -> Option<T> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

/// What a workload can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Start doing what it waits with.
    Go,
    /// Rewrite a part of the memory, report, and stand still again.
    Dirty,
    /// Stop, verify everything, report, go on.
    Check,
    /// Verify everything, report, exit.
    Quit,
}

/// An order and its number; a number is handled once, and only if it is higher than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What to do.
    pub order: Order,
    /// Which order this is.
    pub number: u64,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.order {
            Order::Go => "go",
            Order::Dirty => "dirty",
            Order::Check => "check",
            Order::Quit => "quit",
        };
        write!(f, "{word} {}", self.number)
    }
}

impl FromStr for Command {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (word, number) = text.trim().split_once(' ').ok_or(())?;
        let order = match word {
            "go" => Order::Go,
            "dirty" => Order::Dirty,
            "check" => Order::Check,
            "quit" => Order::Quit,
            _ => return Err(()),
        };
        Ok(Self { order, number: number.trim().parse().map_err(drop)? })
    }
}

/// What a look at the control file found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poll {
    /// No order that was not handled yet.
    Nothing,
    /// A new order.
    Command(Command),
    /// The file was there and has been gone for long: nobody steers this process any more.
    Abandoned,
}

/// Reads orders from the control file.
#[derive(Debug)]
pub struct ControlFile {
    path: PathBuf,
    handled: u64,
    seen: bool,
    missing: u32,
}

impl ControlFile {
    /// The control file at `path`; it need not exist yet.
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self { path, handled: 0, seen: false, missing: 0 }
    }

    /// Looks at the file once.
    pub fn poll(&mut self) -> Poll {
        match fs::read_to_string(&self.path) {
            Ok(text) => {
                (self.seen, self.missing) = (true, 0);
                match text.parse::<Command>() {
                    Ok(command) if command.number > self.handled => {
                        self.handled = command.number;
                        Poll::Command(command)
                    }
                    _ => Poll::Nothing,
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound && self.seen => {
                self.missing += 1;
                if self.missing > MISSING_POLLS_MAX { Poll::Abandoned } else { Poll::Nothing }
            }
            Err(_) => Poll::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let line = "BEAT id=0 wrong=12 wrongly=7 kind=zero";
        assert_eq!(field::<u64>(line, "wrong"), Some(12));
        assert_eq!(field::<String>(line, "kind").as_deref(), Some("zero"));
        assert_eq!(field::<u64>(line, "kind"), None);
        assert_eq!(field::<u64>(line, "ong"), None);
    }

    #[test]
    fn an_order_is_handled_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let mut control = ControlFile::new(path.clone());
        assert_eq!(control.poll(), Poll::Nothing);
        fs::write(&path, "check 3\n").unwrap();
        assert_eq!(control.poll(), Poll::Command(Command { order: Order::Check, number: 3 }));
        assert_eq!(control.poll(), Poll::Nothing);
        fs::write(&path, "quit 3\n").unwrap();
        assert_eq!(control.poll(), Poll::Nothing, "the number did not rise");
        fs::write(&path, "dance 4\n").unwrap();
        assert_eq!(control.poll(), Poll::Nothing);
    }

    #[test]
    fn a_control_file_that_vanished_for_good_ends_the_workload() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let mut control = ControlFile::new(path.clone());
        assert!((0..1000).all(|_| control.poll() == Poll::Nothing), "a file that never was is no reason");
        fs::write(&path, "").unwrap();
        control.poll();
        fs::remove_file(&path).unwrap();
        let polls = (1..).take_while(|_| control.poll() == Poll::Nothing).count();
        assert_eq!(polls, usize::try_from(MISSING_POLLS_MAX).unwrap());
    }
}
