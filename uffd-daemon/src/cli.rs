//! The command line: raw arguments to a checked configuration, results to exit codes.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use host::criu::Criu;
use host::facts::problem;
use host::hooks::{Hook, Hooks};
use host::identity::IdentityArguments;
use host::link_options::LinkOptions;
use host::state_dir::StateDir;

use crate::lazy_pages::LazyPagesArguments;
use crate::restore::PidPlace;
use crate::serve::{ServeConfig, serve};
use crate::session::{Prefill, SessionConfig, StateConfig};
use crate::{abandon, keeper, lazy_pages, pidns, preflight, takeover};

/// Exit status for wrong usage and failed preflight.
const USAGE: u8 = 2;

/// The destination of a post-copy move.
///
/// Receives a process tree that resumes here at once while most of its memory is still on the source:
/// resolves its page faults over the network and installs what is pushed.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Receive moves from `source-server move`.
    ///
    /// Restores into the network namespace it runs in: enter another one with nsenter --net=FILE. Prints
    /// `listening on ADDR:PORT` when it is ready. Options behind `--` go to `criu restore`.
    ///
    /// Exit status with --once: 0 moved and released; 1 rolled back, nothing is left here; 2 wrong usage;
    /// 3 failed after the switchover, the tasks wait for missing pages and what to do is printed.
    #[command(
        after_help = "Examples:\n  uffd-daemon serve --listen 0.0.0.0:7000 --link tls --peer FINGERPRINT\n  \
                            uffd-daemon serve --listen 0.0.0.0:7000 --insecure --once \\\n      \
                            --hook pre-restore='ip addr add 192.0.2.80/24 dev eth0' -- --tcp-established"
    )]
    Serve(ServeArguments),
    /// Go on with moves whose daemon was killed or has given up.
    ///
    /// Their tasks wait where they touch a page that has not come, as long as their keeper lives. Listens where their
    /// daemon did; the source dials as long as it has not given up. A restarted `serve` at the same address does the same
    /// by itself.
    ///
    /// Exit status: 0 released, or nothing to do; 2 wrong usage; 3 paused again.
    Takeover(TakeoverArguments),
    /// Say which moves wait here for a daemon, since when, and for how many pages.
    Status(StateArguments),
    /// Give up pages that will never come: who touches one gets SIGBUS.
    ///
    /// For moves whose daemon has ended and whose source is gone for good. Memory that has arrived stays right; which
    /// addresses are lost is logged.
    Abandon(AbandonArguments),
    /// Stand in for `criu lazy-pages`: same flags, same behaviour.
    LazyPages(LazyPagesArguments),
    /// Say what stands against restoring a tree on this host.
    Preflight(CriuArgument),
    /// Make this host's key, if it has none, and print its fingerprint.
    ///
    /// Peers know this host by it: give the fingerprint to `source-server move --link tls --peer FINGERPRINT` on the
    /// source, and the source's to `uffd-daemon serve` here. Keys of `source-server identity` are the same: a host
    /// needs one.
    Identity(IdentityArguments),
    #[command(name = keeper::VERB, hide = true)]
    Keeper,
    #[command(name = pidns::OUTER_VERB, hide = true)]
    PidnsOuter,
    #[command(name = pidns::INIT_VERB, hide = true)]
    PidnsInit,
}

#[derive(Debug, Args)]
struct CriuArgument {
    /// The criu to use [default: $CRIU, then PATH, then the one scripts/setup made]
    #[arg(long, value_name = "PATH")]
    criu: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct StateArguments {
    /// Where keepers are found; with `serve`, `none` leaves no word: nobody can take over
    #[arg(long, value_name = "DIR", default_value = takeover::DEFAULT_DIR)]
    state_dir: PathBuf,
}

#[derive(Debug, Args)]
struct TakeoverArguments {
    #[command(flatten)]
    state: StateArguments,
    /// How long the source is waited for: seconds, or never
    #[arg(long, value_name = "SECONDS", default_value = "45", value_parser = give_up_after)]
    give_up_after: GiveUp,
    /// Run COMMAND at a phase: released
    #[arg(long = "hook", value_name = "PHASE=COMMAND")]
    hooks: Vec<Hook>,
    /// Write the report of each move as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    criu: CriuArgument,
    /// Only errors
    #[arg(long, short)]
    quiet: bool,
    /// More detail; twice for all of it
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Args)]
struct AbandonArguments {
    #[command(flatten)]
    state: StateArguments,
    /// Only this one, by its id as `status` shows it
    #[arg(long, value_name = "ID")]
    session: Option<String>,
}

