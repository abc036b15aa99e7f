//! Checks on another kernel than this host's: in a virtual machine whose first process is the program `subject`.
//!
//! ```text
//! @@ done: WHAT       after each check
//! @@ passed           or @@ failed: WHY
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use experiments::vs_qemu::MARK;
use experiments::vs_qemu::machine::{Guest, Machine, Parts};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::{panic_text, programs, skip, soft_dirty};

/// Memory for the programs and what they do.
const MIB: usize = 768;

/// Boots a guest that makes these checks.
///
/// # Panics
/// If one fails, or the guest falls silent.
#[track_caller]
pub fn assert_passes(checks: &str) {
    let kernel = match Parts::kernel() {
        Ok(kernel) => kernel,
        Err(why) => return skip(why),
    };
    let dir = tempfile::Builder::new().prefix("postcopy-guest-").tempdir_in("/dev/shm").expect("a directory");
    let [subject, experiments] = ["subject", "experiments"].map(programs::program);
    // Where `programs` looks for them.
    let places = [("release/subject", &*subject), ("release/experiments", &*experiments)];
    let parts = Parts::new(kernel, dir.path(), &places).unwrap_or_else(|error| panic!("{error:#}"));
    let guest = Guest {
        mib: MIB,
        processors: 2,
        kernel_line: "rdinit=/release/subject transparent_hugepage=madvise",
        arguments: &format!("guest {checks}"),
        is_incoming: false,
    };
    let begun = Instant::now();
    let machine = Machine::start(&parts, "guest", guest, dir.path());
    let mut machine = machine.unwrap_or_else(|error| panic!("{error:#}"));
    loop {
        let line = machine.line().unwrap_or_else(|error| panic!("{error:#}"));
        println!("{:6.1} s  {line}", begun.elapsed().as_secs_f64());
        match line.split_once(": ") {
            Some(("failed", why)) => panic!("in the guest: {why}"),
            None if line == "passed" => return,
            _ => {}
        }
    }
}

/// The first process of the guest.
///
/// # Errors
/// If it cannot be set up.
pub fn main(checks: &str) -> anyhow::Result<()> {
    for (what, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        std::fs::create_dir_all(place)?;
        mount(Some(what), place, Some(what), MsFlags::empty(), None::<&str>)?;
    }
    let made = catch_unwind(AssertUnwindSafe(|| match checks {
        "soft-dirty" => soft_dirty::checks(Path::new("/tmp"), |done| println!("{MARK}done: {done}")),
        other => panic!("no such checks: {other}"),
    }));
    match made {
        Ok(()) => println!("{MARK}passed"),
        Err(panic) => println!("{MARK}failed: {}", panic_text(&*panic).replace('\n', "; ")),
    }
    reboot(RebootMode::RB_POWER_OFF)?;
    Ok(())
}
