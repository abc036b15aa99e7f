//! A process that does nothing but keep descriptors open.
//!
//! Pages in pipes and missing pages behind a userfaultfd live as long as a descriptor does. When a program
//! has to end while they are still needed, it leaves a holder behind.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Forks a holder: a copy of this process with the descriptors in `keep` and no others, in a session of its own, that
/// waits to be killed. Returns its pid.
///
/// Nobody waits for it at the end of a pipeline or of a connection: whatever it does not keep is closed.
///
/// # Errors
/// The errno of `fork(2)`.
pub fn fork_holder(name: &std::ffi::CStr, keep: &[BorrowedFd<'_>]) -> io::Result<u32> {
    let gaps = gaps(keep);
    // SAFETY: the child of a process with threads may call only async-signal-safe functions until it
    // execs or exits: it calls prctl, setsid, close_range, signal, capget, capset and pause, and allocates nothing.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: async-signal-safe calls only; `name` is a live C string (the parent's memory was
            // copied by fork), and so are the gaps, whose numbers no owner in the child closes again, as it
            // never returns; pause returns only for handled signals, and TERM is back at its default.
            unsafe {
                libc::prctl(libc::PR_SET_NAME, name.as_ptr());
                libc::setsid();
                for (first, last) in &gaps {
                    libc::syscall(libc::SYS_close_range, *first, *last, 0);
                }
                for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                // It waits and is killed: nobody's rights are needed for that. If refused it waits with them.
                let _ = crate::privileges::renounce_but(crate::privileges::CapabilitySet::empty());
                loop {
                    libc::pause();
                }
            }
        }
        pid => Ok(pid.unsigned_abs()),
    }
}

/// What is between the descriptors in `keep`, and behind the last.
fn gaps(keep: &[BorrowedFd<'_>]) -> Vec<(libc::c_uint, libc::c_uint)> {
    let mut kept: Vec<libc::c_uint> = keep.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut gaps = Vec::with_capacity(kept.len() + 1);
    let mut from = 0;
    for fd in kept {
        if fd > from {
            gaps.push((from, fd - 1));
        }
        from = from.max(fd + 1);
    }
    gaps.push((from, libc::c_uint::MAX));
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_holder_keeps_what_it_is_told_to_and_nothing_else() {
        let (kept, mut kept_end) = UnixStream::pair().unwrap();
        let (other, mut other_end) = UnixStream::pair().unwrap();
        let pid = fork_holder(c"test-hold", &[kept.as_fd()]).unwrap();
        drop((kept, other));
        let mut byte = [0];
        assert_eq!(other_end.read(&mut byte).unwrap(), 0, "the holder does not have it");
        kept_end.set_nonblocking(true).unwrap();
        assert_eq!(kept_end.read(&mut byte).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        kept_end.write_all(b"x").unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(pid, None).unwrap();
    }
}
