//! Threads that have to do with a peer, or only keep something, need nothing that root may.

/// Takes every capability from the calling thread. It goes on with them if the kernel refuses.
pub fn renounce() {
    if let Err(error) = kernel::privileges::renounce() {
        tracing::warn!("a thread keeps all its capabilities: {error}");
    }
}
