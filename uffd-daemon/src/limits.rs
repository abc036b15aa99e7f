//! Every bound of the daemon, with its reason.

use std::time::Duration;

use protocol::wire::limits::LANES_MAX;

/// Sessions at once; each needs threads, a CRIU and memory of its own.
pub const SESSIONS_MAX: usize = 64;
/// Sessions that were rolled back and are remembered: as many as may be open at once, many times over.
pub const ROLLED_BACK_MAX: usize = 16 * SESSIONS_MAX;
/// Connections that have not said hello yet: as many sources as there may be sessions, and all of them dial two lanes at once.
/// Each has a thread.
pub const STRANGERS_MAX: usize = 4 * SESSIONS_MAX;
/// Connections that wait for a session to take them: those of four attempts, each with as many lanes as there may be.
pub const ARRIVALS_MAX: usize = 4 * (1 + 2 * LANES_MAX as usize);
/// Faults that wait at once for which a session's further fault loops read as well.
pub const CROWD: u32 = 4;
/// How long they go on when they have found none.
pub const ASSISTANCE: Duration = Duration::from_millis(4);
/// How long who follows a daemon that was killed waits until it has let go of its port and of its keepers: a host with
/// more to do than processors takes seconds to end it.
pub const PORT_PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks.
pub const PORT_LOOK: Duration = Duration::from_millis(20);
/// How long it is waited for at most once every page is here: it only has to hear so.
pub const WHOLE_PATIENCE: Duration = Duration::from_secs(60);
/// Changes of address spaces that the journal of a move has room for: 64 MiB, if all of it is used. A task that
/// changes its mappings ten thousand times a second fills it in three minutes.
pub const JOURNAL_CHANGES: usize = (64 << 20) / 40;
/// Orders that changes under way together are tried in: all of five, and of more the nearest to the one they were read in. If
/// none of these fits, better ones than the best are looked for step by step.
pub const ORDERS_TRIED: usize = 200;
/// Places that the kernel is asked about for them.
pub const ORDER_POINTS: usize = 512;
/// How often a fault loop looks whether a change is over: whoever made it has to be woken first.
pub const CHANGE_LOOK: Duration = Duration::from_micros(50);
/// How long it looks that often.
pub const CHANGE_SOON: Duration = Duration::from_millis(1);
/// Largest description of a move: 16 bytes for each lazy run of a tree with a few hundred thousand, as text.
pub const DESCRIPTION_MAX: u64 = 64 << 20;
/// How long an address space may go on changing while its missing pages are poisoned.
pub const ABANDON_PATIENCE: Duration = Duration::from_secs(10);
/// Pages that are installed before the push looks again whether a fault is being served.
pub const INSTALL_SLICE_PAGES: usize = 16;
/// Of these, pages that the push installs while it holds their family's lock: 32 KiB copy in about 10 us, the longest that
/// a fault waits for the push in the installer.
pub const PIECE_PAGES: u64 = 8;
/// How often a fault tries for its family's lock before it sleeps there: about 50 us.
pub const LOCK_SPINS: u32 = 1500;
/// Bytes of the push lane that are received at a time: the smaller they are the sooner the source may send on, the larger
/// the fewer calls.
pub const PUSH_BUFFER: usize = 256 << 10;
/// Pages that one look for settled ones holds its family's lock for: at worst every other of them is settled, which takes 60 us.
pub const SWEEP_PAGES: u64 = 4096;
/// How long the push lane may be quiet before settled pages are looked for and acknowledged.
pub const ACK_INTERVAL: Duration = Duration::from_millis(100);
/// Settled runs that are acknowledged together. Each message wakes a thread of the source, on a processor that has
/// better things to do; the source keeps a page no longer than [`ACK_INTERVAL`] for it.
pub const ACKED_TOGETHER: usize = 32;
/// How long an address may be unregistered with no event about it before its pages count as unmapped.
pub const UNREGISTERED_PATIENCE: Duration = Duration::from_secs(2);
/// How long the source may be silent between two pieces of its images: it reads them out of memory.
pub const IMAGE_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of CRIU's first image, which has some hundred: what a pipe takes at once, however small the kernel makes it.
pub const INVENTORY_BYTES_MAX: usize = 4096;
/// How long restore may take from the last image to the switchover.
pub const RESTORE_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the source may take to commit once everything is prepared.
pub const COMMIT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long CRIU may take from the lifted barrier to running tasks, as seen by a daemon that takes over.
pub const RESUME_PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks.
pub const WORD_LOOK: Duration = Duration::from_millis(20);
/// How long a tree that a killed CRIU may have let go of is looked at: what it was about to change in a task ends that
/// task at once.
pub const LET_GO_PATIENCE: Duration = Duration::from_millis(500);
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
/// How long the source may take to say why it has closed a lane.
pub const REASON_PATIENCE: Duration = Duration::from_secs(1);
/// Tasks that pre-copy may bring pages of: as many as an offer can name.
pub const PRECOPY_TASKS_MAX: usize = protocol::wire::limits::LIST_MAX;
/// Areas of all tasks together that pre-copy may name: 16 MiB, for 16 tasks with as many areas as the kernel lets a task have.
pub const PRECOPY_AREAS_MAX: usize = 1 << 20;
/// Pages installed at a fault on one that is kept here, itself included: the rest of what the push would install at a time,
/// which spares a thread that reads on the next faults.
pub const LOCAL_FAULT_PAGES: u64 = INSTALL_SLICE_PAGES as u64;
/// How long a pause waits until everything is installed that is here: 64 GiB take as long.
pub const INSTALLING_PATIENCE: Duration = Duration::from_secs(30);
