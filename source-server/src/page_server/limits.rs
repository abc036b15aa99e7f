//! Every bound of the page server, with its reason.

use std::time::Duration;

/// Clients at once. Each has a thread and a buffer for one answer.
pub(super) const CLIENTS_MAX: usize = 64;
/// Pages in one answer: what CRIU's own server gives at most, so no client waits for more (4 MiB).
pub(super) const REPLY_PAGES_MAX: u64 = 1024;
/// Bytes of requests read at once: a hundred and more of them cost one system call.
pub(super) const REQUEST_BUFFER: usize = 4096;
/// How long a client may take to go away after its CLOSE was answered.
pub(super) const FAREWELL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked whether the tasks still stand still.
pub(super) const STILL_INTERVAL: Duration = Duration::from_millis(100);
/// A task seen running is looked at again after this: a debugger that hands a stopped task over lets it be
/// runnable for a moment, in which it runs no instruction of its own.
pub(super) const STILL_SECOND_LOOK: Duration = Duration::from_millis(20);
/// How often a tree is listed until two lists agree. Tasks that stand still have no children.
pub(super) const TREE_LISTINGS_MAX: usize = 8;
/// Pause after a connection could not be accepted (no descriptor left): the reason does not go at once.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// When a silent connection is probed first. There is no timeout for a silent client as such: it may have
/// nothing to ask, and it cannot come back to CRIU's daemon once its connection is gone.
pub(super) const KEEPALIVE_IDLE_SECS: u32 = 60;
/// Between two probes.
pub(super) const KEEPALIVE_INTERVAL_SECS: u32 = 15;
/// Unanswered probes after which the client's host counts as gone: five minutes more.
pub(super) const KEEPALIVE_PROBES: u32 = 20;
