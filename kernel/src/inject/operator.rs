//! The caller's side of an operation: what is looked up before, the operator's process, and its answer.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use libc::pid_t;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::operation::{Instruction, Job, operate};
use super::ptrace::errno;
use super::report::{Answer, At};
use super::{InjectError, PATIENCE, Taken};
use crate::fds::receive;
use crate::pidfd::PidFd;
use crate::poll::PollSet;

/// Most threads of a process.
const THREADS_MAX: usize = 8192;

pub(super) fn userfaultfd_of(pid: u32) -> Result<Taken, InjectError> {
    let failed = |what| move |source| named(what, source);
    let handle = PidFd::open(pid).map_err(failed("open the process"))?;
    let instruction = find_instruction(pid).map_err(failed("read the process's vDSO"))?;
    let instruction =
        instruction.ok_or(InjectError::Unsupported("the process has no vDSO with a syscall instruction"))?;
    let tasks = File::open(format!("/proc/{pid}/task")).map_err(failed("open the process"))?;
    let seccomp = has_seccomp(pid).map_err(failed("read the process's status"))?;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (ours, its) = pair.map_err(|errno| named("make a socket", errno.into()))?;
    let mut job = Job {
        pid: pid_t::try_from(pid).map_err(|_| InjectError::Gone)?,
        handle: handle.as_fd(),
        tasks: tasks.as_fd(),
        instruction,
        seccomp,
        threads: Vec::with_capacity(THREADS_MAX),
        pending: Vec::with_capacity(THREADS_MAX),
    };
    // SAFETY: the child of a process with threads may call only async-signal-safe functions until it exits. `operate`
    // makes system calls and works on its stack and on buffers allocated before; it ends in `_exit`.
    let operator = match unsafe { libc::fork() } {
        -1 => return Err(named("fork", io::Error::last_os_error())),
        0 => operate(&mut job, its.as_fd()),
        operator => operator,
    };
    drop(its);
    let answer = await_answer(&ours);
    if matches!(&answer, Err(InjectError::Failed { source, .. }) if source.kind() == io::ErrorKind::TimedOut)
    {
        // It may hold changed registers: it is left to finish, and is a zombie until we end.
        return answer;
    }
    // SAFETY: waits for our own child, and asks for no status.
    while unsafe { libc::waitpid(operator, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
    answer
}

fn named(what: &'static str, source: io::Error) -> InjectError {
    match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => InjectError::Gone,
        _ => InjectError::Failed { what, source },
    }
}

fn await_answer(socket: &OwnedFd) -> Result<Taken, InjectError> {
    let failed = |source| InjectError::Failed { what: "wait for the operator", source };
    let deadline = Instant::now() + PATIENCE;
    let mut set = PollSet::default();
    let answer = set.add(socket.as_fd(), false);
    while !set.is_ready(answer) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(errno(libc::ETIMEDOUT)));
        }
        set.wait(left).map_err(failed)?;
    }
    let mut message = [0; Answer::BYTES];
    let (got, mut fds) = receive(socket.as_fd(), &mut message).map_err(failed)?;
    if got != Answer::BYTES {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    let answer = Answer::decode(&message);
    match (answer.at, answer.errno, fds.pop()) {
        (At::Done, 0, Some(fd)) => Ok(Taken {
            fd,
            waited: Duration::from_nanos(answer.waited_ns),
            stood: Duration::from_nanos(answer.stood_ns),
            threads: answer.threads,
            copies: answer.copies,
        }),
        (At::Look, libc::ENOSYS, _) => {
            Err(InjectError::Unsupported("the process is no 64-bit one, or handles system calls itself"))
        }
        (At::Look, libc::EACCES, _) => {
            Err(InjectError::Unsupported("the process has a seccomp filter that cannot be suspended here"))
        }
        (At::Trace, libc::EPERM, _) => Err(InjectError::Traced),
        (At::Stop, libc::ETIMEDOUT, _) => Err(InjectError::Busy),
        (At::Call, libc::EPERM | libc::ENOSYS | libc::EMFILE | libc::ENFILE, _) => {
            Err(InjectError::Refused(errno(answer.errno)))
        }
        (at, number, _) => Err(named(at.words(), errno(number))),
    }
}

/// The first `syscall` instruction of the vDSO.
fn find_instruction(pid: u32) -> io::Result<Option<Instruction>> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    /// A vDSO is two pages today.
    const VDSO_MAX: u64 = 64 << 10;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    if maps.is_empty() {
        // It has ended and waits for its parent.
        return Err(errno(libc::ESRCH));
    }
    let range = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let Some((start, end)) = range.filter(|(start, end)| start < end && end - start <= VDSO_MAX) else {
        return Ok(None);
    };
    let mut memory = File::open(format!("/proc/{pid}/mem"))?;
    memory.seek(SeekFrom::Start(start))?;
    let mut code = Vec::new();
    memory.take(end - start).read_to_end(&mut code)?;
    let word = |at: usize| code[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    let found = (0..code.len().saturating_sub(16)).find(|&at| code[at..at + 2] == SYSCALL);
    Ok(found.map(|at| Instruction { address: start + at as u64, bytes: [word(at), word(at + 8)] }))
}

fn has_seccomp(pid: u32) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() != "0")))
}
