//! Headers from a stream that may be split anywhere.

use super::error::HeaderError;
use super::header::{Command, Header};
use super::layout::{HeaderLayout, MAX_HEADER_LEN};

/// Collects one header at a time from the bytes of a stream. Takes no byte behind the header, so that the page
/// data that follows an answer can be read (or spliced) straight to where it belongs.
#[derive(Clone, Debug)]
pub struct HeaderBuf {
    layout: Option<HeaderLayout>,
    buf: [u8; MAX_HEADER_LEN],
    filled: usize,
}

impl HeaderBuf {
    /// For a peer whose layout is known.
    #[must_use]
    pub const fn new(layout: HeaderLayout) -> Self {
        Self { layout: Some(layout), buf: [0; MAX_HEADER_LEN], filled: 0 }
    }

    /// For a server: takes the layout from the first header that comes, see [`HeaderLayout::detect`].
    ///
    /// A client that closes at once does not say which layout it has. Its CLOSE is decoded as the shorter one, and
    /// the end of it that a wide client sends behind must be ignored; nothing else can follow.
    #[must_use]
    pub const fn detecting() -> Self {
        Self { layout: None, buf: [0; MAX_HEADER_LEN], filled: 0 }
    }

    /// The layout of the peer; `None` as long as it is to be detected.
    #[must_use]
    pub const fn layout(&self) -> Option<HeaderLayout> {
        self.layout
    }

    /// Bytes of a header that has begun. An end of the stream is clean only if this is 0.
    #[must_use]
    pub const fn pending(&self) -> usize {
        self.filled
    }

    /// How many bytes to read at most before the next [`HeaderBuf::push`], to get none of what follows the header.
    #[must_use]
    pub const fn missing(&self) -> usize {
        self.needed() - self.filled
    }

    const fn needed(&self) -> usize {
        match self.layout {
            Some(layout) => layout.len(),
            None => HeaderLayout::DETECT_LEN,
        }
    }

    /// Takes bytes off the front of `bytes` until a header is complete. `None`: all were taken, more are needed.
    ///
    /// After an error the stream makes no sense any more; the caller closes it.
    pub fn push(&mut self, bytes: &mut &[u8]) -> Option<Result<Header, HeaderError>> {
        self.fill(bytes)?;
        let layout = match self.layout {
            Some(layout) => layout,
            None => match self.detect() {
                Ok(layout) => {
                    self.layout = Some(layout);
                    self.fill(bytes)?;
                    layout
                }
                Err(error) => {
                    self.filled = 0;
                    return Some(Err(error));
                }
            },
        };
        self.filled = 0;
        Some(Header::decode(layout, &self.buf))
    }

    /// Fills the buffer up to what is needed; `None` if there are too few bytes.
    fn fill(&mut self, bytes: &mut &[u8]) -> Option<()> {
        let (take, rest) = bytes.split_at(self.missing().min(bytes.len()));
        for (slot, byte) in self.buf.iter_mut().skip(self.filled).zip(take) {
            *slot = *byte;
        }
        self.filled += take.len();
        *bytes = rest;
        (self.missing() == 0).then_some(())
    }

