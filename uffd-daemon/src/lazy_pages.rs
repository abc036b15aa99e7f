//! The drop-in for `criu lazy-pages`: same flags, same files, same order of events.
//!
//! ```text
//!   read images ─▶ listen on lazy-pages.socket ─▶ ready (status fd, script, pidfile)
//!     ─▶ restore connects: userfaultfds ─▶ connect to the page server, serve faults
//!     ─▶ finish word ─▶ fetch the rest ─▶ close the page server's session ─▶ exit 0
//! ```
//!
//! Where it differs, it is safer: if the page source is lost, a keeper goes on holding the userfaultfds, so
//! the tasks wait instead of reading zeros; and if the restore fails, the page server's connection is reset
//! instead of closed, which makes a waiting `criu dump` resume the source instead of killing it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use clap::Args;
use host::interrupt::Interrupt;
use host::mailbox::{Mailbox, Post, mailbox};
use host::waiting;
use kernel::spawn::CommandSetup;
use kernel::uffd::Uffd;
use protocol::criu::checkpoint::Checkpoint;
use protocol::criu::page_server::HeaderLayout;
use protocol::lazy_map::LazyMap;
use protocol::units::TaskId;

use crate::fault::{Command, FaultLoop, LatencyHistogram, Notice, held_by, latency_histogram};
use crate::handover::{HandoverSocket, ReceiveError};
use crate::keeper::{KeeperHandle, Owner};
use crate::latency;
use crate::tree::Tree;
use crate::upstream::{Images, PageServer, Upstream};

/// Arguments of `criu lazy-pages`.
#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools)] // they are CRIU's
pub struct LazyPagesArguments {
    /// Directory of the images
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Directory of the socket, the log and the pidfile [default: the images directory]
    #[arg(short = 'W', long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Log file, in the work directory [default: standard error]
    #[arg(short = 'o', long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// More detail: -v4 or -vvvv for all of it
    #[arg(short = 'v', long, value_name = "N", num_args = 0..=1, default_missing_value = "1",
          action = clap::ArgAction::Append)]
    verbosity: Vec<String>,
    /// Fetch the pages from a page server; without it they are read from the images
    #[arg(long)]
    page_server: bool,
    /// Address of the page server, a name or an IP
    #[arg(long, value_name = "A", default_value = "127.0.0.1")]
    address: String,
    /// Port of the page server
    #[arg(long, value_name = "P")]
    port: Option<u16>,
    /// A connected socket to the page server
    #[arg(long, value_name = "FD")]
    ps_socket: Option<i32>,
    /// Go on in the background once the socket is there
    #[arg(short = 'd', long)]
    daemon: bool,
    /// Write the daemon's pid here
    #[arg(long, value_name = "F")]
    pidfile: Option<PathBuf>,
    /// Write one zero byte here when a restore may start
    #[arg(long, value_name = "FD")]
    status_fd: Option<i32>,
    /// Run this when a restore may start, with CRTOOLS_SCRIPT_ACTION=status-ready
    #[arg(long, value_name = "SCRIPT")]
    action_script: Vec<PathBuf>,
    /// Accepted; pages are not punched out of the images
    #[arg(long)]
    auto_dedup: bool,
    /// Not supported: CRIU's TLS protocol
    #[arg(long)]
    tls: bool,
    /// Accepted without effect
    #[arg(long, hide = true)]
    log_pid: bool,
    #[arg(long, hide = true, value_name = "FILE")]
    tls_cacert: Option<PathBuf>,
    #[arg(long, hide = true, value_name = "FILE")]
    tls_cacrl: Option<PathBuf>,
    #[arg(long, hide = true, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    #[arg(long, hide = true, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    #[arg(long, hide = true)]
    tls_no_cn_verify: bool,
    #[arg(long, hide = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[arg(long, hide = true)]
    no_default_config: bool,
    #[arg(short = 'r', long, hide = true, value_name = "DIR")]
    root: Option<PathBuf>,
    #[arg(long, hide = true)]
    unprivileged: bool,
    /// Set for the process in the background: where it says that it is ready
    #[arg(long, hide = true, value_name = "FD")]
    ready_fd: Option<i32>,
}

