//! Linux calls that std, nix and the userfaultfd crate lack.
