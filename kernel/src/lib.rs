//! Linux calls that std and nix lack, and all `unsafe` code of the workspace.
//!
//! Nothing here decides anything: each function is one system call (or the few that belong together) with
//! its errno turned into meaning. The memory behind a received userfaultfd belongs to another process, so
//! installing pages there cannot break Rust's rules for our own memory and is safe over plain slices.
//!
//! - [`uffd`]: read events, install, zero, wake, poison, register
//! - [`write_protect`], [`pagemap`]: which pages a task has written; [`maps`]: which areas it has
//! - [`inject`]: a userfaultfd out of another process
//! - [`pidfd`]: hold a process, signal it, take a descriptor from it
//! - [`fds`]: descriptors over a unix socket
//! - [`poll`]: wait for a set that keeps its memory
//! - [`sched`]: how soon a thread gets the processor
//! - [`rseq`]: a thread in a restartable sequence
//! - [`privileges`], [`seccomp`]: what a thread, or a process of ours, does without
//! - [`spawn`]: what a child needs between `fork` and `exec`
//! - [`stack`]: a thread with its stack pointer, or its registers, as a test wants them
//! - [`holder`]: a process that does nothing but keep descriptors open
//! - [`tcp`]: socket options that the standard library lacks
//! - [`tun`]: network devices whose packets a program reads and writes
//! - [`anonymous`]: memory that is given back page by page
//! - [`arena`]: memory that a test workload maps, moves and drops

pub mod anonymous;
pub mod arena;
pub mod fds;
pub mod holder;
pub mod inject;
pub mod maps;
pub mod pagemap;
pub mod pidfd;
pub mod poll;
pub mod privileges;
pub mod rseq;
pub mod sched;
pub mod seccomp;
pub mod spawn;
pub mod stack;
pub mod tcp;
pub mod tun;
pub mod uffd;
pub mod write_protect;
