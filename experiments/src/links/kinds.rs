//! The kinds of link, which of them this build has, and what the sides of a move are told about each.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Context;
use host::identity::Identity;
use protocol::link::LinkKind;

/// Every kind that joins two hosts.
const ALL: [&str; 3] = ["tcp", "tls", "quic"];

/// The kinds that this build has.
pub(super) fn available() -> Vec<&'static str> {
    ALL.into_iter().filter(|kind| kind.parse::<LinkKind>().is_ok()).collect()
}

/// The kinds that it lacks, each with the reason.
pub(super) fn missing() -> Vec<(&'static str, String)> {
    ALL.into_iter().filter_map(|kind| Some((kind, kind.parse::<LinkKind>().err()?.to_string()))).collect()
}

/// What source and destination need besides the name of the kind: keys, made in `dir`, by which they know each other.
///
/// # Errors
/// If no key can be made.
pub(super) fn arguments(kind: &str, dir: &Path) -> anyhow::Result<[Vec<OsString>; 2]> {
    if !kind.parse::<LinkKind>().map_err(anyhow::Error::msg)?.authenticates() {
        return Ok(Default::default());
    }
    let [source, destination] = ["source-key", "destination-key"].map(|name| dir.join(name));
    let print =
        |dir| Identity::make(dir).map(|identity| identity.fingerprint().to_string()).context("making a key");
    let (source_print, destination_print) = (print(&source)?, print(&destination)?);
    let side = |own: &Path, peer: String| vec!["--identity".into(), own.into(), "--peer".into(), peer.into()];
    Ok([side(&source, destination_print), side(&destination, source_print)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_that_authenticate_know_each_other_and_others_are_told_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(arguments("tcp", dir.path()).unwrap(), <[Vec<OsString>; 2]>::default());
        let [source, destination] = arguments("tls", dir.path()).unwrap();
        assert_eq!((source.len(), destination.len()), (4, 4));
        assert_ne!(source[3], destination[3]);
        assert_eq!(arguments("tls", dir.path()).unwrap(), [source, destination]);
    }

    #[test]
    fn a_kind_is_available_or_missing_with_a_reason() {
        let (available, missing) = (available(), missing());
        assert!(available.contains(&"tcp"));
        assert_eq!(available.len() + missing.len(), ALL.len());
        assert!(missing.iter().all(|(kind, reason)| !available.contains(kind) && !reason.is_empty()));
    }
}
