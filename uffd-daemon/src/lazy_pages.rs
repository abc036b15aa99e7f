//! The drop-in for `criu lazy-pages`.
use clap::Args;
/// arguments
#[derive(Debug, Args)]
pub struct LazyPagesArguments {}
/// run
pub fn run(_: &LazyPagesArguments) -> std::process::ExitCode { std::process::ExitCode::FAILURE }
