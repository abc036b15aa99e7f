//! The files of the corpus.

use std::fs;
use std::path::{Path, PathBuf};

/// The folder `fuzz/` of the repository.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
}

/// Where the inputs of a target are kept.
#[must_use]
pub fn folder_of(target: &str) -> PathBuf {
    folder().join("corpus").join(target)
}

/// The inputs of a target by name, in the order of their names.
///
/// # Panics
/// If there are none, or they cannot be read.
#[must_use]
pub fn of(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = folder_of(target);
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.expect("list the corpus");
        let name = entry.file_name().to_string_lossy().into_owned();
        (name, fs::read(entry.path()).expect("read the corpus"))
    };
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut inputs: Vec<_> = entries.map(read).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    inputs
}

/// Writes the input of a failure where cargo-fuzz puts its own.
///
/// # Panics
/// If it cannot be written.
#[must_use]
pub fn keep_failure(target: &str, seed: u64, data: &[u8]) -> PathBuf {
    let folder = folder().join("artifacts").join(target);
    fs::create_dir_all(&folder).expect("make a folder for failures");
    let path = folder.join(format!("seed-{seed}"));
    fs::write(&path, data).expect("keep the input of a failure");
    path.canonicalize().unwrap_or(path)
}
