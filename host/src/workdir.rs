//! The directory of one move: in memory, gone afterwards.

use std::io;
use std::path::{Path, PathBuf};

/// A directory for images, logs and sockets of one move; removed when dropped.
#[derive(Debug)]
pub struct WorkDir {
    /// Empty once it is somebody else's.
    path: PathBuf,
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            if let Err(error) = std::fs::remove_dir_all(&self.path) {
                tracing::debug!("cannot remove {}: {error}", self.path.display());
            }
        }
    }
}

impl WorkDir {
    /// Makes one below `parent`, or below a memory file system if none is given: images must not wait for a
    /// disk while the tasks are frozen.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(parent: Option<&Path>, prefix: &str) -> io::Result<Self> {
        let place: PathBuf = match parent {
            Some(dir) => {
                std::fs::create_dir_all(dir)?;
                dir.canonicalize()?
            }
            None => in_memory(),
        };
        // Images hold registers and memory: nobody else's business.
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        let prefix = format!("{prefix}-");
        let dir = tempfile::Builder::new().prefix(&prefix).permissions(private).tempdir_in(place)?;
        Ok(Self { path: dir.keep() })
    }

    /// One that a process made that has ended.
    #[must_use]
    pub const fn adopt(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its path, absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps it on disk, for somebody to look at.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.path)
    }
}

/// Removes a file or a socket, if it is there.
///
/// # Errors
/// The errno of `unlink(2)`.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    gone(std::fs::remove_file(path))
}

/// Makes a directory, in place of what an earlier try has left.
///
/// # Errors
/// What the file system says.
pub fn fresh_dir(path: &Path) -> io::Result<()> {
    gone(std::fs::remove_dir_all(path))?;
    std::fs::create_dir_all(path)
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn in_memory() -> PathBuf {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    for dir in ["/dev/shm", "/run"] {
        let tmpfs = nix::sys::statfs::statfs(dir).is_ok_and(|fs| fs.filesystem_type().0 == TMPFS_MAGIC);
        if tmpfs && nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).is_ok() {
            return dir.into();
        }
    }
    std::env::temp_dir()
}
