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
    info_into(socket, &mut info)?;
    let in_flight = info.tcpi_unacked > 0;
    Ok(in_flight.then(|| Duration::from_millis(u64::from(info.tcpi_last_ack_recv))))
}

/// Has the kernel fill a beginning of its `struct tcp_info`; `T` consists of integers only.
fn info_into<T>(socket: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut len = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    // SAFETY: the descriptor is open; info and len are exclusively borrowed and len is info's size, of which the
    // kernel writes no more; any bytes are valid integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(info).cast(),
            &raw mut len,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What TCP knows of the way to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Shortest round trip of late: without the queues that we fill ourselves.
    pub min_rtt: Duration,
    /// Bytes per second that arrived last time data was acknowledged; 0 before.
    pub delivery_rate: u64,
}

/// The beginning of `struct tcp_info` (linux/tcp.h) as far as [`path`] reads it; libc's ends before.
#[repr(C)]
struct TcpInfo {
    before: [u8; 148],
    min_rtt_us: u32,
    between: [u8; 8],
    delivery_rate: u64,
}

const _: () = assert!(std::mem::offset_of!(TcpInfo, min_rtt_us) == 148);
const _: () = assert!(std::mem::offset_of!(TcpInfo, delivery_rate) == 160);

/// What TCP knows of the way to the peer; `None` before it was acknowledged anything, or from a kernel before 4.9.
///
/// # Errors
/// `EOPNOTSUPP` if it is no TCP socket.
pub fn path(socket: BorrowedFd<'_>) -> io::Result<Option<Path>> {
    let mut info = TcpInfo { before: [0; 148], min_rtt_us: u32::MAX, between: [0; 8], delivery_rate: 0 };
    info_into(socket, &mut info)?;
    let known = info.min_rtt_us < u32::MAX;
    let min_rtt = Duration::from_micros(u64::from(info.min_rtt_us));
    Ok(known.then_some(Path { min_rtt, delivery_rate: info.delivery_rate }))
}
