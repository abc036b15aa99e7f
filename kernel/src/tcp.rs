//! TCP options that neither std nor socket2 has.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

fn get(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: the descriptor is open; value and len are exclusively borrowed and len is value's size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            std::ptr::from_mut(&mut value).cast(),
            &raw mut len,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn set(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: the descriptor is open; value lives through the call and len is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            std::ptr::from_ref(&value).cast(),
            len,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the socket is in repair mode (as CRIU leaves it after a dump).
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`; `ENOTSOCK`, `ENOPROTOOPT` or `EOPNOTSUPP` if it is no TCP socket.
pub fn in_repair(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(get(socket, libc::TCP_REPAIR)? != 0)
}

/// Ends repair mode: the connection goes on, with window probes to wake the peer.
///
/// # Errors
/// As [`in_repair`].
pub fn end_repair(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::TCP_REPAIR, 0)
}

/// Keeps at most `bytes` unsent in the send queue (`TCP_NOTSENT_LOWAT`).
///
/// # Errors
/// The errno of `setsockopt(2)`.
pub fn set_notsent_lowat(socket: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    set(socket, libc::TCP_NOTSENT_LOWAT, bytes)
}

/// How long the peer's kernel has acknowledged nothing although segments are on their way to it; `None` if none
/// are, as when the peer's window is shut because its program does not read.
///
/// # Errors
/// `EOPNOTSUPP` if it is no TCP socket.
pub fn unheard_for(socket: BorrowedFd<'_>) -> io::Result<Option<Duration>> {
    // SAFETY: tcp_info is a plain struct of integers, for which zeroes are a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or(0);
    // SAFETY: the descriptor is open; info and len are exclusively borrowed and len is info's size; a kernel with
    // a longer struct writes no more than that.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let in_flight = info.tcpi_unacked > 0;
    Ok(in_flight.then(|| Duration::from_millis(u64::from(info.tcpi_last_ack_recv))))
}
