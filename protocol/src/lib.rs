//! What crosses a process boundary in a move, and the links it crosses.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod criu;
pub mod lazy_map;
pub mod link;
mod text;
pub mod units;
pub mod wire;
