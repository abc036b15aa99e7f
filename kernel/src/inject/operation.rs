//! The operator's side: a process that operates on another one and ends.
//!
//! ```text
//! every thread   seize: it runs on, but stops at a fork
//! main thread    interrupt ── trap ── userfaultfd, pidfd_getfd, close ── trap ── registers back, detach
//! the others     those that may be in the middle of a fork: interrupt ── trap ── detach
//! new-born       has it a copy of the descriptor? close it ── detach
//! ```
//!
//! The main thread alone stands still while the descriptor exists in the process. A thread that forks meanwhile
//! hands a copy on; it stops at that, and so does the child. Who is not waiting in some other system call afterwards may
//! still be on its way there and is waited for. Threads that sleep are never stopped: they are let go when
//! their tracer ends.
//!
//! Nothing here allocates, takes a lock or panics: this is the child of a process with threads.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Instant;

use libc::{c_int, pid_t};

use super::listing::{DirectoryRoom, next_entry, number, write_path};
use super::ptrace::{Registers, Stop, Tracee, Until, errno};
use super::report::{Answer, At, send};
use super::{FORK_PATIENCE, STOP_PATIENCE};

/// The selector of 64-bit code.
const CS_64_BIT: u64 = 0x33;
/// `UFFD_USER_MODE_ONLY`
const USER_MODE_ONLY: u64 = 1;
/// An error of the kernel's own: restart unless a handler runs, then `EINTR`.
const ERESTARTNOHAND: i64 = 514;
/// System calls that report `EINTR` where they could start again, having done nothing.
const STARTS_AGAIN: [libc::c_long; 16] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    libc::SYS_io_uring_enter,
];
/// System calls that hand descriptors on.
const FORKS: [libc::c_long; 4] = [libc::SYS_clone, libc::SYS_clone3, libc::SYS_fork, libc::SYS_vfork];

/// A `syscall` instruction in a process, and the sixteen bytes from it on.
#[derive(Clone, Copy)]
pub(super) struct Instruction {
    pub(super) address: u64,
    pub(super) bytes: [u64; 2],
}

/// What the operator needs.
pub(super) struct Job<'a> {
    pub(super) pid: pid_t,
    pub(super) handle: BorrowedFd<'a>,
    /// `/proc/PID/task`
    pub(super) tasks: BorrowedFd<'a>,
    pub(super) instruction: Instruction,
    pub(super) seccomp: bool,
    /// Those that are traced; the capacity of both lists is there from the start.
    pub(super) threads: Vec<Tracee>,
    /// Those of them that were interrupted and have to be waited for.
    pub(super) pending: Vec<Tracee>,
}

type Step<T> = Result<T, (At, io::Error)>;

fn at<T>(step: At, result: io::Result<T>) -> Step<T> {
    result.map_err(|error| (step, error))
}

/// A descriptor that was made in the process: its number there, and here if it could be taken.
#[derive(Clone, Copy)]
struct Made {
    there: u64,
    here: RawFd,
}

/// The operator's life.
pub(super) fn operate(job: &mut Job<'_>, socket: BorrowedFd<'_>) -> ! {
    // SAFETY: async-signal-safe calls on live values. In a session of its own no terminal or process group ends this
    // process; with every signal blocked only SIGKILL does, and SIGCHLD can be waited for.
    unsafe {
        libc::setsid();
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
    // A thread stands still for as long as this one waits for a processor.
    let _ = crate::sched::set_slice(100_000);
    let mut answer = Answer::default();
    let result = job.operate(&mut answer);
    let sent = match result {
        Ok(made) => send(socket, answer, Some(made.here)),
        Err((step, error)) => {
            (answer.at, answer.errno) = (step, error.raw_os_error().unwrap_or(libc::EIO));
            send(socket, answer, None)
        }
    };
    // Whoever is still traced goes on by himself when his tracer ends.
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(c_int::from(sent.is_err())) }
}

