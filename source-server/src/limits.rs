//! Every bound of the source, with its reason.

use std::time::Duration;

/// What `fs.pipe-max-size` must allow: CRIU 4.1 and 4.2 put up to 1024 pages into one pipe and, refused,
/// go on with a pipe that fails every request ("splice: Bad file descriptor").
pub const PIPE_MAX_SIZE: u64 = 4 << 20;
/// Bytes of memory per pipe that CRIU fills, two descriptors each.
pub const CRIU_BYTES_PER_PIPE: u64 = 4 << 20;
/// Pipe sizes to choose from, in pages: a fault in the middle of a pipe costs time in proportion to it, a
/// small one costs a descriptor more often, and the drain and the push more processor time.
pub const PIPE_PAGES: [u64; 3] = [64, 256, 1024];
/// Descriptors left for everything that is not a pipe of pages.
pub const SPARE_DESCRIPTORS: u64 = 512;
/// Pages in one pushed frame: a small one leaves room for a fault sooner, a large one costs fewer calls.
pub const PUSH_FRAME_PAGES: u64 = 64;
/// How often a tree is frozen at most until no stack pointer is page-aligned; each time it stands for some
/// milliseconds. One thread in 256 is, so this many tries serve a hundred busy threads.
pub const ALIGNED_STACK_TRIES: u32 = 8;
/// How long a process that is perhaps being killed is watched, to tell its end from a failure of CRIU's.
pub const EXIT_PATIENCE: Duration = Duration::from_millis(300);
/// How long tasks with a stop pending are watched until they stand still, to tell them from those that somebody has continued: each
/// needs a processor for a moment.
pub const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// How long a dump may take until its page server is ready.
pub const DUMP_TIMEOUT: Duration = Duration::from_secs(120);
/// How long an interrupted dump may go on: killed in the middle, CRIU would leave a task with code of CRIU's
/// in it and the network locked; ready, everything can be undone.
pub const INTERRUPTED_DUMP_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the destination may take to answer the offer.
pub const VERDICT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the destination may take from the last image to being prepared.
pub const RESTORE_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the destination may take from the commit to running tasks.
pub const RUNNING_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the destination may take to clean up after a roll-back.
pub const ROLLED_BACK_TIMEOUT: Duration = Duration::from_secs(20);
/// How long CRIU's page server may say nothing while it is drained; it has every page at hand.
pub const PAGE_SERVER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long CRIU may take to end after it was told to.
pub const CRIU_CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long acknowledgements may lag behind the destination's word that everything is settled.
pub const LAST_ACK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long killed tasks may take to disappear; freeing many GiB takes a while.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long to wait for the destination's reason once one of its lanes has ended.
pub const REASON_PATIENCE: Duration = Duration::from_secs(3);
/// How long after a fault the push stays off the processor that served it.
pub const FAULTS_REMEMBERED: Duration = Duration::from_millis(100);
/// Time slice of the threads on the fault path and of the push. Shorter than anybody's: a thread of the fault
/// path takes the processor when it wakes, and a task that wakes waits no longer for the push.
pub const SLICE_NS: u64 = 100_000;
/// Bytes of answers to faults that travel together: the first of them waits for the last to be read, some 50 us.
pub const ANSWERS_BYTES: usize = 64 << 10;
/// How often a push lane without acknowledgements is checked for a peer that is gone.
pub const LANE_LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long an answer to a fault may wait on the link behind the push; a push that queues nothing at all would
/// leave the link idle whenever its thread is late.
pub const PUSH_QUEUE: Duration = Duration::from_micros(500);
/// Least of the push that may be on its way: two of the largest segments that the kernel makes.
pub const PUSH_WINDOW_MIN: usize = 128 << 10;
/// Most of it: 10 Gbit/s over 10 ms.
pub const PUSH_WINDOW_MAX: usize = 16 << 20;
/// Longest round trip on which the push holds back: on a longer link what it queues matters less than that it comes
/// up to the link's rate soon, which the kernel sees to.
pub const PUSH_WINDOW_ROUND_TRIP: Duration = Duration::from_millis(5);
/// How far ahead of a fault the push goes on: about what a thread reads while a pushed page is on its way.
pub const PUSH_LEAD_PAGES: u64 = 256;
/// Most rounds of pre-copy that can be asked for: each costs the tree a first write to every page it writes again.
pub const PRECOPY_ROUNDS_MAX: u32 = 100;
/// Most rounds that `auto` makes: what does not get less in so many will not.
pub const PRECOPY_AUTO_ROUNDS: u32 = 10;
/// How long `auto` goes on copying what was written again.
pub const PRECOPY_TIME_MAX: Duration = Duration::from_secs(600);
/// What the link sends in this time is little: about what a freeze takes anyhow.
pub const PRECOPY_LITTLE: Duration = Duration::from_millis(30);
/// A round that leaves more than this part of what the one before left has brought nothing.
pub const PRECOPY_PROGRESS: f64 = 0.9;
/// Pages that are read and sent at a time: those of the largest frame.
pub const PRECOPY_BATCH_PAGES: u64 = 256;
/// How long the push lane may take nothing, and the destination may take to say that it has a round.
pub const PRECOPY_SILENCE: Duration = Duration::from_secs(30);
/// What the tree may grow by during pre-copy, in parts of its memory and in bytes; what it grows beyond is left to
/// post-copy.
pub const PRECOPY_GROWTH: (u64, u64) = (4, 16 << 20);
/// Niceness of the thread that copies while the tree works.
pub const PRECOPY_NICENESS: i32 = 10;
/// A link that takes a byte in less than so many nanoseconds (1 GB/s) is faster than LZ4 on one processor.
pub const COMPRESS_ABOVE_NS_PER_BYTE: f64 = 1.0;
/// One batch of so many is sent the other way, to see whether that has become the faster one.
pub const COMPRESS_TRY_OTHER: u32 = 64;
/// Batches with fewer bytes of pages say little about the link: they may fit into a buffer of ours.
pub const COMPRESS_MEASURED_BYTES: u64 = 512 << 10;
/// Pace of pre-copy by default. See docs/measuring.md.
pub const PRECOPY_RATE: &str = "128M";
/// Processors that there have to be for each lane of a kind: its threads at both ends, and as many for the process.
pub const PROCESSORS_PER_LANE: usize = 8;
/// Most lanes of a kind that nobody has asked for: a 100 Gbit/s link needs no more.
pub const LANES_BY_DEFAULT: usize = 4;
/// Threads that keep one fault lane busy: see docs/measuring.md.
pub const THREADS_PER_FAULT_LANE: usize = 4;
/// How long a destination that was lost behind the switchover is dialled, unless the operator says otherwise: long
/// enough for a link or a switch that starts again, short enough for a script that waits for the end.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(45);
/// How long it is dialled if its host says that nobody listens: a daemon that is started again needs less.
pub const NOBODY_LISTENS_PATIENCE: Duration = Duration::from_secs(30);
/// How long it is dialled if it says that it does not know the session: it has ended there.
pub const UNKNOWN_SESSION_PATIENCE: Duration = Duration::from_secs(3);
/// First and longest pause between two attempts. The longest is most of what a link that is up again waits for its
/// first page.
pub const REDIAL_PAUSE_MIN: Duration = Duration::from_millis(50);
/// See [`REDIAL_PAUSE_MIN`].
pub const REDIAL_PAUSE_MAX: Duration = Duration::from_millis(250);
/// Attempts of one process before those of its successor, which may never be behind: half an hour of dialling.
pub const ATTEMPTS_OF_A_PROCESS: u16 = 4096;
/// How long one attempt may take, in times of what the first connection took.
pub const REDIAL_PATIENCE_FACTOR: u32 = 4;
/// Bounds of that: less would be too little for a busy host, and more than a hello may take is of no use.
pub const REDIAL_PATIENCE_MIN: Duration = Duration::from_millis(400);
/// See [`REDIAL_PATIENCE_MIN`].
pub const REDIAL_PATIENCE_MAX: Duration = Duration::from_secs(5);
/// How long the destination may be silent on new connections before and between the pieces of its map: it may still
/// be lifting the barrier.
pub const MAP_TIMEOUT: Duration = Duration::from_secs(10);
