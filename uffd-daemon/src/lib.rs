//! uffd-daemon library.
#![forbid(unsafe_code)]