impl Job<'_> {
    fn operate(&mut self, answer: &mut Answer) -> Step<Made> {
        while self.seize_new()? {}
        let main = Tracee(self.pid);
        if !self.threads.contains(&main) {
            return Err((At::Trace, errno(libc::ESRCH)));
        }
        let begun = Instant::now();
        at(At::Stop, main.interrupt())?;
        let deadline = begun + STOP_PATIENCE;
        // Forked before there was a descriptor, and stopped at its birth all the same.
        let mut born = 0;
        if !at(At::Stop, to_trap(main, Some(deadline), &mut born))? {
            return Err((At::Stop, errno(libc::ESRCH)));
        }
        let stands = Instant::now();
        let made = self.borrow(main, |saved| self.make_and_take(main, saved));
        let _ = main.detach();
        let nanos = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
        };
        (answer.waited_ns, answer.stood_ns) = (nanos(begun, stands), nanos(stands, Instant::now()));
        let made = made?;
        (answer.threads, answer.copies) = self.release(made, born);
        Ok(made)
    }

    /// Seizes every thread that is not among those known; whether there was one.
    fn seize_new(&mut self) -> Step<bool> {
        const STOP_AT_FORKS: c_int =
            libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_TRACECLONE;
        let known = self.threads.len();
        // SAFETY: lseek on an open descriptor.
        if unsafe { libc::lseek(self.tasks.as_raw_fd(), 0, libc::SEEK_SET) } < 0 {
            return Err((At::List, io::Error::last_os_error()));
        }
        let mut room = DirectoryRoom([0; 16 << 10]);
        loop {
            // SAFETY: the buffer is exclusively borrowed, of the stated length, and aligned as the entries are.
            let got = unsafe {
                libc::syscall(libc::SYS_getdents64, self.tasks.as_raw_fd(), room.0.as_mut_ptr(), room.0.len())
            };
            let got = match usize::try_from(got) {
                Ok(0) => return Ok(self.threads.len() > known),
                Ok(got) => got,
                Err(_) => return Err((At::List, io::Error::last_os_error())),
            };
            let mut entries = room.0.get(..got).unwrap_or_default();
            while let Some((tid, rest)) = next_entry(entries) {
                entries = rest;
                let Some(tid) = tid.filter(|&tid| !self.threads.contains(&Tracee(tid))) else { continue };
                if self.threads.len() == self.threads.capacity() {
                    return Err((At::List, errno(libc::E2BIG)));
                }
                match Tracee::seize(tid, STOP_AT_FORKS) {
                    Ok(thread) => self.threads.push(thread),
                    // A thread that has ended, or that a seized one has started, which is traced from its birth. If
                    // another tracer keeps us out, then from the main thread, too.
                    Err(_) if tid != self.pid => {}
                    Err(error) => return Err((At::Trace, error)),
                }
            }
        }
    }

    /// Has `work` done with a thread that stands in a trap, and puts everything back.
    fn borrow<T>(&self, thread: Tracee, work: impl FnOnce(&Registers) -> Step<T>) -> Step<T> {
        let mut saved = at(At::Look, thread.registers())?;
        start_again(&mut saved);
        let blocked = at(At::Look, thread.blocked_signals())?;
        if saved.cs != CS_64_BIT || thread.dispatches_system_calls() {
            at(At::Look, thread.set_registers(&saved))?;
            return Err((At::Look, errno(libc::ENOSYS)));
        }
        // It may have executed another program since the instruction was looked up.
        let code = (thread.peek(self.instruction.address), thread.peek(self.instruction.address + 8));
        if !matches!(code, (Ok(first), Ok(second)) if [first, second] == self.instruction.bytes) {
            at(At::Look, thread.set_registers(&saved))?;
            return Err((At::Look, errno(libc::EAGAIN)));
        }
        let suspend = if self.seccomp { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        if thread.set_options(libc::PTRACE_O_TRACESYSGOOD | suspend).is_err() {
            at(At::Look, thread.set_registers(&saved))?;
            return Err((At::Look, errno(libc::EACCES)));
        }
        if signed(saved.orig_rax) < 0 {
            if let Some(abort) = thread.restartable_sequence(saved.rip) {
                saved.rip = abort;
            }
        }
        // Signals wait until the registers are back; SIGKILL and SIGSTOP cannot.
        at(At::Look, thread.block_signals(!0))?;
        let result = work(&saved);
        let restored = put_back(thread, &saved, blocked);
        let value = result?;
        at(At::Close, restored)?;
        Ok(value)
    }

    fn make_and_take(&self, main: Tracee, saved: &Registers) -> Step<Made> {
        let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs()) | USER_MODE_ONLY;
        let there = at(At::Call, self.call(main, saved, libc::SYS_userfaultfd, flags))?;
        // SAFETY: an open descriptor and two integers; the result is a new descriptor or -1.
        let here = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.handle.as_raw_fd(), there, 0) };
        let error = io::Error::last_os_error();
        at(At::Close, self.call(main, saved, libc::SYS_close, there))?;
        match RawFd::try_from(here) {
            Ok(here) if here >= 0 => Ok(Made { there, here }),
            _ => Err((At::Take, error)),
        }
    }

    /// Lets go of every thread, and closes copies of the descriptor in processes that were forked meanwhile. `born` have
    /// been born already. How many threads were stopped in all, and how many copies there were.
    fn release(&mut self, made: Made, mut born: u32) -> (u32, u32) {
        let deadline = Instant::now() + FORK_PATIENCE;
        for &thread in &self.threads {
            if thread.0 != self.pid && self.may_fork(thread) && thread.interrupt().is_ok() {
                self.pending.push(thread);
            }
        }
        let (mut stopped, mut seen, mut copies) = (1, 0, 0);
        while !self.pending.is_empty() || seen < born {
            // A thread in an uninterruptible wait that long is not in the middle of a fork but behind it, waiting for the
            // child of a vfork.
            let Ok((thread, stop)) = Tracee::wait_any(deadline) else { break };
            let place = self.pending.iter().position(|&pending| pending == thread);
            match stop {
                Stop::Trap if self.threads.contains(&thread) => {
                    let _ = let_go(thread);
                    stopped += 1;
                }
                Stop::Trap => {
                    copies += u32::from(self.mend(thread, made));
                    seen += 1;
                    continue;
                }
                Stop::Event => {
                    born += 1;
                    let _ = thread.resume(Until::Event, 0);
                    continue;
                }
                Stop::Signal(signal) => {
                    let _ = thread.resume(Until::Event, signal);
                    continue;
                }
                Stop::Syscall => {
                    let _ = thread.resume(Until::Event, 0);
                    continue;
                }
                Stop::Ended => {}
            }
            if let Some(place) = place {
                self.pending.swap_remove(place);
            }
        }
        (stopped, copies)
    }

    /// Lets go of a process or thread that was born while it was not known whether the main thread had the descriptor;
    /// whether it had a copy.
    fn mend(&self, child: Tracee, made: Made) -> bool {
        let has_copy = child.has_open(made.there, made.here);
        if has_copy {
            let _ = self
                .borrow(child, |saved| at(At::Close, self.call(child, saved, libc::SYS_close, made.there)));
        }
        let _ = child.detach();
        has_copy
    }

    /// Whether a thread may be on its way through a fork: it runs, or waits inside of one.
    fn may_fork(&self, thread: Tracee) -> bool {
        let mut path = [0; 32];
        if !write_path(&mut path, thread.0) {
            return true;
        }
        let mut text = [0; 24];
        // SAFETY: the path ends in a zero; the buffer is exclusively borrowed and of the stated length; the descriptor
        // is closed by whom it was opened.
        let got = unsafe {
            let file =
                libc::openat(self.tasks.as_raw_fd(), path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
            let got = libc::read(file, text.as_mut_ptr().cast(), text.len());
            libc::close(file);
            got
        };
        let text = text.get(..usize::try_from(got).unwrap_or(0)).unwrap_or_default();
        // "running", or the number of the system call, or -1 where it waits outside of one.
        let digits = text.split(|&byte| byte == b' ').next().unwrap_or_default();
        match digits {
            b"-1" => false,
            _ => number(digits).is_none_or(|call| FORKS.contains(&call.into())),
        }
    }

    /// Has the thread run one system call with one argument.
    fn call(&self, thread: Tracee, saved: &Registers, call: libc::c_long, argument: u64) -> io::Result<u64> {
        let mut registers = *saved;
        registers.rip = self.instruction.address;
        registers.rax = unsigned(call);
        registers.rdi = argument;
        // Not in a system call: the kernel must not rewind to start one again.
        registers.orig_rax = unsigned(-1);
        thread.set_registers(&registers)?;
        until_system_call(thread)?;
        until_system_call(thread)?;
        let result = signed(thread.registers()?.rax);
        match c_int::try_from(result) {
            Ok(error @ ..=-1) => Err(errno(-error)),
            Ok(_) => Ok(unsigned(result)),
            Err(_) => Err(errno(libc::EIO)),
        }
    }
}

