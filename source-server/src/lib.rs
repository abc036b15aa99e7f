//! The source of a move: keeps dumped pages in pipes, serves faults, pushes the rest, and lets go.
//!
//! - [`cli`]: the command line
//! - [`mover`]: one move, phase by phase
//! - [`page_server`]: CRIU's page-server protocol, for stock `criu lazy-pages`
//! - [`preflight`], [`process`]: what would move, and what stands against it
//! - [`dump`], [`stacks`], [`fence`], [`netlock`]: CRIU's dump, what keeps it lazy, and what keeps the tasks still or lets them run again
//! - [`store`]: where pages wait
//! - [`track`]: which pages are written while the tree still runs
//! - [`precopy`]: copies of them sent ahead, round by round
//! - [`kept`]: what outlives a source that is killed
//! - [`ledger`], [`lanes`]: what was sent and acknowledged, and the threads that do it
#![forbid(unsafe_code)]

pub mod cli;
pub mod dump;
pub mod fence;
pub mod kept;
pub mod lanes;
pub mod ledger;
pub mod limits;
pub mod mover;
pub mod netlock;
pub mod page_server;
pub mod precopy;
pub mod preflight;
pub mod process;
pub mod stacks;
pub mod store;
pub mod track;
