//! Seccomp filters for programs of our own: they compare numbers of system calls, not the architecture.

use std::io;

/// What comes of a system call that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// The process is killed.
    Kill,
    /// It fails with `EPERM`.
    Refuse,
}

/// Leaves the calling process the system calls in `allowed` (at most 200 of them), from now on and for all of its threads.
///
/// # Errors
/// The errno of `seccomp(2)`; `InvalidInput` for a longer list.
pub fn allow_only(allowed: &[libc::c_long], otherwise: Otherwise) -> io::Result<()> {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const MOST: usize = 200;
    if allowed.len() > MOST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let step = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    // The number is the first field of struct seccomp_data. A jump counts the steps that it leaves out.
    let mut filter = vec![step(LOAD, 0, 0)];
    for (index, &number) in allowed.iter().enumerate() {
        let number = u32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
        filter.push(step(IF_EQUAL, u8::try_from(allowed.len() - index).unwrap_or(u8::MAX), number));
    }
    let refused = match otherwise {
        Otherwise::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        Otherwise::Refuse => libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(),
    };
    filter.push(step(RETURN, 0, refused));
    filter.push(step(RETURN, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: prctl with integers only; seccomp reads the program, which points to a live array of the stated length.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const program,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
