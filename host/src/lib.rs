//! What both binaries do on their host.
//!
//! - [`criu`]: find CRIU, start it, wait for it, quote its log
//! - [`hooks`]: commands of the operator at phase boundaries
//! - [`report`]: the JSON report, and the text one
//! - [`identity`]: the key by which peers know this host; [`link_options`]: how pages travel, and to whom
//! - [`interrupt`]: Ctrl-C as something that can be waited for
//! - [`waiting`]: wait for several descriptors with a deadline
//! - [`facts`]: what preflight compares
//! - [`workdir`]: the directory of one move, in memory, gone afterwards
//! - [`logging`]: how `-v` and `--quiet` become log lines
//! - [`mailbox`]: a channel that can be polled
//! - [`placement`]: which processors a thread may run on; [`privileges`]: what it may not do
//! - [`progress`]: a line for people while it takes long
#![forbid(unsafe_code)]

pub mod criu;
pub mod facts;
pub mod hooks;
pub mod identity;
pub mod interrupt;
pub mod link_options;
pub mod logging;
pub mod mailbox;
pub mod placement;
pub mod privileges;
pub mod progress;
pub mod report;
pub mod state_dir;
pub mod waiting;
pub mod workdir;
