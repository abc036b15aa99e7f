//! Every bound of the session protocol, with its reason.

use std::time::Duration;

/// Protocol versions this build speaks.
pub const VERSION_MIN: u16 = 2;
/// See [`VERSION_MIN`].
pub const VERSION_MAX: u16 = 4;
/// Since when copies of pages may come compressed.
pub const VERSION_OF_LZ4: u16 = 4;
/// Since when a session may have more than one lane of a role.
pub const VERSION_OF_LANES: u16 = 3;
/// Most fault lanes and most push lanes of a session: a thread each at both ends.
pub const LANES_MAX: u8 = 8;

/// Largest body of a control frame: a chunk of an image file and its name fit.
pub const CONTROL_BODY_MAX: usize = 1 << 20;
/// Most memory that decoding a message takes for each of its bytes. The worst is a list whose elements are two empty
/// strings: 48 bytes of memory for 8 of message, and for a moment three times that while the list grows. So a control
/// message costs its receiver at most 18 MiB.
pub const MEMORY_PER_BYTE: usize = 18;
/// Largest piece of an image file in one frame; leaves room for the name.
pub const IMAGE_CHUNK_MAX: usize = 512 << 10;
/// Longest image file name: `pagemap-shmem-4294967295.img` is 28.
pub const IMAGE_NAME_MAX: usize = 255;
/// Largest single image file: shared memory and files' private pages travel in `pages-N.img`.
pub const IMAGE_SIZE_MAX: u64 = 64 << 30;
/// Most image files in one move; a task has about ten, and one more per thread.
pub const IMAGE_COUNT_MAX: u32 = 1 << 20;

/// Most pages in one piece of a map of settled pages: a bit each, 512 KiB. A multiple of 64.
pub const PAGES_PER_MAP_PIECE: u64 = 8 * (512 << 10);

/// Most pages in one page-data frame (1 MiB): bounds the receiver's buffer.
pub const PAGES_PER_FRAME_MAX: u32 = 256;
/// Most pages one demand request may ask for.
pub const PAGES_PER_REQUEST_MAX: u32 = 256;
/// Most areas of a task that a frame names (1 MiB); `vm.max_map_count` is 65,530 by default. Who has more says less
/// exactly: neighbouring areas as one.
pub const AREAS_MAX: usize = 65_536;
/// Largest piece of the clean pages' bits in one message (512 Ki pages).
pub const CLEAN_PIECE_MAX: usize = 64 << 10;
/// Most runs in one acknowledgement frame.
pub const RUNS_PER_ACK_MAX: usize = 4096;

/// Longest string in a control message: paths are at most 4096 bytes on Linux.
pub const STRING_MAX: usize = 8192;
/// Most entries of a list in a control message: files of a process tree with all its libraries, pids of
/// all threads.
pub const LIST_MAX: usize = 65_536;

/// How long a peer may take for its hello: it has nothing to wait for.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a peer may stay silent in the middle of a frame.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(30);
/// After this the kernel reports an unanswered connection as broken.
pub const DEAD_LINK_AFTER: Duration = Duration::from_secs(10);
