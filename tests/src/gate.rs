//! A hook that stops a move at a phase until the test lets it go on: the moment is hit exactly.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use nix::libc::O_NONBLOCK;
use nix::sys::stat::Mode;

use crate::STEP;
use crate::site::Site;

/// A hook that says when it is reached, and waits for how to end.
#[derive(Debug)]
pub struct Gate {
    reached: File,
    open: File,
    paths: [PathBuf; 2],
}

impl Gate {
    /// A gate of that name, not in anybody's way yet.
    ///
    /// # Panics
    /// If its FIFOs cannot be made.
    #[must_use]
    pub fn new(site: &Site, name: &str) -> Self {
        let paths = [site.path(&format!("{name}.reached")), site.path(&format!("{name}.open"))];
        let [reached, open] = paths.each_ref().map(|path| {
            nix::unistd::mkfifo(path, Mode::S_IRWXU).expect("a FIFO");
            // Open for both, neither end waits for the other to be opened.
            OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(path).expect("a FIFO")
        });
        Self { reached, open, paths }
    }

    /// The command of the hook.
    #[must_use]
    pub fn command(&self) -> String {
        let [reached, open] = self.paths.each_ref().map(|path| path.display());
        format!("echo > {reached}; read status < {open}; exit $status")
    }

    /// Waits until the move has come here.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn wait_reached(&mut self) {
        let reached = host::waiting::readable_within(self.reached.as_fd(), STEP).expect("poll");
        assert!(reached, "the move never reached {:?}", self.paths[0]);
        let _ = self.reached.read(&mut [0; 16]).expect("what was polled");
    }

    /// Whether the move has come here since this was last asked.
    ///
    /// # Panics
    /// If the FIFO cannot be polled.
    pub fn is_reached(&mut self) -> bool {
        let reached =
            host::waiting::readable_within(self.reached.as_fd(), std::time::Duration::ZERO).expect("poll");
        if reached {
            let _ = self.reached.read(&mut [0; 16]).expect("what was polled");
        }
        reached
    }

    /// Lets the hook end with `status`.
    ///
    /// # Panics
    /// Never: there is room in the FIFO.
    pub fn open(&mut self, status: u8) {
        writeln!(self.open, "{status}").expect("room in a FIFO");
    }
}

/// An action script that runs `command` at one phase of CRIU's.
///
/// # Panics
/// If it cannot be written.
#[must_use]
pub fn action_script(site: &Site, phase: &str, command: &str) -> PathBuf {
    let path = site.path("action-script");
    let text = format!("#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = {phase} ] || exit 0\n{command}\n");
    fs::write(&path, text).expect("a file of the test");
    fs::set_permissions(&path, Permissions::from_mode(0o700)).expect("a file of the test");
    path
}
