//! A PID namespace for a restored tree, with a minimal init that lives as long as the tree.
//!
//! CRIU restores every task under the pid it had. When one of those is in use, the tree gets a namespace of
//! its own. Two hidden verbs do it without `unsafe`: the first unshares and starts the second, which is
//! then process 1 of the new namespace; that mounts its own /proc, starts CRIU when told to, and afterwards
//! only reaps.
//!
//! ```text
//!   daemon ── pidns-outer (unshare) ── pidns-init (pid 1) ── criu restore ── the tree
//!      │  stdin: one JSON line, the command            │
//!      └─ stdout: "init PID", then "exit STATUS" ──────┘
//! ```

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use kernel::pidfd::PidFd;
use kernel::spawn::CommandSetup;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::barrier;

/// Name of the verb that unshares.
pub const OUTER_VERB: &str = "pidns-outer";
/// How often an init without a tree looks whether its visitors have left.
const VISITORS_LOOK: std::time::Duration = std::time::Duration::from_millis(100);

/// Name of the verb that is process 1.
pub const INIT_VERB: &str = "pidns-init";

/// An empty PID namespace, ready to start a command.
#[derive(Debug)]
pub struct PidNamespace {
    outer: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    init: PidFd,
    init_pid: u32,
}

impl PidNamespace {
    /// Makes the namespace.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn create() -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(OUTER_VERB).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut outer = command.own_session().spawn()?;
        let orders = outer.stdin.take();
        let mut answers = BufReader::new(outer.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        let init_pid = line.trim().strip_prefix("init ").and_then(|pid| pid.parse().ok());
        let init_pid = init_pid
            .ok_or_else(|| io::Error::other(format!("cannot make a PID namespace: {}", line.trim())))?;
        Ok(Self { outer, orders, answers, init: PidFd::open(init_pid)?, init_pid })
    }

    /// The init process's pid, seen from outside.
    #[must_use]
    pub const fn init_pid(&self) -> u32 {
        self.init_pid
    }

    /// Starts the command in the namespace, with the barrier's socket in its environment and what it prints in
    /// `output`; pids above `keep_free_below` are used for it and its helpers. Returns what it reads as its standard input.
    ///
    /// # Errors
    /// A broken pipe if the namespace is gone.
    pub fn start(
        &mut self,
        program: &str,
        args: &[String],
        barrier: &Path,
        output: &Path,
        keep_free_below: u32,
    ) -> io::Result<ChildStdin> {
        let mut orders = self.orders.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let order = serde_json::json!({
            "program": program, "args": args, "barrier": barrier, "output": output, "last_pid": keep_free_below
        });
        orders.write_all(format!("{order}\n").as_bytes())?;
        Ok(orders)
    }

    /// Readable when the command has ended (or the namespace is gone): then [`PidNamespace::exit_status`].
    #[must_use]
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.answers.get_ref().as_fd()
    }

    /// The command's exit status, waiting for it; `None` if the namespace ended first.
    pub fn exit_status(&mut self) -> Option<i32> {
        let mut line = String::new();
        self.answers.read_line(&mut line).ok()?;
        line.trim().strip_prefix("exit ")?.parse().ok()
    }

    /// Kills everything in the namespace.
    pub fn kill(&mut self) {
        let _ = self.init.signal(nix::libc::SIGKILL);
        let _ = self.outer.wait();
        let _ = host::waiting::readable_within(self.init.as_fd(), std::time::Duration::from_secs(10));
    }

    /// Leaves the namespace to its tree.
    pub fn leave(mut self) {
        let _ = self.outer.wait();
    }
}

/// The verb that unshares: starts the init and ends.
#[must_use]
pub fn run_outer() -> ExitCode {
    let made = unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)
        .map_err(io::Error::from)
        .and_then(|()| Command::new("/proc/self/exe").arg(INIT_VERB).spawn());
    match made {
        Ok(init) => {
            println!("init {}", init.id());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The verb that is process 1.
#[must_use]
pub fn run_init() -> ExitCode {
    match init() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("uffd-daemon: init of the new PID namespace: {error}");
            ExitCode::FAILURE
        }
    }
}

fn init() -> io::Result<()> {
    let none: Option<&str> = None;
    // Mounts of the host still arrive, ours do not leave.
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none)?;
    let line = first_line(File::from(io::stdin().as_fd().try_clone_to_owned()?))?;
    if line.is_empty() {
        // Called off before anything was started.
        return Ok(());
    }
    let order: serde_json::Value = serde_json::from_slice(&line)?;
    let program = order["program"].as_str().ok_or(io::ErrorKind::InvalidData)?;
    let args: Vec<&str> =
        order["args"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str).collect();
    // CRIU and what it starts must not take a pid that the tree needs.
    if let Some(last) = order["last_pid"].as_u64() {
        std::fs::write("/proc/sys/kernel/ns_last_pid", last.to_string())?;
    }
    let mut command = Command::new(program);
    command.env(barrier::SOCKET, order["barrier"].as_str().unwrap_or_default());
    let output = File::create(order["output"].as_str().unwrap_or_default())?;
    command.args(args).stdin(Stdio::inherit()).stdout(output.try_clone()?).stderr(output);
    let child = command.spawn()?;
    // It holds the file that CRIU prints to.
    drop(command);
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    reap(child)
}

/// One line, and nothing behind it: that is the command's.
fn first_line(mut input: File) -> io::Result<Vec<u8>> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while input.read(&mut byte)? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    Ok(line)
}

/// Reaps until nobody is left, and reports when `child` ends.
fn reap(child: Pid) -> io::Result<()> {
    loop {
        let status = match waitpid(None::<Pid>, Some(WaitPidFlag::empty())) {
            Ok(status) => status,
            Err(nix::Error::EINTR) => continue,
            Err(nix::Error::ECHILD) if !has_visitors() => return Ok(()),
            Err(nix::Error::ECHILD) => {
                std::thread::sleep(VISITORS_LOOK);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if status.pid() != Some(child) {
            continue;
        }
        let code = match status {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
            _ => continue,
        };
        // A daemon that has died does not take the tree with it.
        let _ = writeln!(io::stdout(), "exit {code}");
        detach()?;
    }
}

/// Whether somebody is here who was not started here: a source that moves the tree on still has its pages, and
/// would be killed with the namespace.
fn has_visitors() -> bool {
    let lives = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    };
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).any(|pid| pid != "1" && lives(&pid))
}

/// Lets go of whatever the daemon could wait for.
fn detach() -> io::Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    nix::unistd::chdir("/")?;
    Ok(())
}