/// A daemon that failed.
#[derive(Debug, thiserror::Error)]
enum LazyPagesError {
    #[error("{0}")]
    Usage(String),
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    #[error("{0}")]
    Images(String),
    #[error("restore failed: {0}")]
    Restore(ReceiveError),
    #[error("interrupted before the restore was finished")]
    CalledOff,
    #[error(
        "the page source is lost ({reason}) with {missing} pages missing. The tasks wait where they touch one; \
         process {keeper} keeps them from reading zeros. Killing the tasks ends it"
    )]
    Lost { reason: String, missing: u64, keeper: u32 },
    #[error("interrupted with pages missing")]
    Interrupted,
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> LazyPagesError {
    let doing = doing.into();
    move |source| LazyPagesError::Io { doing, source }
}

/// Runs the daemon; the exit status is CRIU's: 0 when every page was transferred, else 1.
#[must_use]
pub fn run(arguments: &LazyPagesArguments) -> ExitCode {
    let result =
        if arguments.daemon && arguments.ready_fd.is_none() { background() } else { foreground(arguments) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            eprintln!("uffd-daemon: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the same command once more in the background, and returns when it is ready.
fn background() -> Result<(), LazyPagesError> {
    let start = || -> io::Result<bool> {
        let (mut ready, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs);
        let mut command = Process::new("/proc/self/exe");
        command.args(std::env::args_os().skip(1));
        command.args(["--ready-fd", &theirs.as_raw_fd().to_string()]);
        command.inherit(theirs).own_session().stdin(Stdio::null());
        let mut child = command.spawn()?;
        // Ours must be the only end left here, or a child that dies would never be noticed.
        drop(command);
        let mut byte = [0];
        if matches!(ready.read(&mut byte), Ok(1)) {
            return Ok(true);
        }
        child.wait()?;
        Ok(false)
    };
    match start().map_err(io_error("start in the background"))? {
        true => Ok(()),
        false => Err(LazyPagesError::Usage("the daemon did not start; its log says why".into())),
    }
}

fn foreground(arguments: &LazyPagesArguments) -> Result<(), LazyPagesError> {
    let images = arguments.images_dir.canonicalize();
    let images =
        images.map_err(io_error(format!("open images directory {}", arguments.images_dir.display())))?;
    let work = arguments.work_dir.as_ref().unwrap_or(&images);
    std::env::set_current_dir(work)
        .map_err(io_error(format!("change to work directory {}", work.display())))?;
    start_log(arguments)?;
    if arguments.tls {
        return Err(LazyPagesError::Usage(
            "--tls: CRIU's TLS protocol is not supported; use a tunnel".into(),
        ));
    }
    let checkpoint = Checkpoint::open(&images).map_err(|error| LazyPagesError::Images(error.to_string()))?;
    let interrupt = Interrupt::install().map_err(io_error("install signal handlers"))?;
    let socket = HandoverSocket::bind(Path::new(".")).map_err(io_error("listen on lazy-pages.socket"))?;
    say_ready(arguments)?;
    if arguments.page_server || arguments.ps_socket.is_some() {
        let layout = checkpoint.header_layout().unwrap_or(HeaderLayout::Compact);
        // Taken before the keeper starts: it must not inherit the connection.
        let mut given = arguments.ps_socket.map(take_number).transpose()?;
        let connect = || match given.take() {
            Some(socket) => PageServer::over(socket, layout, true).map_err(io_error("use --ps-socket")),
            None => connect(arguments, layout),
        };
        Daemon::new(&checkpoint, interrupt)?.serve(socket, connect)
    } else {
        let tasks: Vec<TaskId> =
            checkpoint.tasks.iter().filter(|task| task.alive).map(|task| task.id).collect();
        let open =
            || Images::open(&images, &tasks).map_err(|error| LazyPagesError::Images(error.to_string()));
        Daemon::new(&checkpoint, interrupt)?.serve(socket, open)
    }
}

/// Takes over a descriptor that was given by number.
fn take_number(number: i32) -> Result<OwnedFd, LazyPagesError> {
    let own = kernel::pidfd::PidFd::open(std::process::id()).and_then(|me| me.take(number));
    let own = own.map_err(io_error(format!("use descriptor {number}")))?;
    kernel::fds::close_number(number);
    Ok(own)
}

fn connect(arguments: &LazyPagesArguments, layout: HeaderLayout) -> Result<PageServer, LazyPagesError> {
    let port = arguments.port.ok_or_else(|| LazyPagesError::Usage("--page-server needs --port".into()))?;
    let name = format!("{}:{port}", arguments.address);
    let addresses: Vec<SocketAddr> = (arguments.address.as_str(), port)
        .to_socket_addrs()
        .map_err(io_error(format!("resolve page server {name}")))?
        .collect();
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match PageServer::connect(address, layout) {
            Ok(server) => return Ok(server),
            Err(error) => last = error,
        }
    }
    Err(io_error(format!("connect to page server {name}"))(last))
}

fn start_log(arguments: &LazyPagesArguments) -> Result<(), LazyPagesError> {
    let level: u32 = arguments
        .verbosity
        .iter()
        .map(|value| value.parse().unwrap_or(1 + u32::try_from(value.len()).unwrap_or(0)))
        .sum();
    // CRIU: 1 errors, 2 warnings (the default), 3 information, 4 everything.
    let level = match level {
        0 => tracing::Level::WARN,
        1 => tracing::Level::ERROR,
        2 => tracing::Level::WARN,
        3 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    match &arguments.log_file {
        None => host::logging::start_at(level, None),
        Some(path) => {
            let file = File::create(path).map_err(io_error(format!("create log {}", path.display())))?;
            host::logging::start_at(level, Some(file));
        }
    }
    Ok(())
}

/// Everything that waits for a listening daemon may go on.
fn say_ready(arguments: &LazyPagesArguments) -> Result<(), LazyPagesError> {
    if let Some(path) = &arguments.pidfile {
        fs::write(path, std::process::id().to_string())
            .map_err(io_error(format!("write pidfile {}", path.display())))?;
    }
    for script in &arguments.action_script {
        let status = Process::new(script).env("CRTOOLS_SCRIPT_ACTION", "status-ready").status();
        let status = status.map_err(io_error(format!("run {}", script.display())))?;
        if !status.success() {
            return Err(LazyPagesError::Usage(format!("{} failed: {status}", script.display())));
        }
    }
    if arguments.ready_fd.is_some() {
        // Whoever reads the output of the command waits for its end, not for the daemon's.
        let nowhere = File::options().write(true).open("/dev/null");
        let closed = nowhere.and_then(|nowhere| {
            nix::unistd::dup2_stdout(&nowhere)?;
            nix::unistd::dup2_stderr(&nowhere)?;
            Ok(())
        });
        closed.map_err(io_error("let go of standard output"))?;
    }
    for number in [arguments.status_fd, arguments.ready_fd].into_iter().flatten() {
        let written = File::from(take_number(number)?).write_all(&[0]);
        written.map_err(io_error(format!("write to descriptor {number}")))?;
    }
    Ok(())
}

struct Daemon {
    tree: Arc<Tree>,
    tasks: Vec<TaskId>,
    interrupt: Interrupt,
    keeper: KeeperHandle,
    latency: LatencyHistogram,
    notices: Mailbox<Notice>,
    notice_post: Post<Notice>,
}

/// A fault loop that runs in its thread.
struct Loop<U> {
    commands: Post<Command<U>>,
    thread: JoinHandle<Option<U>>,
}

impl Daemon {
    fn new(checkpoint: &Checkpoint, interrupt: Interrupt) -> Result<Self, LazyPagesError> {
        let live = checkpoint.tasks.iter().filter(|task| task.alive);
        let map = LazyMap::new(live.map(|task| (task.id, task.lazy_runs())));
        let map = map.map_err(|error| LazyPagesError::Images(error.to_string()))?;
        let (notice_post, notices) = mailbox().map_err(io_error("make a mailbox"))?;
        tracing::info!(pages = map.pages(), tasks = map.tasks().len(), "lazy pages");
        Ok(Self {
            tree: Tree::new(&map),
            tasks: checkpoint.tasks.iter().map(|task| task.id).collect(),
            interrupt,
            keeper: KeeperHandle::start().map_err(io_error("start the keeper"))?,
            latency: latency_histogram(),
            notices,
            notice_post,
        })
    }

    /// Serves one restore; `source` is called when its first userfaultfd has come.
    fn serve<U: Upstream + 'static>(
        self,
        socket: HandoverSocket,
        mut source: impl FnMut() -> Result<U, LazyPagesError>,
    ) -> Result<(), LazyPagesError> {
        let mut running: Option<Loop<U>> = None;
        let mut failed = None;
        let received = socket.receive(self.tasks.iter().copied(), self.interrupt.as_fd(), |task, uffd| {
            if running.is_none() {
                match source().and_then(|source| self.start(source)) {
                    Ok(started) => running = Some(started),
                    // Without a page source nothing may run: the restore fails with the broken hand-over.
                    Err(error) => {
                        failed = Some(error);
                        return ControlFlow::Break(());
                    }
                }
            }
            let owner = self.tree.position(task).map_or(Owner::NOBODY, |family| Owner::new(family, 0));
            self.keeper.hold(owner, uffd.as_fd());
            if let (Some(running), Some(family)) = (&running, self.tree.position(task)) {
                running.commands.send(Command::Serve { family, uffd: Arc::new(Uffd::from(uffd)) });
            }
            ControlFlow::Continue(())
        });
        let result = match (received, failed) {
            (_, Some(error)) => Err(error),
            (Err(ReceiveError::Cancelled), None) => Err(LazyPagesError::CalledOff),
            (Err(error), None) => Err(LazyPagesError::Restore(error)),
            (Ok(restore), None) => match &running {
                Some(running) => {
                    running.commands.send(Command::Running);
                    let result = self.wait_settled();
                    drop(restore);
                    result
                }
                // Nothing but zombies.
                None => Ok(()),
            },
        };
        self.end(running, result)
    }

    fn start<U: Upstream + 'static>(&self, source: U) -> Result<Loop<U>, LazyPagesError> {
        let (commands, orders) = mailbox().map_err(io_error("make a mailbox"))?;
        let fault_loop = FaultLoop::new(
            self.tree.clone(),
            Some(source),
            orders,
            self.notice_post.clone(),
            Some(held_by(self.keeper.clone())),
            self.latency.clone(),
        );
        let thread = std::thread::Builder::new().name("fault".into()).spawn(move || fault_loop.run());
        Ok(Loop { commands, thread: thread.map_err(io_error("start a thread"))? })
    }

    fn wait_settled(&self) -> Result<(), LazyPagesError> {
        loop {
            let fds = [self.notices.as_fd(), self.interrupt.as_fd()];
            let [_, interrupted] = waiting::readable(fds, None).map_err(io_error("wait"))?;
            if let Some(notice) = self.notices.empty().into_iter().next() {
                return match notice {
                    Notice::Settled => Ok(()),
                    // Nobody commands it here.
                    Notice::Detached => continue,
                    Notice::UpstreamLost(reason) | Notice::Broken(reason) => {
                        let missing = self.tree.remote_pages();
                        let keeper = self.keeper.pid();
                        Err(LazyPagesError::Lost { reason, missing, keeper })
                    }
                };
            }
            if interrupted && self.interrupt.take() {
                return Err(LazyPagesError::Interrupted);
            }
        }
    }

    fn end<U: Upstream>(
        self,
        running: Option<Loop<U>>,
        result: Result<(), LazyPagesError>,
    ) -> Result<(), LazyPagesError> {
        let source = running.and_then(|running| {
            running.commands.send(Command::Stop);
            running.thread.join().ok().flatten()
        });
        match &result {
            Ok(()) => {
                self.keeper.dismiss();
                if let Some(mut source) = source {
                    if let Err(error) = source.finish() {
                        tracing::warn!("{error}");
                    }
                }
                let faults = latency::summary(&self.latency);
                let counts = self.tree.counts();
                tracing::info!(?counts, ?faults, "all pages are here");
            }
            // The tasks of a failed restore are dead; those of a running tree need the keeper.
            Err(LazyPagesError::Lost { .. } | LazyPagesError::Interrupted) => {}
            Err(_) => {
                self.keeper.dismiss();
                if let Some(mut source) = source {
                    source.reset();
                }
            }
        }
        result
    }
}
