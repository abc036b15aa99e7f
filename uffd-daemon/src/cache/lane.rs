//! The push lane before the freeze, destination's side: pages in, the ends of rounds out.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::link::Stream;
use protocol::units::pages_to_bytes;
use protocol::wire::codec::CodecError;
use protocol::wire::frame::{HEADER_LEN, Header, Kind, RUN_HEADER_LEN, RunFrame};
use protocol::wire::lz4::decompress;
use protocol::wire::precopy::{Areas, Round};

use super::{CacheError, PageCache};

/// Why pre-copy ended before its last round did.
#[derive(Debug, thiserror::Error)]
pub enum PrecopyError {
    /// The source closed the lane.
    #[error("the source closed the push lane in a round of pre-copy")]
    Closed,
    /// The lane broke.
    #[error("pre-copy: {0}")]
    Io(io::Error),
    /// A malformed frame.
    #[error("the source sent a malformed frame in pre-copy: {0}")]
    Malformed(#[from] CodecError),
    /// Pages that are not taken.
    #[error(transparent)]
    Refused(CacheError),
}

impl From<io::Error> for PrecopyError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

impl From<CacheError> for PrecopyError {
    fn from(error: CacheError) -> Self {
        match error {
            CacheError::Io(error) => error.into(),
            refused => Self::Refused(refused),
        }
    }
}

/// How far pre-copy is, for whoever watches.
#[derive(Debug, Default)]
pub struct PrecopyProgress {
    /// Rounds that are over.
    pub rounds: AtomicU64,
    /// Pages that are kept.
    pub kept: AtomicU64,
    /// Bytes received, headers included.
    pub bytes: AtomicU64,
}

/// A push lane before the freeze.
#[derive(Debug)]
pub struct PrecopyLane {
    stream: Stream,
    cache: PageCache,
    /// A compressed frame and its pages, once one has come: a frame each.
    block: Vec<u8>,
    pages: Vec<u8>,
    progress: Arc<PrecopyProgress>,
}

impl PrecopyLane {
    /// Over a stream whose hello is done; keeps at most `most` pages.
    #[must_use]
    pub const fn new(stream: Stream, most: u64, progress: Arc<PrecopyProgress>) -> Self {
        Self { stream, cache: PageCache::new(most), block: Vec::new(), pages: Vec::new(), progress }
    }

    /// Keeps what comes until the last round is over; that is not answered yet.
    ///
    /// # Errors
    /// [`PrecopyError`].
    pub fn run(mut self) -> Result<(Stream, PageCache, Round), PrecopyError> {
        loop {
            let Some(round) = self.frame()? else { continue };
            self.progress.rounds.store(u64::from(round.number), Ordering::Relaxed);
            if round.last {
                return Ok((self.stream, self.cache, round));
            }
            self.stream.send_all(&round.encode(), false)?;
        }
    }

    /// Takes one frame; the end of a round, if it is one.
    fn frame(&mut self) -> Result<Option<Round>, PrecopyError> {
        let mut whole = [0; RUN_HEADER_LEN];
        let (head, run) = whole.split_at_mut(HEADER_LEN);
        self.stream.receive_all(head)?;
        let header = Header::decode(head.first_chunk().unwrap_or(&[0; HEADER_LEN]))?;
        // A round whose end was announced is not worth less for being counted a moment too early.
        self.progress.bytes.fetch_add((HEADER_LEN + header.body_len) as u64, Ordering::Relaxed);
        let mut ended = None;
        match header.kind {
            Kind::Precopy | Kind::PrecopyLz4 | Kind::PrecopyZero => {
                self.stream.receive_all(run)?;
                let frame = RunFrame::decode(&whole)?;
                match frame.kind {
                    Kind::Precopy => {
                        self.cache.fill(frame.what, frame.id, |part| self.stream.receive_all(part))?;
                    }
                    Kind::PrecopyLz4 => self.unpack(&frame)?,
                    _ => self.cache.zero(frame.what, frame.id)?,
                }
            }
            Kind::Areas => self.cache.areas(Areas::decode(&self.body(header.body_len)?)?)?,
            Kind::Round => {
                let round = Round::decode(&self.body(header.body_len)?)?;
                self.cache.end_round(round)?;
                ended = Some(round);
            }
            other => {
                let field = "frame kind on this lane before the freeze";
                return Err(CodecError::Meaning { field, value: other as u64 }.into());
            }
        }
        self.progress.kept.store(self.cache.pages(), Ordering::Relaxed);
        Ok(ended)
    }

    /// Keeps the pages of a compressed frame: as many as it names, or none.
    fn unpack(&mut self, frame: &RunFrame) -> Result<(), PrecopyError> {
        self.block.resize(frame.data_len, 0);
        self.stream.receive_all(&mut self.block)?;
        // Both are within the bound of a frame, which was checked.
        self.pages.resize(usize::try_from(pages_to_bytes(frame.what.run.pages)).unwrap_or(0), 0);
        decompress(&self.block, &mut self.pages)?;
        let mut rest = &self.pages[..];
        Ok(self.cache.fill(frame.what, frame.id, |part| rest.read_exact(part))?)
    }

    /// A body within the bound of its kind.
    fn body(&self, len: usize) -> io::Result<Vec<u8>> {
        let mut body = vec![0; len];
        self.stream.receive_all(&mut body)?;
        Ok(body)
    }
}
