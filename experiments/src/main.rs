//! The `experiments` binary: parses, and calls the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use experiments::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("experiments: {error:#}");
            ExitCode::FAILURE
        }
    }
}
