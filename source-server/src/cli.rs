//! The command line: raw arguments to a checked configuration, results to exit codes.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use host::hooks::Hook;
use host::identity::IdentityArguments;
use host::link_options::LinkOptions;
use host::report::Report;
use host::state_dir::StateDir;
use protocol::criu::page_server::HeaderLayout;
use protocol::link::{Endpoint, LinkKind, Protection};

use crate::kept;
use crate::lanes::{LaneCount, Pace};
use crate::limits;
use crate::mover::{GiveUp, MoveConfig, MoveError, Mover, StoreKind};
use crate::page_server::{self, Pages};
use crate::precopy::compression::Compress;
use crate::precopy::policy::Rounds;

/// Exit status for wrong usage and failed preflight.
const USAGE: u8 = 2;

/// The source of a post-copy move.
///
/// Keeps the pages of a frozen process tree and hands them out: to `uffd-daemon serve` on another host
/// (`move`), or to stock `criu lazy-pages` (`page-server`).
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Move a process tree to another host.
    ///
    /// The tree is frozen, resumes on the destination at once, and its memory follows: pages it touches
    /// first, the rest in the background. With --precopy-rounds memory goes ahead, and what is not written
    /// meanwhile need not follow. Needs root, CRIU 4.1 or later, and `uffd-daemon serve` listening
    /// at the other end. Options behind `--` go to `criu dump`; --tcp-established, --shell-job,
    /// --ext-unix-sk and --file-locks reach the restore as well.
    ///
    /// Exit status: 0 moved and released; 1 failed and rolled back, the process runs here; 2 wrong usage or
    /// refused by preflight, nothing was touched; 3 failed after the switchover, what to do is printed.
    #[command(
        after_help = "Examples:\n  source-server move --pid 4711 --to 192.0.2.7:7000 --link tls --peer FINGERPRINT\n  \
                            source-server move --pid 4711 --to 192.0.2.7:7000 --insecure \\\n      \
                            --hook post-dump='ip addr del 192.0.2.80/24 dev eth0' -- --tcp-established"
    )]
    Move(MoveArguments),
    /// Go on with a move whose `source-server` was killed, or has given up.
    ///
    /// Killed before it had committed, the process runs on here. Else it is the destination's: pages that have not arrived
    /// are sent from the stopped tasks, or from what a holder process has kept since they were killed here. If the destination
    /// has rolled the move back it says so, and the process runs on here as well.
    ///
    /// Exit status: 0 released, or nothing to do; 1 rolled back, the process runs here; 2 wrong usage; 3 paused again.
    Resume(ResumeArguments),
    /// Serve pages with CRIU's page-server protocol.
    ///
    /// `criu lazy-pages --page-server --address A --port P` is the client. The pages come from a CRIU image
    /// directory or from a process that stands still. Ends when a client closes the session.
    PageServer(PageServerArguments),
    /// Make this host's key, if it has none, and print its fingerprint.
    ///
    /// Peers know this host by it: give the fingerprint to `uffd-daemon serve --link tls --peer FINGERPRINT` on the
    /// destination, and the destination's to `source-server move` here. Keys of `uffd-daemon identity` are the same:
    /// a host needs one.
    Identity(IdentityArguments),
}

#[derive(Debug, Args)]
struct Common {
    /// The criu to use [default: $CRIU, then PATH, then the one scripts/setup made]
    #[arg(long, value_name = "PATH")]
    criu: Option<PathBuf>,
    /// Where working directories are made [default: a memory file system]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Only errors
    #[arg(long, short)]
    quiet: bool,
    /// More detail; twice for all of it
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Args)]
struct MoveArguments {
    /// Root of the process tree
    #[arg(long, value_name = "PID", required_unless_present = "runc")]
    pid: Option<u32>,
    /// A runc container (not in this release: use runc checkpoint --lazy-pages and uffd-daemon lazy-pages)
    #[arg(long, value_name = "CONTAINER", conflicts_with = "pid")]
    runc: Option<String>,
    /// Where `uffd-daemon serve` listens: HOST:PORT, or a socket path with --link unix
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    #[command(flatten)]
    link: LinkOptions,
    /// Copy memory ahead while the process runs, in so many rounds: 0 none, auto as many as are worth it
    #[arg(long, default_value = "0", value_name = "N|auto|0")]
    precopy_rounds: Rounds,
    /// How fast it is copied ahead: bytes per second (K, M, G), or unlimited
    #[arg(long, default_value = limits::PRECOPY_RATE, value_name = "RATE", value_parser = precopy_pace)]
    precopy_rate: Pace,
    /// Compress what is copied ahead: auto where that is faster on this link, off never, lz4 whatever gets smaller
    #[arg(long, default_value = "auto", value_name = "auto|off|lz4")]
    compress: Compress,
    /// Where pages wait: pipes frees them as they arrive, frozen keeps the stopped tasks until the end
    #[arg(long, default_value = "pipes")]
    store: StoreArgument,
    /// How fast the background may push: bytes per second (K, M, G), unlimited, or off
    #[arg(long, default_value = "unlimited", value_name = "RATE")]
    push_rate: Pace,
    /// Over how many connections, and by how many threads at each end, faults are served: auto is one, and more for a
    /// process with many threads on a host with many processors
    #[arg(long, default_value = "auto", value_name = "N|auto")]
    fault_lanes: LaneCount,
    /// Over how many connections, and by how many threads at each end, the background pushes: auto is one for every
    /// eight processors of this host, at most four
    #[arg(long, default_value = "auto", value_name = "N|auto")]
    push_lanes: LaneCount,
    /// How long a destination that is lost after the switchover is dialled: seconds, or never; then both sides keep
    /// what they have and the exit status is 3 [default: 45, and 30 if its host says that nobody listens]
    #[arg(long, value_name = "SECONDS")]
    give_up_after: Option<GiveUp>,
    /// Run COMMAND at a phase: pre-freeze, post-dump, released, rolled-back
    #[arg(long = "hook", value_name = "PHASE=COMMAND")]
    hooks: Vec<Hook>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    state: StateArgument,
    #[command(flatten)]
    common: Common,
    /// Passed on to criu dump
    #[arg(last = true, value_name = "CRIU-DUMP-OPTIONS")]
    criu_options: Vec<OsString>,
}