#[derive(Debug, Args)]
struct ServeArguments {
    /// Where to listen: ADDR:PORT (port 0 lets the kernel choose), or a socket path with --link unix
    #[arg(long, value_name = "ADDR:PORT")]
    listen: String,
    #[command(flatten)]
    link: LinkOptions,
    /// PID namespace of restored trees: host needs every pid to be free here, auto takes a new one if not
    #[arg(long, default_value = "auto")]
    pidns: PidnsArgument,
    /// Run COMMAND at a phase: pre-restore, post-restore, released, rolled-back
    #[arg(long = "hook", value_name = "PHASE=COMMAND")]
    hooks: Vec<Hook>,
    /// Exit after the first move, with its status
    #[arg(long)]
    once: bool,
    /// Install what pre-copy brought before the process runs: nothing, what was written while it was copied, or all of it
    #[arg(long, default_value = "none", value_name = "WHAT")]
    prefill: PrefillArgument,
    /// How long the process waits for --prefill at most; the rest is installed while it runs
    #[arg(long, default_value = "100", value_name = "MS")]
    prefill_ms: u64,
    /// How long a source that is lost after the switchover is waited for: seconds, or never; then the tasks go on
    /// waiting for their pages and the move ends with status 3
    #[arg(long, value_name = "SECONDS", default_value = "45", value_parser = give_up_after)]
    give_up_after: GiveUp,
    #[command(flatten)]
    state: StateArguments,
    /// Not in this release
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<String>,
    /// Write the report of each move as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    criu: CriuArgument,
    /// Where working directories are made [default: a memory file system]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Only errors
    #[arg(long, short)]
    quiet: bool,
    /// More detail; twice for all of it
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Passed on to criu restore
    #[arg(last = true, value_name = "CRIU-RESTORE-OPTIONS")]
    criu_options: Vec<OsString>,
}

/// None is never.
#[derive(Clone, Copy, Debug)]
struct GiveUp(Option<Duration>);

