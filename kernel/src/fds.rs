//! Descriptors over unix sockets.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Most descriptors in one message (the kernel's SCM_MAX_FD).
pub const MAX_FDS_PER_MESSAGE: usize = 253;

/// Turns a system call's result into an owned descriptor or its errno.
pub(crate) fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: a non-negative result of the calls this is used with is a new descriptor that only the
        // caller knows.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Receives at most `data.len()` bytes and the descriptors that came with them (close-on-exec); 0 bytes is
/// the end of the stream.
///
/// # Errors
/// The errno of `recvmsg(2)`; `InvalidData` if descriptors were cut off.
pub fn receive(socket: BorrowedFd<'_>, data: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([i32; MAX_FDS_PER_MESSAGE]);
    let mut slices = [IoSliceMut::new(data)];
    let message = loop {
        match recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(nix::Error::EINTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for us; each appears once in the message.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors were cut off"));
    }
    Ok((message.bytes, fds))
}

/// Sends `data` (at least one byte) with `fds`.
///
/// # Errors
/// The errno of `sendmsg(2)`.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<i32> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(data)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(sent) if sent == data.len() => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

/// How many bytes a pipe or a socket has to be read.
///
/// # Errors
/// The errno of `ioctl(FIONREAD)`.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to where it is told to, and `bytes` is one that lives throughout the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(u64::from(bytes.unsigned_abs())) }
}

/// Closes a descriptor that was handed to this process by number (a command-line option).
///
/// Whoever started the process gave the number away; nothing else in it may use it.
pub fn close_number(number: i32) {
    // SAFETY: close takes an integer; by contract no owner of this number exists in the process, so no
    // OwnedFd is left dangling.
    unsafe { libc::close(number) };
}
