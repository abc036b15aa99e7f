//! TUN devices: a network interface whose packets a program reads and writes.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Longest name of an interface, in bytes.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// `IFF_TUN | IFF_NO_PI | IFF_TUN_EXCL`; the last one is the sign bit of the field that takes them.
const FLAGS: u16 = 0x9001;
const _: () = assert!(FLAGS as libc::c_int == libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL);

nix::ioctl_write_ptr_bad!(
    /// Makes a device, or attaches to one.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

/// A TUN device of this process. It is gone as soon as this value is, also when the process is killed.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes the device `name` in the network namespace of the calling thread: whole IP packets, without a header of
    /// the driver's, and without offloads, so that a packet is what would be on a wire. Reads and writes do not wait.
    ///
    /// # Errors
    /// `InvalidInput` if the name is too long or empty; `EPERM` without `CAP_NET_ADMIN`; `EBUSY` if there is such a
    /// device; `ENOENT` or `ENODEV` without the driver.
    pub fn new(name: &CStr) -> io::Result<Self> {
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes.len() > NAME_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name of 1 to 15 bytes"));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        // SAFETY: ifreq is a plain C struct of integers, for which zeroes are a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        request.ifr_ifru.ifru_flags = libc::c_short::from_ne_bytes(FLAGS.to_ne_bytes());
        // SAFETY: the descriptor is open; the request lives through the call, is an ifreq with a terminated name, and
        // the kernel writes no more than that.
        unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
        Ok(Self { file })
    }

    /// Takes the next packet that was sent out of the device; its length, or `None` if there is none. What does not
    /// fit into `packet` is cut off.
    ///
    /// # Errors
    /// The errno of `read(2)`.
    pub fn receive(&self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        match nix::unistd::read(&self.file, packet) {
            Ok(len) => Ok(Some(len)),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Has a packet arrive at the device. `false` if it was refused: the device is down, or this is no IP packet.
    ///
    /// # Errors
    /// Other errors of `write(2)`.
    pub fn send(&self, packet: &[u8]) -> io::Result<bool> {
        match nix::unistd::write(&self.file, packet) {
            Ok(_) => Ok(true),
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::EIO | nix::Error::EINVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_interface_can_have_is_refused() {
        for name in [c"", c"sixteen-byte-nam"] {
            assert_eq!(Tun::new(name).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
