//! source-server library.
#![forbid(unsafe_code)]
