//! Why an image directory could not be read.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::criu::images::DecodeError;
use crate::criu::limits;
use crate::units::{ImageAddr, TaskId};

/// Why an image directory could not be read.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The path is no directory.
    #[error("open {}: not a directory; give the directory that `criu dump -D` wrote", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// An image that must be there is not.
    #[error("find {}: the images are incomplete; did the dump succeed, and was all of it copied?", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// A symlink, directory or device in place of an image.
    #[error("open {}: not a regular file", path.display())]
    NotAFile {
        /// Where it is.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was done, a verb.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An image above [`limits::MAX_IMAGE_BYTES`].
    #[error("read {}: {found} bytes are more than an image has (at most {})", path.display(), limits::MAX_IMAGE_BYTES)]
    TooLarge {
        /// Where it is.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// An image is damaged, or of a format that is not known.
    #[error("decode {}", path.display())]
    Decode {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        source: DecodeError,
    },
    /// A core image says neither that its task lives nor that it is dead.
    #[error("read {}: unknown task state {state}; written by a CRIU newer than this program knows", path.display())]
    TaskState {
        /// Where it is.
        path: PathBuf,
        /// The state.
        state: u32,
    },
    /// A thread id of a live task that is no pid.
    #[error("read {}: task {task} has a thread {thread}, which is no pid", path.display())]
    Thread {
        /// Where it is said.
        path: PathBuf,
        /// The task.
        task: TaskId,
        /// The id.
        thread: u32,
    },
    /// A lazy page that is in no VMA, so that nobody could ever install it.
    #[error(
        "read {}: lazy page {addr} is in no VMA of task {task}; are the images of two dumps mixed?",
        path.display()
    )]
    LazyOutsideVmas {
        /// The pagemap image.
        path: PathBuf,
        /// The task.
        task: TaskId,
        /// The page.
        addr: ImageAddr,
    },
    /// A chain of parent directories that does not end.
    #[error(
        "follow {}: more than {} parent directories; does a parent link point back?",
        path.display(),
        limits::MAX_PARENT_DEPTH
    )]
    ParentDepth {
        /// The link that was one too many.
        path: PathBuf,
    },
    /// A statistics file about the other direction.
    #[error("read {}: it does not hold the statistics its name promises", path.display())]
    NoStats {
        /// Where it is.
        path: PathBuf,
    },
}