fn give_up_after(text: &str) -> Result<GiveUp, String> {
    match text {
        "never" => Ok(GiveUp(None)),
        _ => text
            .parse()
            .map(|seconds| GiveUp(Some(Duration::from_secs(seconds))))
            .map_err(|_| format!("{text:?} is neither a number of seconds nor never")),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PidnsArgument {
    Auto,
    Host,
    New,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PrefillArgument {
    None,
    Hot,
    All,
}

/// Runs what the command line says.
#[must_use]
pub fn run(arguments: Arguments) -> ExitCode {
    match arguments.command {
        Verb::Serve(arguments) => run_serve(arguments),
        Verb::Takeover(arguments) => run_takeover(arguments),
        Verb::Status(arguments) => run_status(&arguments),
        Verb::Abandon(arguments) => run_abandon(&arguments),
        Verb::LazyPages(arguments) => lazy_pages::run(&arguments),
        Verb::Preflight(arguments) => run_preflight(&arguments),
        Verb::Identity(arguments) => arguments.run("uffd-daemon"),
        Verb::Keeper => keeper::run(),
        Verb::PidnsOuter => pidns::run_outer(),
        Verb::PidnsInit => pidns::run_init(),
    }
}

fn usage(message: &str) -> ExitCode {
    eprintln!("uffd-daemon: {message}");
    ExitCode::from(USAGE)
}

fn run_preflight(arguments: &CriuArgument) -> ExitCode {
    let mut problems = preflight::host_problems();
    match Criu::find(arguments.criu.as_deref()) {
        Ok(criu) => println!("criu {} at {}", criu.version, criu.path.display()),
        Err(error) => problems.push(problem("no usable criu", error.to_string())),
    }
    for problem in &problems {
        println!("{problem}");
    }
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(USAGE) }
}

fn run_serve(arguments: ServeArguments) -> ExitCode {
    host::logging::start(arguments.verbose, arguments.quiet);
    if arguments.metrics.is_some() {
        return usage("--metrics is not in this release; use --json");
    }
    let listen = match arguments.link.endpoint(&arguments.listen) {
        Ok(listen) => listen,
        Err(error) => return usage(&error),
    };
    let criu = match Criu::find(arguments.criu.criu.as_deref()) {
        Ok(criu) => criu,
        Err(error) => return usage(&error.to_string()),
    };
    let problems = preflight::host_problems();
    if !problems.is_empty() {
        let lines: Vec<String> = problems.iter().map(|problem| format!("  {problem}")).collect();
        return usage(&format!("this host cannot receive moves:\n{}", lines.join("\n")));
    }
    let state = match StateDir::open_unless_none(&arguments.state.state_dir) {
        Ok(state) => state,
        Err(error) => return usage(&error.to_string()),
    };
    let config = ServeConfig {
        listen,
        session: SessionConfig {
            criu,
            place: match arguments.pidns {
                PidnsArgument::Auto => PidPlace::Auto,
                PidnsArgument::Host => PidPlace::Host,
                PidnsArgument::New => PidPlace::New,
            },
            hooks: Hooks::new(arguments.hooks),
            work_dir: arguments.work_dir,
            state: state.map(|dir| StateConfig {
                dir,
                listen: String::new(),
                link: arguments.link.to_arguments(),
                session: None,
            }),
            give_up_after: arguments.give_up_after.0,
            quiet: arguments.quiet,
            criu_options: arguments.criu_options,
            prefill: match arguments.prefill {
                PrefillArgument::None => Prefill::None,
                PrefillArgument::Hot => Prefill::Hot,
                PrefillArgument::All => Prefill::All,
            },
            prefill_ms: arguments.prefill_ms,
        },
        once: arguments.once,
        json: arguments.json,
        only_orphans: false,
    };
    match serve(config) {
        Ok(status) => ExitCode::from(status),
        Err(error) => usage(&error.to_string()),
    }
}

/// Every move that a keeper knows of.
fn find(arguments: &StateArguments) -> Result<(StateDir, Vec<takeover::Found>), String> {
    let dir = StateDir::open(&arguments.state_dir).map_err(|error| error.to_string())?;
    let found = takeover::find(&dir).map_err(|error| format!("cannot read the state directory: {error}"))?;
    Ok((dir, found))
}

fn run_status(arguments: &StateArguments) -> ExitCode {
    let found = match find(arguments) {
        Ok((_, found)) => found,
        Err(error) => return usage(&error),
    };
    if found.is_empty() {
        println!("no moves");
    }
    for found in &found {
        println!("{found}");
    }
    ExitCode::SUCCESS
}

fn run_takeover(arguments: TakeoverArguments) -> ExitCode {
    host::logging::start(arguments.verbose, arguments.quiet);
    let (dir, found) = match find(&arguments.state) {
        Ok(found) => found,
        Err(error) => return usage(&error),
    };
    let mut orphans = found.into_iter().filter(|found| !found.info.attended);
    let Some(first) = orphans.next() else {
        println!("no moves to take over");
        return ExitCode::SUCCESS;
    };
    for other in orphans.filter(|other| other.description.listen != first.description.listen) {
        tracing::warn!("another daemon's, for another takeover: {other}");
    }
    let link = match LinkOptions::from_arguments(&first.description.link) {
        Ok(link) => link,
        Err(error) => return usage(&error),
    };
    let (listen, criu) =
        match (link.endpoint(&first.description.listen), Criu::find(arguments.criu.criu.as_deref())) {
            (Ok(listen), Ok(criu)) => (listen, criu),
            (Err(error), _) => return usage(&error),
            (_, Err(error)) => return usage(&error.to_string()),
        };
    let config = ServeConfig {
        listen,
        session: SessionConfig {
            criu,
            place: PidPlace::Auto,
            hooks: Hooks::new(arguments.hooks),
            work_dir: None,
            state: Some(StateConfig {
                dir,
                listen: String::new(),
                link: first.description.link.clone(),
                session: None,
            }),
            give_up_after: arguments.give_up_after.0,
            // What pre-copy had brought has ended with the daemon that kept it.
            prefill: Prefill::None,
            prefill_ms: 0,
            quiet: arguments.quiet,
            criu_options: Vec::new(),
        },
        once: false,
        json: arguments.json,
        only_orphans: true,
    };
    match serve(config) {
        Ok(status) => ExitCode::from(status),
        Err(error) => usage(&error.to_string()),
    }
}

fn run_abandon(arguments: &AbandonArguments) -> ExitCode {
    host::logging::start(0, false);
    let found = match find(&arguments.state) {
        Ok((_, found)) => found,
        Err(error) => return usage(&error),
    };
    let mut failed = false;
    for found in found.into_iter().filter(|found| !found.info.attended) {
        let (id, _) = found.description.session();
        if arguments.session.as_ref().is_some_and(|wanted| *wanted != id.to_string()) {
            continue;
        }
        let poisoned = found.take().map_err(|error| error.to_string()).and_then(|taken| {
            let pages = abandon::abandon(&taken).map_err(|error| format!("cannot poison pages: {error}"))?;
            taken.keeper.dismiss();
            Ok(pages)
        });
        match poisoned {
            Ok(pages) => println!("{id}: {pages} pages are lost"),
            Err(error) => {
                failed = true;
                eprintln!("uffd-daemon: {id}: {error}");
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
