//! The trackers that this host has.

use source_server::track::choice::choose;
use source_server::track::{Method, Tracker};

use crate::skip;

/// The tracker by write protection, if this host has it.
#[must_use]
pub fn write_protect() -> Option<Box<dyn Tracker>> {
    if !nix::unistd::geteuid().is_root() {
        skip("tracking another process needs root");
        return None;
    }
    let (tracker, refused) = choose();
    if tracker.method() != Method::WriteProtect {
        skip(format!("{refused:?}"));
        return None;
    }
    Some(tracker)
}
