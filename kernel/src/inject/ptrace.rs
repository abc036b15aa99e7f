//! ptrace(2) on one thread of another process, x86-64.
//!
//! Everything here runs in a forked child of a process with threads: it allocates nothing, takes no lock and does not panic.
//!
//! ```text
//! seize ── interrupt ──▶ Trap ── resume(Syscall) ──▶ Syscall (entry) ──▶ Syscall (exit) ── interrupt ──▶ Trap ── detach
//! ```
//!
//! In a [`Stop::Trap`] the kernel is about to look for signals, and behind that decides whether a system call that was
//! interrupted starts again. Registers that were changed elsewhere have to be put back there and nowhere else, or
//! the task sees the kernel's internal error numbers.

use std::io;
use std::time::Instant;

use libc::{c_int, c_uint, pid_t};

/// General registers; `orig_rax` is the system call the thread came in by, -1 if none.
pub(super) type Registers = libc::user_regs_struct;

const EVENT_STOP: c_int = 128;
const GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const GET_SYSCALL_USER_DISPATCH_CONFIG: c_uint = 0x4210;
/// Bytes of the kernel's signal set.
const SIGNAL_SET_BYTES: usize = 8;

/// `struct ptrace_rseq_configuration`
#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}
const _: () = assert!(size_of::<RseqConfiguration>() == 24);

/// `struct ptrace_sud_config`
#[repr(C)]
#[derive(Default)]
struct DispatchConfiguration {
    mode: u64,
    selector: u64,
    offset: u64,
    len: u64,
}
const _: () = assert!(size_of::<DispatchConfiguration>() == 32);

/// A thread that the caller traces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Tracee(pub(super) pid_t);

/// Why a thread stands still.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Interrupted, or stopped by job control: before it looks for signals.
    Trap,
    /// At the entry to or the exit from a system call.
    Syscall,
    /// About to receive this signal.
    Signal(c_int),
    /// Another event; it goes on with `resume`.
    Event,
    /// It has ended.
    Ended,
}

/// How a thread goes on.
#[derive(Clone, Copy)]
pub(super) enum Until {
    /// Until something happens to it.
    Event,
    /// Until it enters or leaves a system call.
    Syscall,
}

