//! Every bound of the daemon, with its reason.

use std::time::Duration;

/// Sessions at once; each needs threads, a CRIU and memory of its own.
pub const SESSIONS_MAX: usize = 64;
/// Connections that have not said hello yet.
pub const STRANGERS_MAX: usize = 64;
/// Pages that one install holds its family's lock for: 64 KiB copy in about 15 us, which is the longest a
/// fault waits for the push in the installer.
pub const INSTALL_SLICE_PAGES: usize = 16;
/// Pages that one look for settled ones holds its family's lock for: at worst every other of them is settled, which takes 60 us.
pub const SWEEP_PAGES: u64 = 4096;
/// How long the push lane may be quiet before settled pages are looked for and acknowledged.
pub const ACK_INTERVAL: Duration = Duration::from_millis(100);
/// Settled runs that are acknowledged together. Each message wakes a thread of the source, on a processor that has
/// better things to do; the source keeps a page no longer than [`ACK_INTERVAL`] for it.
pub const ACKED_TOGETHER: usize = 16;
/// How long an address may be unregistered with no event about it before its pages count as unmapped.
pub const UNREGISTERED_PATIENCE: Duration = Duration::from_secs(2);
/// How long restore may take from the last image to the switchover.
pub const RESTORE_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the source may take to commit once everything is prepared.
pub const COMMIT_TIMEOUT: Duration = Duration::from_secs(60);
/// How often an idle fault loop looks whether its tasks are still there.
pub const LIVENESS_INTERVAL: Duration = Duration::from_millis(500);
/// Background bytes that may be on their way from a CRIU page server (one connection for everything):
/// small enough for a fault to pass in about 100 us, large enough to hide a round trip.
pub const BACKGROUND_PAGES_IN_FLIGHT: u64 = 128;
/// Pages of one background request.
pub const BACKGROUND_REQUEST_PAGES: u64 = 64;
/// How often it is looked where the faulting threads run.
pub const STEERING_PAUSE: Duration = Duration::from_millis(5);
/// After so many looks without a new fault every processor is free again.
pub const STEERING_MEMORY: u32 = 20;
/// Threads of a process that are looked at: more are everywhere, and cost time.
pub const STEERED_THREADS: usize = 32;
/// Time slice of the threads on the fault path and of the push. Shorter than anybody's: a thread of the fault
/// path takes the processor when it wakes, and a task that wakes waits no longer for the push.
pub const SLICE_NS: u64 = 100_000;
/// Streams of faults at equal distances that are told apart in a family: two for each of sixteen threads.
pub const STREAMS: usize = 32;
/// Largest step of a stream in pages: 1 MiB. Farther apart, faults are strangers.
pub const STREAM_STEP_MAX: u64 = 256;
/// Pages that are asked for ahead once a stream is proven.
pub const PREFETCH_START_PAGES: u64 = 4;
/// Most pages asked for ahead at a time: 32 take about 75 us on the fault lane, which is the longest that the
/// fault of another thread waits for them.
pub const PREFETCH_PAGES: u64 = 32;