    fn detect(&self) -> Result<HeaderLayout, HeaderError> {
        if let Some(layout) = HeaderLayout::detect(&self.buf) {
            return Ok(layout);
        }
        let [a, b, c, d, ..] = self.buf;
        match Command::split(u32::from_le_bytes([a, b, c, d]))?.0 {
            Command::Close | Command::ForceClose => Ok(HeaderLayout::Compact),
            command => Err(HeaderError::AmbiguousLayout(command)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::{ImageAddr, PageRun, TaskId};

    const LAYOUTS: [HeaderLayout; 2] = [HeaderLayout::Compact, HeaderLayout::Wide];

    fn get(page: u64) -> Header {
        let run = PageRun::new(ImageAddr::aligned(page * 4096).unwrap(), page % 7 + 1).unwrap();
        Header::get(TaskId(42), run)
    }

    fn bytes(headers: &[Header], layout: HeaderLayout) -> Vec<u8> {
        let mut bytes = Vec::new();
        for header in headers {
            let mut buf = [0; MAX_HEADER_LEN];
            let len = header.encode(layout, &mut buf).unwrap();
            bytes.extend(&buf[..len]);
        }
        bytes
    }

    #[test]
    fn bytes_behind_a_header_are_left() {
        let mut stream = bytes(&[get(3)], HeaderLayout::Compact);
        stream.extend(b"page data");
        let mut rest = &stream[..];
        let mut buf = HeaderBuf::new(HeaderLayout::Compact);
        assert_eq!(buf.push(&mut rest), Some(Ok(get(3))));
        assert_eq!(rest, b"page data");
        assert_eq!((buf.pending(), buf.missing()), (0, 24));
    }

    #[test]
    fn a_cut_header_is_pending() {
        let stream = bytes(&[get(3)], HeaderLayout::Wide);
        let mut buf = HeaderBuf::new(HeaderLayout::Wide);
        assert_eq!(buf.push(&mut &stream[..31]), None);
        assert_eq!((buf.pending(), buf.missing()), (31, 1));
        assert_eq!(buf.push(&mut &b""[..]), None);
    }

    #[test]
    fn layout_is_detected_from_the_first_get() {
        for layout in LAYOUTS {
            let stream = bytes(&[get(3), Header::close(Command::Close)], layout);
            let (mut rest, mut buf) = (&stream[..], HeaderBuf::detecting());
            assert_eq!(buf.push(&mut rest), Some(Ok(get(3))));
            assert_eq!(buf.layout(), Some(layout));
            assert_eq!(buf.push(&mut rest), Some(Ok(Header::close(Command::Close))));
            assert!(rest.is_empty());
        }
    }

    #[test]
    fn a_first_close_is_a_close_in_both_layouts() {
        for layout in LAYOUTS {
            let stream = bytes(&[Header::close(Command::ForceClose)], layout);
            let mut rest = &stream[..];
            let close = HeaderBuf::detecting().push(&mut rest);
            assert_eq!(close, Some(Ok(Header::close(Command::ForceClose))));
            assert!(rest.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_first_open_is_ambiguous() {
        let stream =
            bytes(&[Header { command: Command::Open2, ..Header::close(Command::Close) }], HeaderLayout::Wide);
        let error = HeaderBuf::detecting().push(&mut &stream[..]).unwrap().unwrap_err();
        assert_eq!(error, HeaderError::AmbiguousLayout(Command::Open2));
    }

    #[test]
    fn garbage_is_refused_while_detecting() {
        let error = HeaderBuf::detecting().push(&mut &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..]).unwrap();
        assert!(matches!(error, Err(HeaderError::UnknownCommand(_))));
    }

    proptest! {
        #[test]
        fn a_stream_split_anywhere_gives_the_same_headers(
            pages in proptest::collection::vec(1_u64..1 << 40, 1..8),
            cuts in proptest::collection::vec(1_usize..40, 0..40),
            wide in any::<bool>(),
            detect in any::<bool>(),
        ) {
            let layout = if wide { HeaderLayout::Wide } else { HeaderLayout::Compact };
            let headers: Vec<Header> = pages.into_iter().map(get).collect();
            let stream = bytes(&headers, layout);
            let mut buf = if detect { HeaderBuf::detecting() } else { HeaderBuf::new(layout) };
            let (mut rest, mut decoded) = (&stream[..], Vec::new());
            let mut cuts = cuts.into_iter();
            while !rest.is_empty() {
                let (mut piece, tail) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                rest = tail;
                while !piece.is_empty() {
                    if let Some(header) = buf.push(&mut piece) {
                        decoded.push(header.unwrap());
                    }
                }
            }
            prop_assert_eq!(decoded, headers);
            prop_assert_eq!(buf.pending(), 0);
        }
    }
}
