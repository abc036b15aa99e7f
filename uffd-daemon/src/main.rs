//! The destination of a move. See `uffd-daemon --help`.
#![forbid(unsafe_code)]

use clap::Parser;

fn main() -> std::process::ExitCode {
    if let Some(status) = uffd_daemon::barrier::play_script() {
        return status;
    }
    uffd_daemon::cli::run(uffd_daemon::cli::Arguments::parse())
}
