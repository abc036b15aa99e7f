//! The keys by which the sides of a move know each other, made by the programs themselves.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::moves::Plan;
use crate::programs;
use crate::site::Site;

/// A host's key.
#[derive(Clone, Debug)]
pub struct Key {
    /// Where it is.
    pub dir: PathBuf,
    /// By what peers know it.
    pub fingerprint: String,
}

/// The keys of both sides.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Of the source.
    pub source: Key,
    /// Of the destination.
    pub destination: Key,
}

/// Runs the verb `identity` of one of the programs.
///
/// # Panics
/// If it cannot be run.
#[track_caller]
#[must_use]
pub fn identity(program: &str, dir: &Path) -> Output {
    let mut command = Command::new(programs::program(program));
    command.args(["identity", "--dir"]).arg(dir).stdin(Stdio::null());
    command.output().expect("a program of ours")
}

impl Key {
    /// A key of one program, in the test's directory.
    ///
    /// # Panics
    /// If the program does not make it.
    #[track_caller]
    #[must_use]
    pub fn new(site: &Site, program: &str, name: &str) -> Self {
        let dir = site.path(name);
        let output = identity(program, &dir);
        assert!(output.status.success(), "{output:?}");
        Self { dir, fingerprint: String::from_utf8_lossy(&output.stdout).trim().to_owned() }
    }
}

impl Keys {
    /// Keys of both sides.
    ///
    /// # Panics
    /// If the programs do not make them.
    #[track_caller]
    #[must_use]
    pub fn new(site: &Site) -> Self {
        Self {
            source: Key::new(site, "source-server", "source-key"),
            destination: Key::new(site, "uffd-daemon", "destination-key"),
        }
    }

    /// A plan whose sides know each other by these keys, over `link`.
    #[must_use]
    pub fn plan(&self, link: &str) -> Plan<'static> {
        let options = |own: &Key, peer: &Key| {
            let dir = own.dir.display().to_string();
            ["--link", link, "--identity", &dir, "--peer", &peer.fingerprint].map(str::to_owned)
        };
        Plan::new()
            .source(options(&self.source, &self.destination))
            .destination(options(&self.destination, &self.source))
    }
}
