//! Our own session protocol: frames, messages, and their bounds. Pure: no I/O, no clock.
//!
//! ```text
//!   source-server (dials)                         uffd-daemon serve (listens)
//!   control  hello ─────────────────────────────▶
//!            Offer ─────────────────────────────▶  preflight
//!            ◀───────────────────────────── Verdict
//!   fault    hello ─────────────────────────────▶  lanes are up before anything is frozen
//!   push     hello ─────────────────────────────▶
//!   push     Areas, Precopy … Round ────────────▶  only with pre-copy, while the tasks run
//!            ◀─────────────────────────────── Round
//!   control  Image … Dumped, Clean … ───────────▶  restore starts
//!   fault    ◀────────────────── Demand / Pages ▶  from the hand-over on
//!   control  ◀──────────────────────────── Prepared  tasks are restored, held before their first instruction
//!            Commit ────────────────────────────▶  the switchover: from here the source never runs again
//!            ◀───────────────────────────── Running
//!   push     Pages ─────────────────────────────▶
//!            ◀───────────────────────────────── Ack
//!   control  ◀──────────────────────────── Complete  every page is settled and acknowledged
//!            Released ──────────────────────────▶
//! ```
//!
//! A connection that is lost behind `Commit` ends nothing: the source dials again, with the same session and a new
//! attempt, and the destination sends a map of what is settled (`SettledMap …`, `Resumed`) before both go on.
//!
//! Before `Commit` either side may send `Abort`; the destination answers `RolledBack` once it is clean.
//! What follows from what is in `switchover`. Every byte is described in `docs/protocol.md`.

pub mod codec;
pub mod control;
pub mod frame;
pub mod hello;
pub mod limits;
pub mod lz4;
pub mod precopy;
pub mod settled_map;
pub mod switchover;
