//! CRIU's page-server protocol, for stock `criu lazy-pages --page-server`.
//!
//! ```text
//!   criu lazy-pages ──tcp──▶ Connection ──▶ Pages ──┬─▶ image directory: index, pread
//!   criu lazy-pages ──tcp──▶ Connection ──▶         └─▶ stopped tasks: /proc/PID/mem
//!            a thread each; answers in the order of requests
//! ```
//!
//! CRIU's own server serves one connection, reads its end as success, and takes an address it does not know as
//! the end of everything. This one serves any number, ends only after a CLOSE, and resets the connection of
//! whoever asks for what is not there: a client that saw a clean end would fill the rest with zeros.

mod connection;
mod error;
mod limits;
mod pages;
mod server;

pub use error::PageServerError;
pub use pages::Pages;
pub use server::serve;
