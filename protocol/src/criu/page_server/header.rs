//! One header: commands, encoding, decoding, and what makes a reply an answer.

use super::error::HeaderError;
use super::layout::{HeaderLayout, MAX_HEADER_LEN};
use crate::criu::images::PageFlags;
use crate::criu::limits::MAX_PID;
use crate::units::{ImageAddr, PageRun, TaskId};

const COMMAND_BITS: u32 = 16;
const COMMAND_MASK: u32 = (1 << COMMAND_BITS) - 1;

/// Commands of the protocol, by CRIU's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Pages follow (before there were page flags).
    Add = 1,
    /// Pages are in the parent images (before there were page flags).
    Hole = 2,
    /// Select the image to write.
    Open = 3,
    /// Select the image to write; answered by a byte that says whether it has a parent.
    Open2 = 4,
    /// Ask whether an image has a parent; answered by an `i32`.
    Parent = 5,
    /// Pages with page flags; data follows if they are present. Also the answer to [`Command::Get`].
    AddF = 6,
    /// Ask for pages.
    Get = 7,
    /// End the session; answered by an `i32` status.
    Close = 0x1023,
    /// End the session from a client that was given its socket; answered by an `i32` status.
    ForceClose = 0x1024,
}

impl Command {
    /// Splits the first word of a header into command and page flags.
    pub(super) const fn split(word: u32) -> Result<(Self, PageFlags), HeaderError> {
        let command = match word & COMMAND_MASK {
            1 => Self::Add,
            2 => Self::Hole,
            3 => Self::Open,
            4 => Self::Open2,
            5 => Self::Parent,
            6 => Self::AddF,
            7 => Self::Get,
            0x1023 => Self::Close,
            0x1024 => Self::ForceClose,
            _ => return Err(HeaderError::UnknownCommand(word)),
        };
        let flags = word >> COMMAND_BITS;
        if flags != 0 && !matches!(command, Self::AddF) {
            return Err(HeaderError::UnknownCommand(word));
        }
        match PageFlags::from_bits(flags) {
            Some(flags) => Ok((command, flags)),
            None => Err(HeaderError::UnknownFlags(flags)),
        }
    }
}

/// A page-server header, the same in both layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it asks or announces.
    pub command: Command,
    /// Page flags, of [`Command::AddF`] only.
    pub flags: PageFlags,
    /// Number of pages.
    pub pages: u64,
    /// Image address of the first page, unchecked.
    pub addr: u64,
    /// The task: its pid as it is in a GET and its answer. Other commands encode an image here.
    pub dst: u64,
}

impl Header {
    /// Asks for `run` of `task`.
    #[must_use]
    pub fn get(task: TaskId, run: PageRun) -> Self {
        Self { command: Command::Get, flags: PageFlags::default(), ..Self::pages(task, run) }
    }

    /// Announces the data of `run` of `task`: the answer to a GET for `run` or a longer run with the same start.
    #[must_use]
    pub fn reply(task: TaskId, run: PageRun) -> Self {
        Self::pages(task, run)
    }

    /// Ends the session: [`Command::Close`], or [`Command::ForceClose`] as CRIU does on a socket it was given.
    #[must_use]
    pub fn close(command: Command) -> Self {
        Self { command, flags: PageFlags::default(), pages: 0, addr: 0, dst: 0 }
    }

    fn pages(task: TaskId, run: PageRun) -> Self {
        Self {
            command: Command::AddF,
            flags: PageFlags::PRESENT,
            pages: run.pages,
            addr: run.start.get(),
            dst: u64::from(task.0),
        }
    }