/// An errno as an error that needs no memory.
pub(super) fn errno(number: c_int) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Tracee {
    /// Begins to trace a thread, with `PTRACE_O_*`; it runs on.
    pub(super) fn seize(tid: pid_t, options: c_int) -> io::Result<Self> {
        let tracee = Self(tid);
        tracee.request(libc::PTRACE_SEIZE as _, 0, usize::try_from(options).unwrap_or(0))?;
        Ok(tracee)
    }

    /// Asks for a [`Stop::Trap`].
    pub(super) fn interrupt(self) -> io::Result<()> {
        self.request(libc::PTRACE_INTERRUPT as _, 0, 0)
    }

    /// Lets a stopped thread go on, with a signal if there is one to deliver (0: none).
    pub(super) fn resume(self, until: Until, signal: c_int) -> io::Result<()> {
        let request = match until {
            Until::Event => libc::PTRACE_CONT,
            Until::Syscall => libc::PTRACE_SYSCALL,
        };
        self.request(request as _, 0, usize::try_from(signal).unwrap_or(0))
    }

    /// Lets go of a stopped thread. One that job control had stopped stays stopped.
    pub(super) fn detach(self) -> io::Result<()> {
        self.request(libc::PTRACE_DETACH as _, 0, 0)
    }

    /// Sets `PTRACE_O_*` of a stopped thread.
    pub(super) fn set_options(self, options: c_int) -> io::Result<()> {
        self.request(libc::PTRACE_SETOPTIONS as _, 0, usize::try_from(options).unwrap_or(0))
    }

    pub(super) fn registers(self) -> io::Result<Registers> {
        // SAFETY: a struct of integers, for which zeros are valid.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        self.request(libc::PTRACE_GETREGS as _, 0, (&raw mut registers) as usize)?;
        Ok(registers)
    }

    pub(super) fn set_registers(self, registers: &Registers) -> io::Result<()> {
        self.request(libc::PTRACE_SETREGS as _, 0, (&raw const *registers) as usize)
    }

    /// The set of blocked signals: the one that holds when the thread is back in its program.
    pub(super) fn blocked_signals(self) -> io::Result<u64> {
        let mut set = 0_u64;
        self.request(libc::PTRACE_GETSIGMASK as _, SIGNAL_SET_BYTES, (&raw mut set) as usize)?;
        Ok(set)
    }

    pub(super) fn block_signals(self, set: u64) -> io::Result<()> {
        self.request(libc::PTRACE_SETSIGMASK as _, SIGNAL_SET_BYTES, (&raw const set) as usize)
    }

    /// Eight bytes of its memory.
    pub(super) fn peek(self, address: u64) -> io::Result<u64> {
        let mut word = 0_u64;
        let address = usize::try_from(address).map_err(|_| errno(libc::EIO))?;
        // The kernel's own call, unlike libc's function, writes the word to `data`.
        // SAFETY: `word` is a live u64 that the kernel fills.
        let result =
            unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKDATA, self.0, address, &raw mut word) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(word) }
    }

    /// Whether the thread has its system calls sent to a handler of its own (`PR_SET_SYSCALL_USER_DISPATCH`).
    pub(super) fn dispatches_system_calls(self) -> bool {
        let mut found = DispatchConfiguration::default();
        let asked = self.request(
            GET_SYSCALL_USER_DISPATCH_CONFIG,
            size_of::<DispatchConfiguration>(),
            (&raw mut found) as usize,
        );
        asked.is_ok() && found.mode != 0
    }

    /// Where the thread has to go on if it stands in a restartable sequence at `ip`: the sequence's abort handler, as
    /// after any preemption. Whoever takes the thread elsewhere in between has to see to it: the kernel
    /// forgets the sequence as soon as the thread is outside of it.
    pub(super) fn restartable_sequence(self, ip: u64) -> Option<u64> {
        let mut found = RseqConfiguration::default();
        self.request(GET_RSEQ_CONFIGURATION, size_of::<RseqConfiguration>(), (&raw mut found) as usize)
            .ok()?;
        if found.pointer == 0 {
            return None;
        }
        // struct rseq: rseq_cs at 8; struct rseq_cs: start_ip at 8, post_commit_offset at 16, abort_ip at 24.
        let sequence = self.peek(found.pointer.checked_add(8)?).ok().filter(|&sequence| sequence != 0)?;
        let field = |offset| self.peek(sequence.checked_add(offset)?).ok();
        let (start, length, abort) = (field(8)?, field(16)?, field(24)?);
        (ip.wrapping_sub(start) < length).then_some(abort)
    }

    /// Whether its descriptor `there` is the same open file as `here` in the caller.
    pub(super) fn has_open(self, there: u64, here: c_int) -> bool {
        const KCMP_FILE: c_int = 0;
        // SAFETY: kcmp takes integers only.
        unsafe { libc::syscall(libc::SYS_kcmp, libc::getpid(), self.0, KCMP_FILE, here, there) == 0 }
    }

    /// Waits until any thread that the caller traces stands still, or has ended. As [`Tracee::wait`].
    pub(super) fn wait_any(deadline: Instant) -> io::Result<(Self, Stop)> {
        wait_for(-1, Some(deadline)).map(|(tid, status)| (Self(tid), decode(status)))
    }

    /// Waits until the thread stands still. `SIGCHLD` has to be blocked in the caller.
    ///
    /// `TimedOut` behind the deadline.
    pub(super) fn wait(self, deadline: Option<Instant>) -> io::Result<Stop> {
        match wait_for(self.0, deadline) {
            Ok((_, status)) => Ok(decode(status)),
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(Stop::Ended),
            Err(error) => Err(error),
        }
    }

    fn request(self, request: c_uint, address: usize, data: usize) -> io::Result<()> {
        // SAFETY: every caller above pairs its request with what the kernel expects: plain numbers, or the address of
        // a live struct of the size that the request or `address` names, exclusively borrowed if the kernel fills it.
        let result = unsafe { libc::ptrace(request as _, self.0, address, data) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// `waitpid` with a deadline: which thread, and its status.
fn wait_for(tid: pid_t, deadline: Option<Instant>) -> io::Result<(pid_t, c_int)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live int that the kernel fills.
        match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) } {
            0 => wait_for_child(deadline)?,
            -1 => {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EINTR) {
                    return Err(error);
                }
            }
            tid => return Ok((tid, status)),
        }
    }
}

fn decode(status: c_int) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Ended;
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        EVENT_STOP => Stop::Trap,
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        _ => Stop::Event,
    }
}

/// Waits until the kernel says that something happened to a child or tracee.
fn wait_for_child(deadline: Option<Instant>) -> io::Result<()> {
    let left = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
        Some(left) if left.is_zero() => return Err(errno(libc::ETIMEDOUT)),
        Some(left) => left,
        // Only to have a value: the caller asks again.
        None => std::time::Duration::from_secs(1),
    };
    let timeout = libc::timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    // SAFETY: a signal set is plain memory that sigemptyset initialises; all pointers are to live values; no siginfo
    // is asked for.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        // An early return is no harm: the caller looks, and waits again.
        libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const timeout);
    }
    Ok(())
}
