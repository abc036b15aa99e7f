//! Why the bytes of an image could not be decoded.

use thiserror::Error;

use super::framing::ImageKind;
use crate::criu::limits;

/// Why the bytes of an image could not be decoded. The file name belongs to the caller's error.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The image ends inside its magic words.
    #[error("read {kind} image: {found} bytes are too few for its magic words; the file was cut short")]
    ShortMagic {
        /// What was decoded.
        kind: ImageKind,
        /// Bytes there are.
        found: usize,
    },
    /// A magic word is another one.
    #[error("read {kind} image: magic word is {found:#010x}, expected {expected:#010x}")]
    Magic {
        /// What was decoded.
        kind: ImageKind,
        /// Word the format asks for.
        expected: u32,
        /// Word in the image.
        found: u32,
    },
    /// An image of the first format, or an inventory that announces such images.
    #[error(
        "read {kind} image: image format 1 (no common magic) is not supported; dump again with a current CRIU"
    )]
    VersionOne {
        /// What was decoded.
        kind: ImageKind,
    },
    /// The inventory announces a format that does not exist yet.
    #[error(
        "read inventory image: unknown image format {0}; written by a CRIU newer than this program knows"
    )]
    UnknownVersion(u32),
    /// A record, or its length word, goes past the end of the image.
    #[error(
        "read {kind} image: record at byte {offset} needs {needed} bytes, {found} are left; the file was cut short"
    )]
    RecordTruncated {
        /// What was decoded.
        kind: ImageKind,
        /// Where the record's length word stands.
        offset: usize,
        /// Bytes the length word, or the record it announces, takes.
        needed: usize,
        /// Bytes there are.
        found: usize,
    },
    /// A record announces more than [`limits::MAX_RECORD_BYTES`].
    #[error(
        "read {kind} image: record at byte {offset} claims {len} bytes, more than {}",
        limits::MAX_RECORD_BYTES
    )]
    RecordTooLarge {
        /// What was decoded.
        kind: ImageKind,
        /// Where the record's length word stands.
        offset: usize,
        /// Bytes it claims.
        len: u32,
    },
    /// The image has no record where one must be.
    #[error("read {kind} image: it holds no record")]
    RecordMissing {
        /// What was decoded.
        kind: ImageKind,
    },
    /// An image of exactly one record holds more.
    #[error("read {kind} image: bytes follow its only record, from byte {offset}")]
    RecordUnexpected {
        /// What was decoded.
        kind: ImageKind,
        /// Where the second record starts.
        offset: usize,
    },
    /// A record is not the protobuf message it must be.
    #[error("parse {message}")]
    Protobuf {
        /// Name of the message.
        message: &'static str,
        /// What the parser said.
        source: prost::DecodeError,
    },
    /// A record breaks off or holds what protobuf does not know.
    #[error("parse {message}: its fields do not fill the record")]
    Malformed {
        /// Name of the message.
        message: &'static str,
    },
    /// A field the format requires is absent.
    #[error("parse {message}: field {field} is missing")]
    FieldMissing {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
    },
    /// A field that may change the meaning of the rest.
    #[error(
        "parse {message}: unknown field {tag}; written by a CRIU newer than this program knows, perhaps compressed"
    )]
    FieldUnknown {
        /// Name of the message.
        message: &'static str,
        /// Number of the field.
        tag: u32,
    },
    /// More of something than any process has.
    #[error("parse {message}: more than {limit} {what}")]
    TooMany {
        /// Name of the message.
        message: &'static str,
        /// What there is too much of.
        what: &'static str,
        /// The bound in [`limits`].
        limit: usize,
    },
    /// A pid outside `1..=`[`limits::MAX_PID`].
    #[error("parse {message}: {pid} is not a pid (1 to {})", limits::MAX_PID)]
    Pid {
        /// Name of the message.
        message: &'static str,
        /// The value.
        pid: u32,
    },
    /// Two tasks with one pid.
    #[error("parse pstree_entry: pid {0} is listed twice")]
    DuplicateTask(u32),
    /// The run id is not a UUID in text form.
    #[error("parse inventory_entry: dump_criu_run_id is not a UUID")]
    RunId,
    /// An address that is not page-aligned.
    #[error("parse {message}: address {address:#x} is not page-aligned")]
    Unaligned {
        /// Name of the message.
        message: &'static str,
        /// The address.
        address: u64,
    },
    /// A VMA that ends where it starts or before.
    #[error("parse vma_entry: VMA at {start:#x} ends at {end:#x}")]
    EmptyVma {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// A run of no pages, or one that ends behind the address space.
    #[error("parse pagemap_entry: {pages} pages from {start:#x} are no run of pages")]
    PageCount {
        /// First address.
        start: u64,
        /// Number of pages claimed.
        pages: u64,
    },
    /// Ranges that are not in ascending order, or overlap.
    #[error("parse {message}: range at {start:#x} starts below {previous_end:#x}, where the one before ends")]
    Unsorted {
        /// Name of the message.
        message: &'static str,
        /// Start of the range.
        start: u64,
        /// End of the one before.
        previous_end: u64,
    },
    /// Page flags that are unknown, contradict each other or say nothing.
    #[error(
        "parse pagemap_entry: entry at {start:#x} has flags {flags:#x}, which do not say where its pages are"
    )]
    PageFlags {
        /// First address.
        start: u64,
        /// The flags.
        flags: u32,
    },
}
