//! The source of a move. See `source-server --help`.
#![forbid(unsafe_code)]

use clap::Parser;

fn main() -> std::process::ExitCode {
    source_server::cli::run(source_server::cli::Arguments::parse())
}