/// As `--push-rate`, but what is never copied ahead is asked for by no rounds.
fn precopy_pace(text: &str) -> Result<Pace, String> {
    match text.parse() {
        Ok(Pace::Off) => Err("--precopy-rounds 0 copies nothing".into()),
        other => other,
    }
}

#[derive(Debug, Args)]
struct StateArgument {
    /// Where word is left for `source-server resume`; `none` for a move that nobody can go on with
    #[arg(long, value_name = "DIR", default_value = kept::DEFAULT_DIR)]
    state_dir: PathBuf,
}

#[derive(Debug, Args)]
struct ResumeArguments {
    #[command(flatten)]
    state: StateArgument,
    /// Which move [default: the first that nobody serves]
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// Let the process run on here without asking the destination: you have made sure that it does not run there and never
    /// will. Where its tasks are killed already nothing can
    #[arg(long, requires = "session")]
    destination_is_clean: bool,
    /// How fast the background may push: bytes per second (K, M, G), unlimited, or off
    #[arg(long, default_value = "unlimited", value_name = "RATE")]
    push_rate: Pace,
    /// How long the destination is dialled: seconds, or never
    #[arg(long, value_name = "SECONDS")]
    give_up_after: Option<GiveUp>,
    /// Run COMMAND at a phase: released, rolled-back
    #[arg(long = "hook", value_name = "PHASE=COMMAND")]
    hooks: Vec<Hook>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StoreArgument {
    Pipes,
    Frozen,
}

#[derive(Debug, Args)]
struct PageServerArguments {
    /// A CRIU image directory
    #[arg(long, value_name = "DIR", conflicts_with = "pid", required_unless_present = "pid")]
    images_dir: Option<PathBuf>,
    /// Root of a process tree that stands still: stopped, or held by a waiting criu dump
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Address to listen at
    #[arg(long, default_value = "127.0.0.1", value_name = "A")]
    address: String,
    /// Port to listen at; 0 lets the kernel choose, the choice is printed
    #[arg(long, value_name = "P")]
    port: u16,
    /// Header layout of the client: compact up to CRIU 4.1.1, wide from 4.2, auto looks at its first request
    #[arg(long, default_value = "auto")]
    criu_header: HeaderArgument,
    /// Allow addresses other than loopback: CRIU's protocol has no protection of its own
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HeaderArgument {
    Compact,
    Wide,
    Auto,
}

/// Runs what the command line says.
#[must_use]
pub fn run(arguments: Arguments) -> ExitCode {
    match arguments.command {
        Verb::Move(arguments) => run_move(arguments),
        Verb::Resume(arguments) => run_resume(arguments),
        Verb::PageServer(arguments) => run_page_server(&arguments),
        Verb::Identity(arguments) => arguments.run("source-server"),
    }
}

fn usage(message: &str) -> ExitCode {
    eprintln!("source-server: {message}");
    ExitCode::from(USAGE)
}

fn run_move(arguments: MoveArguments) -> ExitCode {
    host::logging::start(arguments.common.verbose, arguments.common.quiet);
    if arguments.runc.is_some() {
        return usage(
            "--runc is not in this release: use `runc checkpoint --lazy-pages` and `uffd-daemon lazy-pages`",
        );
    }
    let Some(pid) = arguments.pid else { return usage("--pid is missing") };
    let to = match arguments.link.endpoint(&arguments.to) {
        Ok(to) => to,
        Err(error) => return usage(&error),
    };
    let state = match StateDir::open_unless_none(&arguments.state.state_dir) {
        Ok(state) => state,
        Err(error) => return usage(&error.to_string()),
    };
    let config = MoveConfig {
        pid,
        to,
        state,
        link: arguments.link.to_arguments(),
        destination_is_clean: false,
        store: match arguments.store {
            StoreArgument::Pipes => StoreKind::Pipes,
            StoreArgument::Frozen => StoreKind::Frozen,
        },
        pace: arguments.push_rate,
        fault_lanes: arguments.fault_lanes,
        push_lanes: arguments.push_lanes,
        precopy_rounds: arguments.precopy_rounds,
        precopy_pace: arguments.precopy_rate,
        compress: arguments.compress,
        give_up: arguments.give_up_after.unwrap_or(GiveUp::Default),
        hooks: arguments.hooks,
        criu: arguments.common.criu,
        work_dir: arguments.common.work_dir,
        quiet: arguments.common.quiet,
        criu_options: arguments.criu_options,
    };
    let mover = match Mover::new(config) {
        Ok(mover) => mover,
        Err(error) => return usage(&format!("cannot start: {error}")),
    };
    let (report, result) = mover.run();
    conclude(&report, result, arguments.json.as_deref())
}

fn run_resume(arguments: ResumeArguments) -> ExitCode {
    host::logging::start(arguments.common.verbose, arguments.common.quiet);
    let found =
        StateDir::open(&arguments.state.state_dir).map_err(|error| error.to_string()).and_then(|dir| {
            kept::find(&dir).map_err(|error| format!("cannot read the state directory: {error}"))
        });
    let wanted = |orphan: &kept::Orphan| {
        arguments.session.as_ref().is_none_or(|id| *id == orphan.description().session().0.to_string())
    };
    let mut orphans = match found {
        Ok(orphans) => orphans.into_iter().filter(wanted),
        Err(error) => return usage(&error),
    };
    let Some(orphan) = orphans.next() else {
        if let Some(id) = &arguments.session {
            return usage(&format!("there is no move {id} to go on with"));
        }
        println!("no moves to go on with");
        return ExitCode::SUCCESS;
    };
    if orphans.next().is_some() {
        tracing::warn!("there are more moves to go on with: start this again for each");
    }
    // Theirs is whoever is started for them.
    drop(orphans);
    let description = orphan.description();
    let to = LinkOptions::from_arguments(&description.link).and_then(|link| link.endpoint(&description.to));
    let to = match to {
        Ok(to) => to,
        Err(error) => return usage(&error),
    };
    let config = MoveConfig {
        pid: description.root,
        to,
        state: None,
        link: Vec::new(),
        destination_is_clean: arguments.destination_is_clean,
        store: StoreKind::Pipes,
        pace: arguments.push_rate,
        // The destination has a thread for each of them.
        fault_lanes: LaneCount::Exactly(description.lanes.fault),
        push_lanes: LaneCount::Exactly(description.lanes.push),
        precopy_rounds: Rounds::Off,
        precopy_pace: Pace::Off,
        compress: Compress::Off,
        give_up: arguments.give_up_after.unwrap_or(GiveUp::Default),
        hooks: arguments.hooks,
        criu: arguments.common.criu,
        work_dir: arguments.common.work_dir,
        quiet: arguments.common.quiet,
        criu_options: Vec::new(),
    };
    let mover = match Mover::of_session(config, description.session()) {
        Ok(mover) => mover,
        Err(error) => return usage(&format!("cannot start: {error}")),
    };
    let (report, result) = mover.take_over(orphan);
    conclude(&report, result, arguments.json.as_deref())
}

fn conclude(report: &Report, result: Result<(), MoveError>, json: Option<&Path>) -> ExitCode {
    if let Some(path) = json {
        if let Err(error) = report.write_json(path) {
            eprintln!("source-server: cannot write {}: {error}", path.display());
        }
    }
    match result {
        Ok(()) => {
            tracing::info!("{}", report.in_words());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("source-server: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}

fn run_page_server(arguments: &PageServerArguments) -> ExitCode {
    host::logging::start(arguments.common.verbose, arguments.common.quiet);
    let address = format!("{}:{}", arguments.address, arguments.port);
    let protection = if arguments.insecure { Protection::Insecure } else { Protection::Loopback };
    let endpoint = match Endpoint::parse(LinkKind::Tcp, &address, &protection) {
        Ok(endpoint) => endpoint,
        Err(error) => return usage(&error),
    };
    let layout = match arguments.criu_header {
        HeaderArgument::Compact => Some(HeaderLayout::Compact),
        HeaderArgument::Wide => Some(HeaderLayout::Wide),
        HeaderArgument::Auto => None,
    };
    let pages = match (&arguments.images_dir, arguments.pid) {
        (Some(dir), _) => Pages::of_images(dir),
        (None, Some(pid)) => Pages::of_process(pid),
        (None, None) => return usage("--images-dir or --pid is missing"),
    };
    match pages.and_then(|pages| page_server::serve(&pages, &endpoint, layout)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("source-server: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}
