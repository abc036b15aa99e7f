//! The kinds of link, and which of them this build has.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_available_or_missing_with_a_reason() {
        let (available, missing) = (available(), missing());
        assert!(available.contains(&"tcp"));
        assert_eq!(available.len() + missing.len(), ALL.len());
        assert!(missing.iter().all(|(kind, reason)| !available.contains(kind) && !reason.is_empty()));
    }
}
