//! What of a restore needs no images, brought up while the tree still runs at the source.

use std::ffi::OsString;
use std::path::Path;

use host::workdir::WorkDir;

use super::SessionConfig;
use crate::handover::HandoverSocket;
use crate::keeper::KeeperHandle;
use crate::pidns::PidNamespace;
use crate::preflight;
use crate::restore::{PidPlace, Restore};

/// A CRIU that waits for images, and who will hold what it hands over. Dropped, nothing is left of it.
pub(super) struct Standby {
    /// There until it is taken.
    parts: Option<Parts>,
    options: Vec<OsString>,
}

/// What a tree is brought up with.
pub(super) struct Parts {
    /// Holds images, logs and sockets.
    pub(super) dir: WorkDir,
    pub(super) keeper: KeeperHandle,
    pub(super) socket: HandoverSocket,
    pub(super) restore: Restore,
}

impl Standby {
    /// Starts everything, for a tree that will need these pids and perhaps more.
    pub(super) fn start(
        config: &SessionConfig,
        pids: &[u32],
        options: Vec<OsString>,
    ) -> Result<Self, String> {
        let failed = |what: &'static str| move |error: std::io::Error| format!("cannot {what}: {error}");
        let dir = WorkDir::create(config.work_dir.as_deref(), "postcopy-destination")
            .map_err(failed("make a working directory"))?;
        let socket = HandoverSocket::bind(dir.path()).map_err(failed("listen for the hand-over"))?;
        let restore = start_restore(config, dir.path(), pids, &options)?;
        let keeper = match KeeperHandle::start() {
            Ok(keeper) => keeper,
            Err(error) => {
                let mut restore = restore;
                restore.abort();
                return Err(failed("start the keeper")(error));
            }
        };
        Ok(Self { parts: Some(Parts { dir, keeper, socket, restore }), options })
    }

    fn parts(&self) -> &Parts {
        self.parts.as_ref().expect("there until it is taken")
    }

    /// Where images are to be put.
    pub(super) fn dir(&self) -> &Path {
        self.parts().dir.path()
    }

    pub(super) fn keeper(&self) -> &KeeperHandle {
        &self.parts().keeper
    }

    /// For a tree that needs these pids: CRIU is started again if they are not free where it waits.
    pub(super) fn take(mut self, config: &SessionConfig, pids: &[u32]) -> Result<Parts, String> {
        let parts = self.parts.as_mut().expect("there until it is taken");
        if !parts.restore.has_room_for(pids, config.place) {
            parts.restore.abort();
            parts.restore = start_restore(config, parts.dir.path(), pids, &self.options)?;
        }
        Ok(self.parts.take().expect("there until it is taken"))
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if let Some(mut parts) = self.parts.take() {
            parts.restore.abort();
            parts.keeper.dismiss();
        }
    }
}

fn start_restore(
    config: &SessionConfig,
    dir: &Path,
    pids: &[u32],
    options: &[OsString],
) -> Result<Restore, String> {
    let namespace = match (config.place, preflight::first_used(pids)) {
        (PidPlace::Host, _) | (PidPlace::Auto, None) => None,
        (PidPlace::New, _) | (PidPlace::Auto, Some(_)) => {
            Some(PidNamespace::create().map_err(|error| format!("cannot make a PID namespace: {error}"))?)
        }
    };
    let highest = pids.iter().copied().max().unwrap_or(1);
    Restore::start(&config.criu, dir, namespace, highest, options)
        .map_err(|error| format!("cannot start criu restore: {error}"))
}
