//! A process that does nothing but keep descriptors open.
//!
//! Pages in pipes and missing pages behind a userfaultfd live as long as a descriptor does. When a program
//! has to end while they are still needed, it leaves a holder behind.

use std::io;

/// Forks a holder: a copy of this process, with every descriptor it has, in a session of its own, that
/// waits to be killed. Returns its pid.
///
/// The holder keeps standard input, output and error closed, so that nobody waits for it at the end of a
/// pipeline.
///
/// # Errors
/// The errno of `fork(2)`.
pub fn fork_holder(name: &std::ffi::CStr) -> io::Result<u32> {
    // SAFETY: the child of a process with threads may call only async-signal-safe functions until it
    // execs or exits: it calls prctl, setsid, close, signal and pause, and allocates nothing.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: async-signal-safe calls only; `name` is a live C string (the parent's memory was
            // copied by fork); pause returns only for handled signals, and TERM is back at its default.
            unsafe {
                libc::prctl(libc::PR_SET_NAME, name.as_ptr());
                libc::setsid();
                for fd in 0..3 {
                    libc::close(fd);
                }
                for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                loop {
                    libc::pause();
                }
            }
        }
        pid => Ok(pid.unsigned_abs()),
    }
}
