//! Files of an image directory: names, bounded reading, the chain of parents.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

use super::error::ImageError;
use crate::criu::images::DecodeError;
use crate::criu::limits::{MAX_IMAGE_BYTES, MAX_PARENT_DEPTH};
use crate::units::TaskId;

const PARENT_LINK: &str = "parent";

/// Names of the images this project knows. A name never has a path separator, so it stays in its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageName {
    /// `inventory.img`
    Inventory,
    /// `pstree.img`
    Pstree,
    /// `core-PID.img`
    Core(TaskId),
    /// `mm-PID.img`
    Mm(TaskId),
    /// `pagemap-PID.img`
    Pagemap(TaskId),
    /// `pages-ID.img`, by the id in the pagemap's head.
    Pages(u32),
    /// `stats-dump`
    StatsDump,
    /// `stats-restore`
    StatsRestore,
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inventory => f.write_str("inventory.img"),
            Self::Pstree => f.write_str("pstree.img"),
            Self::Core(id) => write!(f, "core-{id}.img"),
            Self::Mm(id) => write!(f, "mm-{id}.img"),
            Self::Pagemap(id) => write!(f, "pagemap-{id}.img"),
            Self::Pages(id) => write!(f, "pages-{id}.img"),
            Self::StatsDump => f.write_str("stats-dump"),
            Self::StatsRestore => f.write_str("stats-restore"),
        }
    }
}

/// A directory with images.
#[derive(Clone, Debug)]
pub(in crate::criu) struct ImageDir {
    path: PathBuf,
}

impl ImageDir {
    pub(in crate::criu) fn open(path: &Path) -> Result<Self, ImageError> {
        let metadata = std::fs::metadata(path).map_err(|source| ImageError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        })?;
        if !metadata.is_dir() {
            return Err(ImageError::NotADirectory { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned() })
    }

    /// Where an image is, or should be.
    pub(in crate::criu) fn path(&self, name: ImageName) -> PathBuf {
        self.path.join(name.to_string())
    }

    /// The directory and its parents, the newest first.
    pub(in crate::criu) fn chain(self) -> Result<Vec<Self>, ImageError> {
        let mut chain = vec![self];
        while let Some(link) = chain.last().map(|dir| dir.path.join(PARENT_LINK)) {
            // Resolved at each step: the kernel follows at most 40 links in one path.
            match std::fs::canonicalize(&link) {
                // A link that leads nowhere is no parent for CRIU either; pages that need it are missed later.
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(source) => return Err(ImageError::Io { action: "follow", path: link, source }),
                Ok(_) if chain.len() > MAX_PARENT_DEPTH => {
                    return Err(ImageError::ParentDepth { path: link });
                }
                Ok(parent) => chain.push(Self::open(&parent)?),
            }
        }
        Ok(chain)
    }

    /// Opens an image for reading, with its length. `None` if there is none.
    pub(in crate::criu) fn open_image(&self, name: ImageName) -> Result<Option<(File, u64)>, ImageError> {
        let path = self.path(name);
        let file = OpenOptions::new()
            .read(true)
            // No symlink out of the directory, and no waiting for the other end of a FIFO.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path);
        let file = match file {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                return Err(ImageError::NotAFile { path });
            }
            Err(source) => return Err(ImageError::Io { action: "open", path, source }),
        };
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(source) => return Err(ImageError::Io { action: "stat", path, source }),
        };
        if !metadata.is_file() {
            return Err(ImageError::NotAFile { path });
        }
        Ok(Some((file, metadata.len())))
    }

    /// Reads and decodes an image. `None` if there is none.
    pub(in crate::criu) fn decode_optional<T>(
        &self,
        name: ImageName,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, ImageError> {
        let Some((file, found)) = self.open_image(name)? else {
            return Ok(None);
        };
        let path = self.path(name);
        if found > MAX_IMAGE_BYTES {
            return Err(ImageError::TooLarge { path, found });
        }
        let mut image = Vec::new();
        // Bounded again: the file may grow between the two calls.
        if let Err(source) = file.take(MAX_IMAGE_BYTES).read_to_end(&mut image) {
            return Err(ImageError::Io { action: "read", path, source });
        }
        decode(&image).map(Some).map_err(|source| ImageError::Decode { path, source })
    }

    /// Reads and decodes an image that must be there.
    pub(in crate::criu) fn decode<T>(
        &self,
        name: ImageName,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<T, ImageError> {
        self.decode_optional(name, decode)?.ok_or_else(|| ImageError::Missing { path: self.path(name) })
    }
}
