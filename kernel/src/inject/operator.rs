//! The process that operates on another one; see the module above.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use libc::{c_int, pid_t};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::ptrace::{Registers, Stop, Tracee, Until, errno};
use super::{InjectError, PATIENCE, STOP_PATIENCE, Taken};
use crate::fds::receive;
use crate::pidfd::PidFd;
use crate::poll::PollSet;

/// Most threads of a process.
const THREADS_MAX: usize = 8192;
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

/// Steps, as the report of the operator names them.
const STEPS: [&str; 8] = [
    "done",
    "list threads",
    "trace a thread",
    "stop the threads",
    "look at the main thread",
    "run userfaultfd in the process",
    "take the descriptor out",
    "close the descriptor in the process",
];
const DONE: u8 = 0;
const LIST: u8 = 1;
const SEIZE: u8 = 2;
const STOP: u8 = 3;
const LOOK: u8 = 4;
const CALL: u8 = 5;
const TAKE: u8 = 6;
const CLOSE: u8 = 7;

/// A `syscall` instruction in a process, and the sixteen bytes from it on.
#[derive(Clone, Copy)]
struct Instruction {
    address: u64,
    bytes: [u64; 2],
}

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
    match (answer.step, answer.errno, fds.pop()) {
        (DONE, 0, Some(fd)) => {
            Ok(Taken { fd, stopped: Duration::from_nanos(answer.stopped_ns), threads: answer.threads })
        }
        (LOOK, libc::ENOSYS, _) => {
            Err(InjectError::Unsupported("the process is no 64-bit one, or handles system calls itself"))
        }
        (LOOK, libc::EACCES, _) => {
            Err(InjectError::Unsupported("the process has a seccomp filter that cannot be suspended here"))
        }
        (SEIZE, libc::EPERM, _) => Err(InjectError::Traced),
        (STOP, libc::ETIMEDOUT, _) => Err(InjectError::Busy),
        (CALL, libc::EPERM | libc::ENOSYS | libc::EMFILE | libc::ENFILE, _) => {
            Err(InjectError::Refused(errno(answer.errno)))
        }
        (step, number, _) => {
            Err(named(STEPS.get(usize::from(step)).copied().unwrap_or("operate"), errno(number)))
        }
    }
}

/// What the operator reports.
#[derive(Clone, Copy, Default)]
struct Answer {
    step: u8,
    errno: c_int,
    threads: u32,
    stopped_ns: u64,
}

impl Answer {
    const BYTES: usize = 24;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.step;
        bytes[4..8].copy_from_slice(&self.errno.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.threads.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.stopped_ns.to_ne_bytes());
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        let mut stopped = [0; 8];
        stopped.copy_from_slice(&bytes[16..24]);
        Self {
            step: bytes[0],
            errno: c_int::from_ne_bytes(word(4)),
            threads: u32::from_ne_bytes(word(8)),
            stopped_ns: u64::from_ne_bytes(stopped),
        }
    }
}

/// The first `syscall` instruction of the vDSO.
fn find_instruction(pid: u32) -> io::Result<Option<Instruction>> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    /// A vDSO is two pages today.
    const VDSO_MAX: u64 = 64 << 10;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
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

/// What the operator needs. From here on no allocation, no lock, no panic.
struct Job<'a> {
    pid: pid_t,
    handle: BorrowedFd<'a>,
    tasks: BorrowedFd<'a>,
    instruction: Instruction,
    seccomp: bool,
    /// Those that stand still; the capacity is there from the start.
    threads: Vec<Tracee>,
}

type Step<T> = Result<T, (u8, io::Error)>;

fn at<T>(step: u8, result: io::Result<T>) -> Step<T> {
    result.map_err(|error| (step, error))
}

