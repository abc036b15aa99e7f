//! Where the programs and CRIUs are.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The release build of one of the project's programs.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let found =
        target_dirs().into_iter().map(|dir| dir.join("release").join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("there is no {name}: build it with `cargo build --release`"))
}

/// A second CRIU, with wide page-server headers, if `scripts/setup --criu-next` made one.
#[must_use]
pub fn next_criu() -> Option<PathBuf> {
    let tail = Path::new("criu-next-prefix/bin/criu");
    target_dirs().into_iter().map(|dir| dir.join(tail)).find(|path| path.is_file())
}

/// Why this host cannot receive a move, if it cannot.
#[must_use]
pub fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("moving processes needs root".into());
    }
    let output = Command::new(program("uffd-daemon")).arg("preflight").stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ")),
        Err(error) => Some(error.to_string()),
    }
}

/// Whether `name` is a program on PATH.
#[must_use]
pub fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Directories that may be cargo's target directory: above this test's executable, and `$CARGO_TARGET_DIR`.
fn target_dirs() -> Vec<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    let mut dirs: Vec<PathBuf> = executable.ancestors().skip(1).map(Path::to_owned).collect();
    dirs.extend(std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from));
    dirs
}
