//! What the operator reports, and how: over a socket, without memory.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use libc::c_int;

/// How far the operator came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum At {
    #[default]
    Done,
    List,
    Trace,
    Stop,
    Look,
    Call,
    Take,
    Close,
}

impl At {
    const ALL: [Self; 8] =
        [Self::Done, Self::List, Self::Trace, Self::Stop, Self::Look, Self::Call, Self::Take, Self::Close];

    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Done => "report",
            Self::List => "list threads",
            Self::Trace => "trace a thread",
            Self::Stop => "stop the main thread",
            Self::Look => "look at the main thread",
            Self::Call => "run userfaultfd in the process",
            Self::Take => "take the descriptor out",
            Self::Close => "close the descriptor in the process",
        }
    }
}

/// What the operator reports.
#[derive(Clone, Copy, Default)]
pub(super) struct Answer {
    pub(super) at: At,
    pub(super) errno: c_int,
    pub(super) threads: u32,
    pub(super) copies: u32,
    pub(super) waited_ns: u64,
    pub(super) stood_ns: u64,
}

impl Answer {
    pub(super) const BYTES: usize = 32;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.at as u8;
        bytes[4..8].copy_from_slice(&self.errno.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.threads.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.copies.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.waited_ns.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.stood_ns.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        let long = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        Self {
            at: At::ALL.get(usize::from(bytes[0])).copied().unwrap_or(At::Look),
            errno: c_int::from_ne_bytes(word(4)),
            threads: u32::from_ne_bytes(word(8)),
            copies: u32::from_ne_bytes(word(12)),
            waited_ns: long(16),
            stood_ns: long(24),
        }
    }
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
pub(super) fn send(socket: BorrowedFd<'_>, answer: Answer, fd: Option<RawFd>) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_arrives_as_it_was_sent() {
        let answer =
            Answer { at: At::Call, errno: 11, threads: 3, copies: 2, waited_ns: 9, stood_ns: 1 << 40 };
        let read = Answer::decode(&answer.encode());
        assert_eq!((read.at, read.errno), (At::Call, 11));
        assert_eq!((read.waited_ns, read.stood_ns), (9, 1 << 40));
        assert_eq!((read.threads, read.copies), (3, 2));
        assert!(At::ALL.iter().enumerate().all(|(number, &at)| number == at as usize));
    }
}
