//! A directory in which a program leaves what its successor needs: only its owner may enter it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use protocol::wire::hello::SessionId;

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
    /// It is the word for none.
    #[error(
        "a program with --state-dir none leaves no word; say which directory the one had that is to be followed"
    )]
    None,
}

impl StateDir {
    /// Makes the directory if it is not there, and checks whose it is.
    ///
    /// # Errors
    /// [`StateDirError`].
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        if path == Path::new("none") {
            return Err(StateDirError::None);
        }
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

    /// As [`StateDir::open`], but nothing where a path is `none`: no word is to be left.
    ///
    /// # Errors
    /// [`StateDirError`].
    pub fn open_unless_none(path: &Path) -> Result<Option<Self>, StateDirError> {
        match Self::open(path) {
            Err(StateDirError::None) => Ok(None),
            opened => opened.map(Some),
        }
    }

    /// The path of a session's file of a kind.
    #[must_use]
    pub fn file(&self, session: SessionId, kind: &str) -> PathBuf {
        self.0.join(format!("{session}.{kind}"))
    }

    /// Every session's file of a kind.
    ///
    /// # Errors
    /// The errno of reading the directory.
    pub fn files(&self, kind: &str) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == kind) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Writes a file that only its owner may read; it is whole, or as it was.
///
/// # Errors
/// The errno of writing it.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn none_is_no_directory() {
        assert!(matches!(StateDir::open_unless_none(Path::new("none")), Ok(None)));
        assert!(matches!(StateDir::open(Path::new("none")), Err(StateDirError::None)));
        let dir = tempfile::tempdir().unwrap();
        assert!(StateDir::open_unless_none(&dir.path().join("none")).unwrap().is_some());
    }

    #[test]
    fn only_its_owner_may_enter() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("state");
        let dir = StateDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let file = dir.file(SessionId([7; 16]), "sock");
        fs::write(&file, "").unwrap();
        fs::write(path.join("something.else"), "").unwrap();
        assert_eq!(dir.files("sock").unwrap(), [file]);
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
    #[test]
    fn a_file_is_written_in_place_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session.kind");
        for text in ["the first, and longer", "the second"] {
            write_whole(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
