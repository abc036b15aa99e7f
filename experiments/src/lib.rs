//! Workloads, the network lab, the demo and fault-latency experiments.
//!
//! - [`workload`]: what every workload shares: status lines, orders, starting and steering it
//! - [`stamp`]: a process that knows what must be in every page of its memory
//! - [`touch`]: a process that measures its first read of each page
//! - [`lab`]: hosts that are network namespaces; [`emulator`]: links with delay and loss between them
//! - [`redis`], [`kv`]: a server to move and a client that checks every reply
//! - [`report`]: what the two sides of a move report, and latencies
//! - [`demo`]: a redis under load moves, and its client keeps its connection
//! - [`tool`]: programs that run beside an experiment, and what they used
//! - [`moving`]: one measured move, whoever moves; [`campaign`]: many of them, interleaved
//! - [`results`]: the folder they are written to; [`plot`]: charts; [`page`]: a page out of a folder
//! - [`scenario`]: the experiments by name
//! - [`floors`]: what the machine can do at best
//! - [`sweep`]: fault latency by pattern, push rate, store and size; [`vs_criu`]: ours beside CRIU's own lazy pages
//! - [`crossing`]: a move between two hosts of a lab; [`timeline`]: what happened when, in bins
//! - [`links`]: kinds of link over delay and loss; [`stream`]: a bulk stream; [`kv_move`]: the clients of a redis
//! - [`tracking`]: what it costs to know which pages a process writes
//! - [`vs_qemu`]: QEMU's post-copy beside ours
//! - [`cli`]: the command line of the `experiments` binary
//! - [`random`], [`clock`]: numbers that can be repeated, time that can be compared
#![forbid(unsafe_code)]

pub mod campaign;
pub mod cli;
pub mod clock;
pub mod crossing;
pub mod demo;
pub mod emulator;
pub mod floors;
pub mod kv;
pub mod kv_move;
pub mod lab;
pub mod links;
pub mod moving;
pub mod page;
pub mod plot;
pub mod random;
pub mod redis;
pub mod report;
pub mod results;
pub mod scenario;
pub mod stamp;
pub mod stream;
pub mod sweep;
pub mod timeline;
pub mod tool;
pub mod touch;
pub mod tracking;
pub mod vs_criu;
pub mod vs_qemu;
pub mod workload;
