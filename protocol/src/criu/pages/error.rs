//! Why pages could not be read from images.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::index::Location;
use crate::criu::checkpoint::ImageError;
use crate::criu::limits;
use crate::units::ImageAddr;

/// Why pages could not be read from images.
#[derive(Debug, Error)]
pub enum PagesError {
    /// The images that say where pages are could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// More levels than a chain may have.
    #[error("index pages: more than {limit} levels of images", limit = limits::MAX_PARENT_DEPTH + 1)]
    TooDeep,
    /// Entries of a level that overlap or do not ascend.
    #[error("index pages: entry at {start} of level {level} starts below the end of the one before")]
    Unsorted {
        /// Level, 0 for the top.
        level: usize,
        /// Start of the entry.
        start: ImageAddr,
    },
    /// A pages file that is shorter than its pagemap says.
    #[error(
        "open {}: {needed} bytes are needed, {found} are there; the file was cut short, copy it again",
        path.display()
    )]
    Truncated {
        /// The file; also if it is missing, with 0 bytes found.
        path: PathBuf,
        /// Bytes of present pages in the pagemap.
        needed: u64,
        /// Length of the file.
        found: u64,
    },
    /// The page is not in the images.
    #[error("read page {addr}: it is not in the images ({location})")]
    NotInImages {
        /// The page.
        addr: ImageAddr,
        /// Where it is instead.
        location: Location,
    },
    /// Reading a pages file failed.
    #[error("read page {addr} from {}", path.display())]
    Read {
        /// The first page of what was read.
        addr: ImageAddr,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}
