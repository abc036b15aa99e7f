//! What crosses a process boundary in a move, and the links it crosses.
#![forbid(unsafe_code)]

pub mod criu;
pub mod units;
