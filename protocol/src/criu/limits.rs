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

/// Most lazy pages of one tree: 4 TiB. Every page costs both sides some bits (128 MiB for each bitmap at the bound),
/// while a pagemap claims any number of them in ten bytes.
pub const MAX_LAZY_PAGES: u64 = 1 << 30;

/// Most bytes of one `pstree` record: [`MAX_THREADS_PER_TASK`] of at most six bytes, and four pids. Checked before
/// it is decoded, because a thread id takes four bytes decoded and may take one in the image.
pub const MAX_PSTREE_RECORD_BYTES: usize = 6 * MAX_THREADS_PER_TASK + 24;

/// Fewest bytes of a VMA in an image: tag, length, and seven required fields of at least two bytes. So the record's
/// length bounds the memory, which is a hundred bytes for each VMA.
pub const MIN_VMA_BYTES: usize = 16;

/// Most memory that decoding an image takes for each of its bytes. The worst is a VMA of [`MIN_VMA_BYTES`], which is
/// 120 bytes for a moment, three times that while the list of them grows, and 56 in the end.
pub const MEMORY_PER_BYTE: usize = 26;

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
