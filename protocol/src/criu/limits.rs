//! Every bound on what CRIU's files and sockets may claim, each with its reason.
//!
//! The bounds are far above what CRIU produces and far below what could exhaust a host: a value past one of
//! them is a damaged or hostile input, never a large process.

/// Largest pid: the kernel's `PID_MAX_LIMIT` on 64-bit hosts (4 Mi).
pub const MAX_PID: u32 = 1 << 22;

/// Most tasks in one checkpoint: the default `pid_max`. Each live task costs the daemon one userfaultfd.
pub const MAX_TASKS: usize = 1 << 15;

/// Most threads of one task: above `threads-max` of any host that could have run it.
pub const MAX_THREADS_PER_TASK: usize = 1 << 20;

/// Most VMAs of one task: the `vm.max_map_count` of distributions that raise it (the kernel's default is 65530).
pub const MAX_VMAS: usize = 1 << 20;

/// Most entries of one pagemap: 128 GiB of memory with every other page dumped. About 512 MiB decoded.
pub const MAX_PAGEMAP_ENTRIES: usize = 1 << 24;

/// Largest record in an image. The largest CRIU writes is the `mm` record: [`MAX_VMAS`] of at most 80 bytes.
pub const MAX_RECORD_BYTES: usize = 128 << 20;

/// Largest image file read into memory: [`MAX_PAGEMAP_ENTRIES`] of at most 28 bytes, rounded up.
/// Pages files are read in place and have no such bound.
pub const MAX_IMAGE_BYTES: u64 = 512 << 20;

/// Deepest chain of `parent` directories. Pre-copy stops after a handful of rounds; a symlink loop never does.
pub const MAX_PARENT_DEPTH: usize = 64;

/// Length of `dump_criu_run_id`, a UUID in text form. It names CRIU's firewall table, so it may end up in a
/// command line; its alphabet is checked too.
pub const MAX_RUN_ID_BYTES: usize = 36;

/// Longest command name: the kernel's `TASK_COMM_LEN` without its NUL.
pub const MAX_COMM_BYTES: usize = 15;