/// Lets a stopped thread go on until it enters or leaves a system call.
fn until_system_call(thread: Tracee) -> io::Result<()> {
    let mut signal = 0;
    loop {
        thread.resume(Until::Syscall, signal)?;
        signal = 0;
        // No deadline: with changed registers there is no way back but this.
        match thread.wait(None)? {
            Stop::Syscall => return Ok(()),
            Stop::Signal(libc::SIGSTOP) => signal = libc::SIGSTOP,
            // Everything else is blocked, so this is a fault of the instruction.
            Stop::Signal(_) => return Err(errno(libc::EFAULT)),
            Stop::Trap | Stop::Event => {}
            Stop::Ended => return Err(errno(libc::ESRCH)),
        }
    }
}

/// Brings a thread to where the kernel is about to look for signals; false if it has ended. Counts what it forks on the way.
fn to_trap(thread: Tracee, deadline: Option<Instant>, born: &mut u32) -> io::Result<bool> {
    loop {
        match thread.wait(deadline)? {
            Stop::Trap => return Ok(true),
            Stop::Ended => return Ok(false),
            Stop::Signal(signal) => thread.resume(Until::Event, signal)?,
            Stop::Syscall => thread.resume(Until::Event, 0)?,
            Stop::Event => {
                *born += 1;
                thread.resume(Until::Event, 0)?;
            }
        }
    }
}

