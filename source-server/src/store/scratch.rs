//! A pipe of one thread, through which pages are copied by reference.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice, tee};
use protocol::link::Stream;
use protocol::units::pages_to_bytes;

/// Makes a pipe with room for `pages` pages.
///
/// # Errors
/// The errno of `pipe2(2)` or `F_SETPIPE_SZ`.
pub(super) fn page_pipe(pages: u64) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let bytes = i32::try_from(pages_to_bytes(pages)).map_err(|_| io::ErrorKind::InvalidInput)?;
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(bytes))?;
    Ok((reader, writer))
}

/// A pipe of one thread: pages are duplicated into it by reference (`tee`), and taken out of it.
#[derive(Debug)]
pub struct Scratch {
    reader: File,
    writer: OwnedFd,
    null: File,
    /// Pages on their way to a link that encrypts.
    copy: Vec<u8>,
}

impl Scratch {
    /// A scratch pipe that takes a whole chunk of `pages` pages.
    ///
    /// # Errors
    /// The errno of the system calls.
    pub fn new(pages: u64) -> io::Result<Self> {
        let (reader, writer) = page_pipe(pages)?;
        let null = File::options().write(true).open("/dev/null")?;
        Ok(Self { reader: reader.into(), writer, null, copy: Vec::new() })
    }

    /// Duplicates the first `pages` pages of `pipe`, which keeps them.
    ///
    /// # Errors
    /// The errno of `tee(2)`; `UnexpectedEof` if fewer are there.
    pub fn duplicate(&self, pipe: BorrowedFd<'_>, pages: u64) -> io::Result<()> {
        let want = usize::try_from(pages_to_bytes(pages)).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            match tee(pipe, self.writer.as_fd(), want, SpliceFFlags::SPLICE_F_NONBLOCK) {
                Ok(got) if got == want => return Ok(()),
                Ok(got) => {
                    // tee always starts at the front: what came must go before another try could help, and
                    // a chunk that is shorter than its index says cannot be helped.
                    self.skip(got)?;
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Drops `bytes` bytes from the front.
    ///
    /// # Errors
    /// The errno of `splice(2)`.
    pub fn skip(&self, bytes: usize) -> io::Result<()> {
        self.splice_to(self.null.as_fd(), bytes, SpliceFFlags::empty())
    }

    /// Sends `head` and `bytes` bytes from the front: by reference where the link takes pages as they are, through a
    /// buffer where it encrypts them. With `more`, the kernel may wait for what follows.
    ///
    /// # Errors
    /// The errno of `splice(2)`, `read(2)` or of the link.
    pub fn send(&mut self, link: &Stream, head: &[u8], bytes: usize, more: bool) -> io::Result<()> {
        if link.is_plain() {
            link.send_all(head, true)?;
            let flags = if more { SpliceFFlags::SPLICE_F_MORE } else { SpliceFFlags::empty() };
            return self.splice_to(link.as_fd(), bytes, flags);
        }
        // Grows to the largest frame once.
        self.copy.resize(bytes.max(self.copy.len()), 0);
        self.reader.read_exact(&mut self.copy[..bytes])?;
        link.send_both(head, &self.copy[..bytes], more)
    }

    fn splice_to(&self, to: BorrowedFd<'_>, bytes: usize, flags: SpliceFFlags) -> io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            match splice(&self.reader, None, to, None, left, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => left -= moved,
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Fills `pages` from the front.
    ///
    /// # Errors
    /// The errno of `read(2)`.
    pub fn read_pages(&mut self, pages: &mut [u8]) -> io::Result<()> {
        self.reader.read_exact(pages)
    }

    /// The descriptor's number, for messages.
    #[must_use]
    pub fn number(&self) -> i32 {
        self.writer.as_raw_fd()
    }
}
