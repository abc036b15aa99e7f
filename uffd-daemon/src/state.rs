//! The state directory: where orphaned keepers are found by a daemon that takes over.
//!
//! A keeper listens at `SESSION.sock` there. Only root, or whoever runs the daemon, may enter the directory, and a keeper
//! talks to nobody else.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use protocol::wire::hello::SessionId;

/// Where the state of sessions is, unless the operator says otherwise.
pub const DEFAULT_DIR: &str = "/run/uffd-daemon";
const SUFFIX: &str = ".sock";

/// A directory that only its owner may enter.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

/// A state directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It cannot be made or looked at.
    #[error("state directory {path}: {source}; give another one with --state-dir", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Others may enter it, or it belongs to somebody else.
    #[error(
        "state directory {path} is no directory of this user that nobody else may enter: chown root {path}; chmod 0700 {path}",
        path = .0.display()
    )]
    Open(PathBuf),
}

impl StateDir {
    /// Makes the directory if it is not there, and checks whose it is.
    ///
    /// # Errors
    /// [`StateDirError`].
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let broken = |source| StateDirError::Io { path: path.to_owned(), source };
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(broken(error)),
            _ => {}
        }
        let metadata = fs::symlink_metadata(path).map_err(broken)?;
        let own = metadata.uid() == nix::unistd::geteuid().as_raw();
        if !metadata.is_dir() || !own || metadata.mode() & 0o077 != 0 {
            return Err(StateDirError::Open(path.to_owned()));
        }
        Ok(Self(path.to_owned()))
    }

    /// A socket for the keeper of a session.
    ///
    /// # Errors
    /// The errno of binding it.
    pub fn listen(&self, session: SessionId) -> io::Result<UnixListener> {
        UnixListener::bind(self.0.join(format!("{session}{SUFFIX}")))
    }

    /// The sockets of keepers.
    ///
    /// # Errors
    /// The errno of reading the directory.
    pub fn sockets(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let path = entry?.path();
            if path.to_str().is_some_and(|path| path.ends_with(SUFFIX)) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_its_owner_may_enter() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("state");
        let dir = StateDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let _listener = dir.listen(SessionId([7; 16])).unwrap();
        assert!(dir.listen(SessionId([7; 16])).is_err(), "twice");
        fs::write(path.join("something"), "else").unwrap();
        assert_eq!(dir.sockets().unwrap(), [path.join(format!("{}.sock", SessionId([7; 16])))]);
        for mode in [0o750, 0o705] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(matches!(StateDir::open(&path), Err(StateDirError::Open(_))), "{mode:o}");
        }
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(StateDir::open(&file).is_err());
        std::os::unix::fs::symlink(&path, place.path().join("link")).unwrap();
        assert!(StateDir::open(&place.path().join("link")).is_err());
    }
}
