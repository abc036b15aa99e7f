//! The loop as a thread: what it waits for.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use host::privileges;

use super::{COMMANDS, FaultLoop, Notice, Ready};
use crate::awake::Awake;
use crate::limits;
use crate::upstream::Upstream;

impl<U: Upstream> FaultLoop<U> {
    /// Runs until told to stop; returns the page source for its farewell, and the bytes it delivered.
    pub fn run(mut self) -> Option<U> {
        self.awake = (self.number == 0).then(Awake::new);
        if let Err(error) = kernel::sched::set_slice(limits::SLICE_NS) {
            tracing::debug!("no short time slice for the fault loop: {error}");
        }
        privileges::renounce();
        let tree = self.tree.clone();
        // The others are there for what the first one's processor cannot do.
        let _steered = (self.number == 0).then(|| tree.fault_thread.this_thread());
        loop {
            let (ready, first) = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    self.notify(Notice::Broken(format!("poll failed: {error}")));
                    return self.upstream;
                }
            };
            let polled = std::mem::take(&mut self.polled);
            let ended = self.turn(ready, |position| polled.is_ready(first + position), Instant::now());
            self.polled = polled;
            if ended {
                tracing::debug!(number = self.number, faults = self.demands, "a fault loop has ended");
                return self.upstream;
            }
        }
    }

    /// Waits for something to do, and says where in the set the first userfaultfd is; the positions in the set are those of [`COMMANDS`], of the upstream if it has a
    /// descriptor, and of everybody served.
    fn wait(&mut self) -> io::Result<(Ready, usize)> {
        self.polled.clear();
        self.polled.add(self.commands.as_fd(), false);
        let upstream =
            self.upstream.as_ref().and_then(|upstream| Some((upstream.fd()?, upstream.wants_write())));
        let upstream = upstream.map(|(fd, wants_write)| self.polled.add(fd, wants_write));
        let mut first_uffd = None;
        let reads = self.number == 0 || Instant::now() < self.assists_until;
        let served = if reads { self.served.len() } else { 0 };
        for served in &self.served[..served] {
            let position = self.polled.add(served.uffd.as_fd(), false);
            first_uffd.get_or_insert(position);
        }
        let timeout = if self.has_work() {
            Duration::ZERO
        } else if !self.changing.is_empty() && self.changed.elapsed() < limits::CHANGE_SOON {
            limits::CHANGE_LOOK
        } else if !(self.deferred.is_empty() && self.unresolved.is_empty() && self.changing.is_empty()) {
            Duration::from_millis(1)
        } else {
            let due = self.upstream.as_ref().and_then(Upstream::due);
            let until_due = due.map(|due| due.saturating_duration_since(Instant::now()));
            until_due.map_or(limits::LIVENESS_INTERVAL, |left| limits::LIVENESS_INTERVAL.min(left))
        };
        self.polled.wait(timeout)?;
        let ready = Ready {
            command: self.polled.is_ready(COMMANDS),
            upstream: upstream.is_none_or(|position| self.polled.is_ready(position)),
            served,
        };
        Ok((ready, first_uffd.unwrap_or(0)))
    }

    /// Whether there is something to do without waiting: background reads from a source that answers at
    /// once.
    fn has_work(&self) -> bool {
        let at_once = self.upstream.as_ref().is_some_and(|u| u.fd().is_none() && u.background().is_some());
        let more = self.background_pages > 0 || self.cursor.0 < self.tree.len();
        at_once && self.running && more
    }
}
