//! Why a page-server header was refused.

use thiserror::Error;

use super::header::Command;

/// Why a page-server header was refused. The stream behind it cannot be read any more: close the connection.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum HeaderError {
    /// Fewer bytes than the layout has.
    #[error("decode page-server header: {found} bytes, the layout has {needed}")]
    Short {
        /// Bytes of the layout.
        needed: usize,
        /// Bytes there are.
        found: usize,
    },
    /// A command of no CRIU up to 4.2.
    #[error(
        "decode page-server header: unknown command {0:#010x}; does the peer use the other header layout?"
    )]
    UnknownCommand(u32),
    /// Page flags that do not exist.
    #[error("decode page-server header: unknown page flags {0:#x}")]
    UnknownFlags(u32),
    /// The first header of a client fits both layouts.
    #[error("tell the header layout from a first {0:?} header: it fits both; say compact or wide")]
    AmbiguousLayout(Command),
    /// A page count that the compact layout cannot hold.
    #[error("encode page-server header: {0} pages do not fit the 24-byte header")]
    TooManyPages(u64),
    /// A header that is no request for pages.
    #[error("serve page-server request: {0:?} is not a request for pages")]
    NotGet(Command),
    /// A GET that names no run of pages.
    #[error("serve page-server request: {pages} pages from {addr:#x} are no run of pages")]
    NotARun {
        /// First address.
        addr: u64,
        /// Number of pages.
        pages: u64,
    },
    /// A GET for something that is no pid.
    #[error("serve page-server request: {0:#x} is not a pid")]
    NotAPid(u64),
    /// An answer that is not ADD_F with data.
    #[error("check page-server reply: it is {command:?} with flags {flags:#x}, not pages with data")]
    NotPages {
        /// Command of the answer.
        command: Command,
        /// Its page flags.
        flags: u32,
    },
    /// An answer to another request than the oldest open one.
    #[error(
        "check page-server reply: pages at {addr:#x} of {dst} came, {want_addr:#x} of {want_dst} was asked for"
    )]
    OtherRequest {
        /// Address in the answer.
        addr: u64,
        /// Destination id in the answer.
        dst: u64,
        /// Address in the request.
        want_addr: u64,
        /// Destination id in the request.
        want_dst: u64,
    },
    /// An answer with no page, or more than asked for.
    #[error("check page-server reply: {found} pages at {addr:#x} came, 1 to {wanted} were asked for")]
    PageCount {
        /// Address in both.
        addr: u64,
        /// Pages in the answer.
        found: u64,
        /// Pages in the request.
        wanted: u64,
    },
}
