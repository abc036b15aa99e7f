//! The destination of a move: receives userfaultfds from `criu restore`, resolves faults from the source,
//! installs what is pushed, and never lets a missing page read as zero.
//!
//! - [`cli`]: the command line
//! - [`serve`]: listens for moves; [`session`]: one move, phase by phase
//! - [`lazy_pages`]: the drop-in for `criu lazy-pages`
//! - [`preflight`], [`restore`], [`barrier`], [`pidns`], [`handover`]: bringing the tree up, held back
//! - [`pages`]: which pages are where; [`tree`]: the same for a whole tree, shared between threads
//! - [`cache`]: pages that came before the freeze, until they are installed
//! - [`fault`], [`prefetch`], [`inflight`], [`upstream`]: from a fault to its wake; [`push`], [`intake`]: pages that come unasked;
//!   [`background`]: how those are installed that nobody waits for
//! - [`steering`]: where the threads of both run; [`awake`]: processors that do not go to sleep between two faults
//! - [`keeper`]: what keeps tasks safe from a daemon that dies; [`journal`]: what it has to know of their address spaces
//! - [`takeover`], [`abandon`]: what becomes of a move whose daemon has ended
#![forbid(unsafe_code)]

pub mod abandon;
pub mod awake;
pub mod background;
pub mod barrier;
pub mod cache;
pub mod cli;
pub mod fault;
pub mod handover;
pub mod inflight;
pub mod intake;
pub mod journal;
pub mod keeper;
pub mod latency;
pub mod lazy_pages;
pub mod limits;
pub mod pages;
pub mod pidns;
pub mod prefetch;
pub mod preflight;
pub mod push;
pub mod restore;
pub mod serve;
pub mod session;
pub mod steering;
pub mod takeover;
pub mod tombstone;
pub mod tree;
pub mod upstream;
