//! End-to-end tests live under `tests/tests/`; this crate has no code of its own.
#![forbid(unsafe_code)]
