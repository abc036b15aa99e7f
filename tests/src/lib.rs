//! What the end-to-end tests under `tests/tests/` have in common: they move real processes with the real programs
//! and a real CRIU, and look at what came of it from outside.
//!
//! - [`site`]: the place of one test, and what must not be left there
//! - [`programs`]: where the programs and CRIUs are
//! - [`tool`]: a program of ours as a process: its lines, its end
//! - [`moves`]: both sides of a move, started, waited for and judged
//! - [`keys`]: by which the sides know each other on links that authenticate
//! - [`accounts`]: what two reports of one move must agree on
//! - [`stamps`]: the stamping workload before, during and after a move
//! - [`gate`]: a hook that stops a move at a phase until the test lets it go on
//! - [`proxy`]: a link between the sides that the test can cut
//! - [`moments`]: where a test stops a move, so that something happens exactly there
//! - [`peer`]: one side of the session protocol, played by the test
//! - [`echo`]: a server with an established connection
//! - [`stock`]: CRIU's own programs, as scripts use them; [`valve`]: a connection to a page server that stalls
//! - [`receiver`]: the receiving end of pre-copy, played by the test
//! - [`subject`]: a process that waits in a call or writes by order; [`shadow`]: what a destination would have
//! - [`guest`]: checks on another kernel, in a virtual machine; [`soft_dirty`]: those of the tracker by that name
//! - [`processes`]: who is there, without touching anybody's memory
//! - [`fuzz`]: hostile input for every decoder, without processes
//! - [`simulation`]: both engines in one world of their own, without a kernel
//!
//! What does not come true panics with what the programs said. Nothing waits without a deadline.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

pub mod accounts;
pub mod echo;
pub mod fuzz;
pub mod gate;
pub mod guest;
pub mod keys;
pub mod moments;
pub mod moves;
pub mod peer;
pub mod processes;
pub mod programs;
pub mod proxy;
pub mod receiver;
pub mod shadow;
pub mod simulation;
pub mod site;
pub mod soft_dirty;
pub mod stamps;
pub mod stock;
pub mod subject;
pub mod tool;
pub mod trackers;
pub mod valve;

/// Says why a test, or a part of one, cannot run here, and has `scripts/test` count it as skipped.
///
/// # Panics
/// If the file that `scripts/test` names cannot be written.
pub fn skip(why: impl std::fmt::Display) {
    let why = why.to_string().replace('\n', "; ");
    eprintln!("skipped: {why}");
    if let Some(file) = std::env::var_os("POSTCOPY_TEST_SKIPPED") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).expect("the list");
        std::io::Write::write_all(&mut file, format!("{why}\n").as_bytes()).expect("the list");
    }
}

/// How long one step of a test may take: many times what it takes on a slow machine.
pub const STEP: Duration = Duration::from_secs(60);
/// How long a whole move may take.
pub const MOVE: Duration = Duration::from_secs(180);

/// Whether the long variants run: `POSTCOPY_TEST_LONG=1`.
#[must_use]
pub fn long() -> bool {
    std::env::var_os("POSTCOPY_TEST_LONG").is_some_and(|value| value == "1")
}

/// What a panic said that was caught, so that the cases behind it run as well.
#[must_use]
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Looks until `found` finds something, for what the kernel tells nobody about.
///
/// # Panics
/// If it does not within `limit`; says `what`.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, found: impl FnMut() -> Option<T>) -> T {
    eventually_or_say(what, limit, found, String::new)
}

/// As [`eventually`], with what else there is to say if it does not.
///
/// # Panics
/// If it does not within `limit`.
#[track_caller]
pub fn eventually_or_say<T>(
    what: &str,
    limit: Duration,
    mut found: impl FnMut() -> Option<T>,
    say: impl FnOnce() -> String,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = found() {
            return found;
        }
        if Instant::now() > deadline {
            panic!("{what}: not within {limit:?}\n{}", say());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
