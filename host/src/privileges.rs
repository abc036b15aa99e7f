//! Threads that have to do with a peer, or only keep something, need next to nothing of what root may.

use kernel::privileges::{CapabilitySet, renounce_but};

/// Takes every capability from the calling thread. It goes on with them if the kernel refuses.
pub fn renounce() {
    renounce_all_but(CapabilitySet::empty());
}

/// As [`renounce`], for one that sets buffers of sockets beyond what the system allows everybody.
pub fn renounce_but_buffers() {
    renounce_all_but(CapabilitySet::NET_ADMIN);
}

fn renounce_all_but(keep: CapabilitySet) {
    if let Err(error) = renounce_but(keep) {
        tracing::warn!("a thread keeps all its capabilities: {error}");
    }
}
