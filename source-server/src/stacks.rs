//! Sees to it that CRIU makes memory lazy.
//!
//! CRIU leaves the page under each stack pointer out of the lazy ones, and compares only the offset within a page:
//! one thread whose stack pointer lies on the first byte of a page makes all memory of its process non-lazy, and
//! the move a plain copy. One in 256 stack pointers does, so a process with many threads is rarely free of them.
//! Between freezing the tree and touching it CRIU takes some milliseconds; in that time it can be sent away, and
//! the tasks run on as if nothing had been.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use host::criu::Running;
use protocol::units::PAGE_SIZE;

use crate::process::{children, state, thread_state};

/// How long a stopped CRIU may take to stand.
const STOP_PATIENCE: Duration = Duration::from_millis(100);

/// Watches a tree being frozen.
#[derive(Debug)]
pub struct StackWatch {
    root: u32,
    /// Where the root's main thread stood when it was seen frozen.
    root_at: Option<String>,
    /// Processes with a thread that was not seen frozen.
    pending: Vec<u32>,
    seen: HashSet<u32>,
}

/// What a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stacks {
    /// Some thread still runs.
    Running,
    /// This thread's stack pointer is page-aligned.
    Aligned(u32),
    /// Everything is frozen, and no stack pointer is page-aligned.
    Good,
}

impl StackWatch {
    /// A watch over the tree below `root`.
    #[must_use]
    pub fn new(root: u32) -> Self {
        Self { root, root_at: None, pending: vec![root], seen: HashSet::new() }
    }

    /// Whether the root was seen frozen.
    #[must_use]
    pub const fn has_begun(&self) -> bool {
        self.root_at.is_some()
    }

    /// Looks at the threads that were frozen since the last look.
    pub fn look(&mut self) -> Stacks {
        let mut next = 0;
        while let Some(&pid) = self.pending.get(next) {
            let mut complete = true;
            for tid in threads(pid) {
                if self.seen.contains(&tid) {
                    continue;
                }
                match thread_state(pid, tid) {
                    Ok('t') => {}
                    // Gone, or a zombie: it has no stack.
                    Err(_) | Ok('Z' | 'X') => continue,
                    Ok(_) => {
                        complete = false;
                        continue;
                    }
                }
                let Ok(at) = place(pid, tid) else { continue };
                self.seen.insert(tid);
                if is_aligned(&at) {
                    return Stacks::Aligned(tid);
                }
                if tid == self.root {
                    self.root_at = Some(at);
                }
            }
            if complete {
                self.pending.extend(children(pid).unwrap_or_default());
                self.pending.swap_remove(next);
            } else {
                next += 1;
            }
        }
        if self.pending.is_empty() { Stacks::Good } else { Stacks::Running }
    }

    /// Kills CRIU if it has not touched the tree yet; false if it has, and goes on.
    ///
    /// # Errors
    /// The errno of signalling it.
    pub fn send_away(&self, criu: &mut Running) -> io::Result<bool> {
        criu.signal(nix::libc::SIGSTOP)?;
        let deadline = Instant::now() + STOP_PATIENCE;
        while state(criu.pid()).is_ok_and(|state| state != 'T') && Instant::now() < deadline {
            std::thread::yield_now();
        }
        if self.is_untouched() {
            criu.kill();
            return Ok(true);
        }
        criu.signal(nix::libc::SIGCONT)?;
        Ok(false)
    }

    /// CRIU begins with the root: it has the main thread map memory that both share.
    fn is_untouched(&self) -> bool {
        let same = match (&self.root_at, place(self.root, self.root)) {
            (Some(before), Ok(now)) => *before == now,
            // The root's main thread is the one with the aligned stack.
            (None, Ok(now)) => is_aligned(&now),
            (_, Err(_)) => false,
        };
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.root)).unwrap_or_default();
        same && !maps.is_empty() && !maps.contains(" rwxs ") && !maps.contains("memfd:CRIU")
    }
}

fn threads(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok()).collect()
}

/// Whether a thread of a process that runs sleeps where CRIU would make all of its memory non-lazy.
#[must_use]
pub fn sleeps_on_page_border(pid: u32) -> bool {
    // Of one that runs it says only that.
    threads(pid).into_iter().any(|tid| place(pid, tid).is_ok_and(|at| is_aligned(&at)))
}

/// Where a thread that does not run stands: its system call, stack pointer and program counter.
fn place(pid: u32, tid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall"))
}

fn is_aligned(place: &str) -> bool {
    stack_pointer(place).is_some_and(|sp| sp % PAGE_SIZE as u64 == 0)
}

/// The stack pointer in a `/proc/PID/syscall`: the last field but one, wherever the thread is.
fn stack_pointer(place: &str) -> Option<u64> {
    let hex = place.split_whitespace().rev().nth(1)?;
    u64::from_str_radix(hex.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_stack_pointer_in_and_outside_of_system_calls() {
        assert_eq!(stack_pointer("-1 0x7f5c783fd000 0x5583871ce247\n"), Some(0x7f5c_783f_d000));
        assert_eq!(
            stack_pointer("230 0x1 0x0 0x0 0x0 0x0 0x0 0x7ffc03836e30 0x7f5c7a7ed545\n"),
            Some(0x7ffc_0383_6e30)
        );
        assert_eq!(stack_pointer("running\n"), None);
    }

    #[test]
    fn a_tree_that_runs_is_not_judged() {
        let mut watch = StackWatch::new(std::process::id());
        assert_eq!(watch.look(), Stacks::Running);
        assert!(!watch.has_begun());
    }
}