fn operate(job: &mut Job<'_>, socket: BorrowedFd<'_>) -> ! {
    // SAFETY: async-signal-safe calls on live values. In a session of its own no terminal or process group ends this
    // process; with every signal blocked only SIGKILL does, and SIGCHLD can be waited for.
    unsafe {
        libc::setsid();
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
    // The threads stand still for as long as this one waits for a processor.
    let _ = crate::sched::set_slice(100_000);
    let begun = Instant::now();
    let mut ended = begun;
    let result = job.stop_all().and_then(|()| job.make_and_take());
    for thread in &job.threads {
        let _ = thread.detach();
    }
    if !job.threads.is_empty() {
        ended = Instant::now();
    }
    let mut answer = Answer {
        threads: u32::try_from(job.threads.len()).unwrap_or(u32::MAX),
        stopped_ns: u64::try_from((ended - begun).as_nanos()).unwrap_or(u64::MAX),
        ..Answer::default()
    };
    let sent = match result {
        Ok(fd) => send_raw(socket, answer, Some(fd)),
        Err((step, error)) => {
            (answer.step, answer.errno) = (step, error.raw_os_error().unwrap_or(libc::EIO));
            send_raw(socket, answer, None)
        }
    };
    // What is still traced (a thread that did not stop) goes on by itself when its tracer ends.
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(c_int::from(sent.is_err())) }
}

