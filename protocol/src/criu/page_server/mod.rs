//! Headers of CRIU's page-server protocol.
//!
//! ```text
//!   reader (lazy-pages daemon)                 page server (criu dump --lazy-pages, or us)
//!     GET   pages, addr, pid           ──►
//!                                      ◄──     ADD_F|PRESENT  pages', addr, pid, then pages' * 4096 bytes
//!     ...                                      1 <= pages' <= pages; replies come in request order
//!     CLOSE (or FORCE_CLOSE)           ──►
//!                                      ◄──     i32 status, 0
//!     EOF
//! ```
//!
//! There is no version exchange, and two layouts of the header:
//!
//! ```text
//!   Compact (CRIU <= 4.1.1, 24 bytes)      u32 command │ u32 pages │ u64 addr │ u64 dst
//!   Wide    (CRIU >= 4.2,   32 bytes)      u32 command │ u32 zero  │ u64 pages │ u64 addr │ u64 dst
//! ```
//!
//! The low half of `command` is the command, the high half page flags (of ADD_F only). An EOF without CLOSE is
//! not an error for CRIU: `criu dump` then reports success and kills the task, whatever was read.

mod buf;
mod error;
mod header;
mod layout;

pub use buf::HeaderBuf;
pub use error::HeaderError;
pub use header::{Command, Header};
pub use layout::{HeaderLayout, MAX_HEADER_LEN};

/// Bytes of the answer to CLOSE and FORCE_CLOSE: an `i32`, little-endian, always 0.
pub const CLOSE_STATUS_LEN: usize = 4;
