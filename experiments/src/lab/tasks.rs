//! Which processes are in a namespace, and their end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kernel::pidfd::PidFd;
use nix::sys::signal::Signal;

use super::{Host, Lab};

/// How long the processes of a namespace may take to be gone after they were killed.
const END_LIMIT: Duration = Duration::from_secs(5);

impl Lab {
    /// The pids of all processes in a host, also of those that were restored there into a PID namespace of their
    /// own.
    #[must_use]
    pub fn pids_in(&self, host: Host) -> Vec<u32> {
        pids_in(&self.path(host))
    }
}

fn pids_in(namespace: &Path) -> Vec<u32> {
    let Ok(namespace) = fs::metadata(namespace) else { return Vec::new() };
    let inside = |pid: &u32| {
        fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|net| (net.dev(), net.ino()) == (namespace.dev(), namespace.ino()))
    };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != std::process::id()).filter(inside).collect()
}

/// Kills every process in a namespace. A namespace that belongs to a lab has no process but those that were started
/// in it on purpose. A stopped or frozen one dies too.
pub(super) fn end_all_in(namespace: &Path) {
    let deadline = Instant::now() + END_LIMIT;
    loop {
        let pids = pids_in(namespace);
        if pids.is_empty() || Instant::now() > deadline {
            return;
        }
        for pid in pids {
            // Held first, then looked at again: by now the pid could be somebody else's.
            let Ok(held) = PidFd::open(pid) else { continue };
            if pids_in(namespace).contains(&pid) {
                let _ = held.signal(Signal::SIGKILL as i32);
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