impl Job<'_> {
    /// Stops every thread: afterwards nobody can fork, exec or start one.
    fn stop_all(&mut self) -> Step<()> {
        let deadline = Instant::now() + STOP_PATIENCE;
        loop {
            let known = self.threads.len();
            self.seize_new()?;
            if self.threads.len() == known {
                break;
            }
            let mut next = known;
            while let Some(&thread) = self.threads.get(next) {
                if at(STOP, to_trap(thread, Some(deadline)))? {
                    next += 1;
                } else {
                    self.threads.swap_remove(next);
                }
            }
        }
        for thread in &self.threads {
            // A thread that is not the main one is only stopped and continued; what that does to its system call
            // is undone.
            let mut registers = at(LOOK, thread.registers())?;
            if start_again(&mut registers) {
                at(LOOK, thread.set_registers(&registers))?;
            }
        }
        Ok(())
    }

    /// Seizes and interrupts every thread that is not among those known.
    fn seize_new(&mut self) -> Step<()> {
        // SAFETY: lseek on an open descriptor.
        if unsafe { libc::lseek(self.tasks.as_raw_fd(), 0, libc::SEEK_SET) } < 0 {
            return Err((LIST, io::Error::last_os_error()));
        }
        let mut room = DirectoryRoom([0; 16 << 10]);
        loop {
            // SAFETY: the buffer is exclusively borrowed, of the stated length, and aligned as the entries are.
            let got = unsafe {
                libc::syscall(libc::SYS_getdents64, self.tasks.as_raw_fd(), room.0.as_mut_ptr(), room.0.len())
            };
            let got = match usize::try_from(got) {
                Ok(0) => return Ok(()),
                Ok(got) => got,
                Err(_) => return Err((LIST, io::Error::last_os_error())),
            };
            let mut entries = room.0.get(..got).unwrap_or_default();
            while let Some((tid, rest)) = next_entry(entries) {
                entries = rest;
                let Some(tid) = tid.filter(|&tid| !self.threads.contains(&Tracee(tid))) else { continue };
                if self.threads.len() == self.threads.capacity() {
                    return Err((LIST, errno(libc::E2BIG)));
                }
                match Tracee::seize(tid) {
                    Ok(thread) => {
                        at(SEIZE, thread.interrupt())?;
                        self.threads.push(thread);
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    // A thread that has ended cannot be traced either. It is the caller's concern only if it is the
                    // main one, or if it is another tracer that keeps us out: then the main one is kept from us too.
                    Err(_) if tid != self.pid => {}
                    Err(error) => return Err((SEIZE, error)),
                }
            }
        }
    }

    /// The operation itself, on the main thread.
    fn make_and_take(&self) -> Step<RawFd> {
        let main = Tracee(self.pid);
        if !self.threads.contains(&main) {
            return Err((STOP, errno(libc::ESRCH)));
        }
        let saved = at(LOOK, main.registers())?;
        let blocked = at(LOOK, main.blocked_signals())?;
        if saved.cs != CS_64_BIT || main.dispatches_system_calls() {
            return Err((LOOK, errno(libc::ENOSYS)));
        }
        // It may have executed another program since the instruction was looked up.
        let code = (main.peek(self.instruction.address), main.peek(self.instruction.address + 8));
        if !matches!(code, (Ok(first), Ok(second)) if [first, second] == self.instruction.bytes) {
            return Err((LOOK, errno(libc::EAGAIN)));
        }
        let suspend = if self.seccomp { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        if main.set_options(libc::PTRACE_O_TRACESYSGOOD | suspend).is_err() {
            return Err((LOOK, errno(libc::EACCES)));
        }
        let mut back = saved;
        if signed(saved.orig_rax) < 0 {
            if let Some(abort) = main.restartable_sequence(saved.rip) {
                back.rip = abort;
            }
        }
        // Signals wait until the registers are back; SIGKILL and SIGSTOP cannot.
        at(LOOK, main.block_signals(!0))?;
        let result = self.make_take_close(main, &saved);
        let restored = put_back(main, &back, blocked);
        let fd = result?;
        at(CLOSE, restored)?;
        Ok(fd)
    }

    fn make_take_close(&self, main: Tracee, saved: &Registers) -> Step<RawFd> {
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs();
        let number =
            at(CALL, self.call(main, saved, libc::SYS_userfaultfd, u64::from(flags) | USER_MODE_ONLY))?;
        // SAFETY: an open descriptor and two integers; the result is a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.handle.as_raw_fd(), number, 0) };
        let error = io::Error::last_os_error();
        at(CLOSE, self.call(main, saved, libc::SYS_close, number))?;
        match RawFd::try_from(fd) {
            Ok(fd) if fd >= 0 => Ok(fd),
            _ => Err((TAKE, error)),
        }
    }

    /// Has the thread run one system call with one argument.
    fn call(
        &self,
        thread: Tracee,
        saved: &Registers,
        number: libc::c_long,
        argument: u64,
    ) -> io::Result<u64> {
        let mut registers = *saved;
        registers.rip = self.instruction.address;
        registers.rax = unsigned(number);
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

/// Brings a thread to where the kernel is about to look for signals; false if it has ended.
fn to_trap(thread: Tracee, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        match thread.wait(deadline)? {
            Stop::Trap => return Ok(true),
            Stop::Ended => return Ok(false),
            Stop::Signal(signal) => thread.resume(Until::Event, signal)?,
            Stop::Syscall | Stop::Event => thread.resume(Until::Event, 0)?,
        }
    }
}

/// Puts registers and blocked signals back, where the kernel goes on as if nothing had been.
fn put_back(thread: Tracee, registers: &Registers, blocked: u64) -> io::Result<()> {
    thread.interrupt()?;
    thread.resume(Until::Event, 0)?;
    if !to_trap(thread, None)? {
        return Err(errno(libc::ESRCH));
    }
    thread.set_registers(registers)?;
    thread.block_signals(blocked)
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

/// Room for directory entries, aligned as they are.
#[repr(align(8))]
struct DirectoryRoom([u8; 16 << 10]);

/// The first entry of what getdents64 gave, as a number if it is one, and the rest.
fn next_entry(entries: &[u8]) -> Option<(Option<pid_t>, &[u8])> {
    // struct linux_dirent64: inode, offset, u16 length of the entry, u8 type, name with a zero at its end.
    let length = usize::from(u16::from_ne_bytes([*entries.get(16)?, *entries.get(17)?]));
    let (entry, rest) = entries.split_at_checked(length)?;
    let name = entry.get(19..)?.split(|&byte| byte == 0).next()?;
    let digit = |number: pid_t, &byte: &u8| match byte {
        b'0'..=b'9' => number.checked_mul(10)?.checked_add(pid_t::from(byte - b'0')),
        _ => None,
    };
    let number = if name.is_empty() { None } else { name.iter().try_fold(0, digit) };
    Some((number, rest))
}

/// A control message with one descriptor, as `CMSG_SPACE(4)` lays it out.
#[repr(C)]
struct OneDescriptor {
    header: libc::cmsghdr,
    fd: RawFd,
    pad: u32,
}
const _: () = assert!(size_of::<OneDescriptor>() == 24);

/// Sends the answer, with the descriptor if there is one.
fn send_raw(socket: BorrowedFd<'_>, answer: Answer, fd: Option<RawFd>) -> io::Result<()> {
    let mut bytes = answer.encode();
    let mut data = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: structs of integers and pointers, for which zeros are valid.
    let (mut control, mut message) =
        unsafe { (std::mem::zeroed::<OneDescriptor>(), std::mem::zeroed::<libc::msghdr>()) };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        control.header.cmsg_len = size_of::<libc::cmsghdr>() + size_of::<RawFd>();
        control.header.cmsg_level = libc::SOL_SOCKET;
        control.header.cmsg_type = libc::SCM_RIGHTS;
        control.fd = fd;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<OneDescriptor>();
    }
    // SAFETY: the message points to live values of the lengths it states; the kernel only reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
