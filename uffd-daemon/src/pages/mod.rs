//! Which pages are where: pure bookkeeping over a small [`Installer`] boundary.
//!
//! ```text
//!   Family   one task of the images: its lazy runs, numbered; who of its pages came from where
//!    └ Space   one address space that still has some of them missing: the restored task, and every
//!              child it forks before they have all arrived
//! ```
//!
//! A page of a space is *remote* until it is installed, or until the task drops it. Everything else follows:
//!
//! ```text
//!              fault ──────▶ asked ──┐ data
//!   Remote ──┤                       ├───────▶ Installed
//!              push, kept ───────────┘
//!   Remote, Installed ── remove, unmap, exit ─▶ Gone: a later fault reads zeros, as the kernel would
//! ```
//!
//! *Kept* are pages that pre-copy brought ([`crate::cache`]): remote like any other as long as a space misses them, but their
//! content is here, so a fault on one, wherever it is by now and also in a forked child, is resolved at once, and nobody asks for it.
//!
//! Several threads of a task change its mappings at once, and their events come in another order than their effects: what was
//! read waits until nothing is under way, and is applied in the order that the kernel confirms (`under_way.rs`).
//!
//! A fault on a page that is not remote is answered with a zero page: the page is either one that never had
//! content, or one the task has dropped; if it was installed meanwhile the kernel says so and the thread is
//! woken.

mod family;
mod installer;
mod rest;
mod space;
mod under_way;

pub use family::{Arrival, Blocked, Family, Origin, Resolution, SpaceId};
pub use installer::{AddressSpace, Installer, in_one_area};
pub use rest::Rest;
pub use space::Space;
pub use under_way::{Order, What};