    /// Writes the header to the front of `buf` and gives its length.
    ///
    /// # Errors
    /// [`HeaderError::TooManyPages`] if the compact layout cannot hold the page count.
    pub fn encode(&self, layout: HeaderLayout, buf: &mut [u8; MAX_HEADER_LEN]) -> Result<usize, HeaderError> {
        let word = (self.flags.bits() << COMMAND_BITS) | u32::from(self.command as u16);
        let mut writer = Writer { buf, at: 0 };
        writer.put(word.to_le_bytes());
        match layout {
            HeaderLayout::Compact => {
                let pages = u32::try_from(self.pages).map_err(|_| HeaderError::TooManyPages(self.pages))?;
                writer.put(pages.to_le_bytes());
            }
            HeaderLayout::Wide => {
                writer.put([0; 4]);
                writer.put(self.pages.to_le_bytes());
            }
        }
        writer.put(self.addr.to_le_bytes());
        writer.put(self.dst.to_le_bytes());
        Ok(writer.at)
    }

    /// Reads a header from the front of `bytes`; what follows it is not looked at.
    ///
    /// # Errors
    /// [`HeaderError::Short`], [`HeaderError::UnknownCommand`] or [`HeaderError::UnknownFlags`].
    pub fn decode(layout: HeaderLayout, bytes: &[u8]) -> Result<Self, HeaderError> {
        let short = HeaderError::Short { needed: layout.len(), found: bytes.len() };
        let mut reader = Reader { rest: bytes };
        let mut fields = || {
            let first = reader.u32()?;
            let second = reader.u32()?;
            let pages = match layout {
                HeaderLayout::Compact => u64::from(second),
                // The second word is padding: CRIU 4.2 sends whatever its compiler left there.
                HeaderLayout::Wide => reader.u64()?,
            };
            Some((first, pages, reader.u64()?, reader.u64()?))
        };
        let (first, pages, addr, dst) = fields().ok_or(short)?;
        let (command, flags) = Command::split(first)?;
        Ok(Self { command, flags, pages, addr, dst })
    }

    /// For a server: the pages a GET asks for. The run may reach beyond what the task has; a shorter answer is
    /// allowed, an empty one is not.
    ///
    /// # Errors
    /// [`HeaderError::NotGet`], [`HeaderError::NotAPid`] or [`HeaderError::NotARun`].
    pub fn requested(&self) -> Result<(TaskId, PageRun), HeaderError> {
        if self.command != Command::Get {
            return Err(HeaderError::NotGet(self.command));
        }
        Ok((self.task()?, self.run()?))
    }

    /// For a client: the pages that follow this header, if it answers `request`.
    ///
    /// # Errors
    /// [`HeaderError::NotPages`], [`HeaderError::OtherRequest`] or [`HeaderError::PageCount`].
    pub fn check_reply_to(&self, request: &Self) -> Result<PageRun, HeaderError> {
        if self.command != Command::AddF || !self.flags.present {
            return Err(HeaderError::NotPages { command: self.command, flags: self.flags.bits() });
        }
        let Self { addr, dst, .. } = *self;
        if addr != request.addr || dst != request.dst {
            return Err(HeaderError::OtherRequest {
                addr,
                dst,
                want_addr: request.addr,
                want_dst: request.dst,
            });
        }
        if self.pages == 0 || self.pages > request.pages {
            return Err(HeaderError::PageCount { addr, found: self.pages, wanted: request.pages });
        }
        self.run()
    }

    fn task(&self) -> Result<TaskId, HeaderError> {
        match u32::try_from(self.dst) {
            Ok(pid) if pid != 0 && pid <= MAX_PID => Ok(TaskId(pid)),
            _ => Err(HeaderError::NotAPid(self.dst)),
        }
    }

    fn run(&self) -> Result<PageRun, HeaderError> {
        ImageAddr::aligned(self.addr)
            .and_then(|start| PageRun::new(start, self.pages))
            .ok_or(HeaderError::NotARun { addr: self.addr, pages: self.pages })
    }
}

struct Writer<'a> {
    buf: &'a mut [u8; MAX_HEADER_LEN],
    at: usize,
}

impl Writer<'_> {
    fn put<const N: usize>(&mut self, bytes: [u8; N]) {
        for (slot, byte) in self.buf.iter_mut().skip(self.at).zip(bytes) {
            *slot = byte;
        }
        self.at += N;
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*bytes)
    }
}

#[cfg(test)]
mod tests;
