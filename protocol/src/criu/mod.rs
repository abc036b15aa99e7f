//! CRIU formats: what unmodified CRIU writes, sends and expects. Pure decoders and state machines, except for
//! [`checkpoint`] and [`pages::PageReader`], which read an image directory.
//!
//! ```text
//!   criu dump --lazy-pages ──► image directory ──────► images, checkpoint, pages
//!        │ page server                                        │ task ids, lazy runs
//!        ▼                                                    ▼
//!   page_server (GET, ADD_F, CLOSE)          handover ◄── criu restore --lazy-pages
//! ```
//!
//! - [`images`]: one image file as bytes: magic words, records, messages, and back.
//! - [`checkpoint`]: an image directory: which tasks there are, their VMAs and pagemaps, what is lazy.
//! - [`pages`]: where the bytes of a page are in the pages files of a chain of image directories.
//! - [`page_server`]: the headers of CRIU's page-server protocol, in both layouts.
//! - [`handover`]: the messages of `lazy-pages.socket`, by which restore hands over its userfaultfds.
//! - [`version`]: what `criu --version` says, and which header layout follows from it.
//! - [`limits`]: every bound that the rest checks, each with its reason.
//!
//! Facts come from CRIU 4.1.1 and 4.2 and hold for little-endian 64-bit hosts with 4 KiB pages (x86-64,
//! aarch64). CRIU writes host-endian; this module reads and writes little-endian and nothing else.

pub mod checkpoint;
pub mod handover;
pub mod images;
pub mod limits;
pub mod page_server;
pub mod pages;
pub mod version;
