//! A program of ours as a process: its lines, its end.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kernel::pidfd::PidFd;
use nix::sys::signal::Signal;

/// Lines that a panic shows.
const LINES_SHOWN: usize = 40;

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Tool {
    name: String,
    child: Child,
    exit: PidFd,
    output: Arc<Output>,
}

/// What it has printed, on either stream.
#[derive(Debug, Default)]
struct Output {
    state: Mutex<(Vec<String>, Closed)>,
    changed: Condvar,
}

/// How many of the two streams have ended.
type Closed = usize;

impl Output {
    fn read(self: &Arc<Self>, stream: impl Read + Send + 'static) {
        let output = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                output.change(|(lines, _)| lines.push(String::from_utf8_lossy(&line).into_owned()));
            }
            output.change(|(_, closed)| *closed += 1);
        });
    }

    fn change(&self, change: impl FnOnce(&mut (Vec<String>, Closed))) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until `found` finds something in what there is.
    fn wait<T>(&self, limit: Duration, mut found: impl FnMut(&[String], Closed) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = found(&state.0, state.1) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Tool {
    /// Starts a program, its output to be read line by line.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {command:?}: {error}"));
        let exit = PidFd::open(child.id()).expect("a child that was not reaped");
        let output = Arc::<Output>::default();
        output.read(child.stdout.take().expect("piped"));
        output.read(child.stderr.take().expect("piped"));
        Self { name: name.to_owned(), child, exit, output }
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that `pick` accepts, one that was printed before included.
    ///
    /// # Panics
    /// If there is none within `limit`.
    #[track_caller]
    pub fn wait_for<T>(&self, limit: Duration, pick: impl Fn(&str) -> Option<T>) -> T {
        // Both streams closed: nothing more can come.
        let search = |lines: &[String], closed: Closed| match lines.iter().find_map(|line| pick(line)) {
            None if closed == 2 => Some(None),
            None => None,
            found => Some(found),
        };
        let found = self.output.wait(limit, search).flatten();
        found.unwrap_or_else(|| panic!("no such line within {limit:?} from {}", self.last_lines()))
    }

    /// Waits until `count` lines have `words` in them; returns the last.
    ///
    /// # Panics
    /// If there are not as many within `limit`.
    #[track_caller]
    pub fn wait_lines(&self, words: &str, count: usize, limit: Duration) -> String {
        let search = |lines: &[String], closed: Closed| {
            let found = lines.iter().filter(|line| line.contains(words)).nth(count.saturating_sub(1));
            (found.is_some() || closed == 2).then(|| found.cloned())
        };
        let found = self.output.wait(limit, search).flatten();
        found.unwrap_or_else(|| {
            panic!("no {count} lines of {words:?} within {limit:?} from {}", self.last_lines())
        })
    }

    /// Waits for a line with `words` in it.
    ///
    /// # Panics
    /// If there is none within `limit`.
    #[track_caller]
    pub fn wait_line(&self, words: &str, limit: Duration) -> String {
        self.wait_for(limit, |line| line.contains(words).then(|| line.to_owned()))
    }

    /// Every line so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.output.state.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Whether a daemon that took over says that the one before it was killed between reading an event and recording it: the
    /// one window that the kernel does not let anybody close. What was lost in it is said, and not judged.
    #[must_use]
    pub fn says_event_lost(&self) -> bool {
        let lost = self.lines().iter().any(|line| line.contains("between reading an event"));
        if lost {
            println!("a daemon was killed between reading an event and recording it");
        }
        lost
    }

    /// Waits for its end, and for the end of both streams, which nobody may keep open beyond it; returns the exit
    /// status, 128 and the signal for one that was killed.
    ///
    /// # Panics
    /// If either is not there within `limit`.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> i32 {
        let ended = host::waiting::readable_within(self.exit.as_fd(), limit).expect("poll");
        assert!(ended, "still runs after {limit:?}: {}", self.last_lines());
        let status = self.child.wait().expect("a child that was not reaped");
        self.wait_closed(Duration::from_secs(10));
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }

    /// Waits for the end of both streams: it has ended, and every line that it printed is here.
    ///
    /// # Panics
    /// If somebody keeps one open beyond `limit`.
    #[track_caller]
    pub fn wait_closed(&self, limit: Duration) {
        let closed = self.output.wait(limit, |_, closed| (closed == 2).then_some(()));
        assert!(closed.is_some(), "somebody keeps the output open of {}", self.last_lines());
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// Never: a descriptor of a process can always be polled.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        host::waiting::readable_within(self.exit.as_fd(), Duration::ZERO).expect("poll")
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it has ended.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let sent = self.exit.signal(signal as i32);
        sent.unwrap_or_else(|error| panic!("{signal}: {error}: {}", self.last_lines()));
    }

    /// The last lines it printed.
    #[must_use]
    pub fn last_lines(&self) -> String {
        let lines = self.lines();
        let from = lines.len().saturating_sub(LINES_SHOWN);
        format!("{}:\n  {}", self.name, lines[from..].join("\n  "))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