/// Puts registers and blocked signals back, where the kernel goes on as if nothing had been.
fn put_back(thread: Tracee, registers: &Registers, blocked: u64) -> io::Result<()> {
    thread.interrupt()?;
    thread.resume(Until::Event, 0)?;
    if !to_trap(thread, None, &mut 0)? {
        return Err(errno(libc::ESRCH));
    }
    thread.set_registers(registers)?;
    thread.block_signals(blocked)
}

/// Detaches a thread that was only interrupted, and undoes what that does to its system call.
fn let_go(thread: Tracee) -> io::Result<()> {
    let mut registers = thread.registers()?;
    if start_again(&mut registers) {
        thread.set_registers(&registers)?;
    }
    thread.detach()
}

/// Makes a system call that reports `EINTR` because its thread was stopped start again, unless a handler is to run.
fn start_again(registers: &mut Registers) -> bool {
    let call = signed(registers.orig_rax);
    let interrupted = signed(registers.rax) == -i64::from(libc::EINTR) && STARTS_AGAIN.contains(&call);
    if interrupted {
        registers.rax = unsigned(-ERESTARTNOHAND);
    }
    interrupted
}

/// A register as a signed number.
const fn signed(register: u64) -> i64 {
    i64::from_ne_bytes(register.to_ne_bytes())
}

/// A signed number as a register.
const fn unsigned(number: i64) -> u64 {
    u64::from_ne_bytes(number.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_that_did_nothing_start_again() {
        // SAFETY: a struct of integers.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        for (call, starts) in [(libc::SYS_epoll_wait, true), (libc::SYS_close, false), (-1, false)] {
            (registers.orig_rax, registers.rax) = (unsigned(call), unsigned(-4));
            assert_eq!(start_again(&mut registers), starts);
            assert_eq!(signed(registers.rax), if starts { -514 } else { -4 });
        }
    }
}
