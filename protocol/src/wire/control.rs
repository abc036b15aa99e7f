//! The messages of the control connection.
//!
//! Layouts are the fields in the order of the structs, little-endian; `string` and `blob` are a u32 length
//! and the bytes, `list` a u32 count and the elements. docs/protocol.md has them byte by byte.

use super::codec::{CodecError, Decoder, Encoder};
use super::frame::Kind;
use super::limits;
use super::settled_map::MapPiece;
use crate::units::TaskId;

/// A message on the control connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Control {
    /// Source: this is what would move.
    Offer(Offer),
    /// Destination: what stands against it; nothing means accepted.
    Verdict(Vec<Problem>),
    /// Source: a piece of an image file.
    Image(ImageChunk),
    /// Source: that was the last image.
    Dumped(Dumped),
    /// Source: which lazy pages the destination has already.
    Clean(Clean),
    /// Destination: restored, held before the first instruction.
    Prepared,
    /// Source: run. From here on the source never runs again.
    Commit,
    /// Destination: the tasks run.
    Running,
    /// Destination: every page is settled and acknowledged.
    Complete(Summary),
    /// Source: everything was freed.
    Released,
    /// Either, before `Commit`: roll back, for this reason.
    Abort(String),
    /// Destination: it is clean again.
    RolledBack,
    /// Destination, on new connections: a piece of the map of what is settled.
    SettledMap(MapPiece),
    /// Destination: that was the map; what it had said before is said again.
    Resumed,
}

/// What the source wants to move, for the destination's preflight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Release of the source's tools.
    pub release: String,
    /// `criu --version` of the source.
    pub criu_version: String,
    /// Machine architecture, as `uname -m`.
    pub machine: String,
    /// CPU feature flags, as in /proc/cpuinfo, blank-separated.
    pub cpu_flags: String,
    /// Image pid of the root task.
    pub root: TaskId,
    /// Name of the root task, for logs.
    pub name: String,
    /// Every pid and tid the restored tree needs.
    pub pids: Vec<u32>,
    /// Bytes of memory the tree uses now.
    pub memory_bytes: u64,
    /// Most pages that pre-copy may have the destination keep at once; none without pre-copy.
    pub precopy_pages: u64,
    /// Files that must be there with the same content.
    pub files: Vec<FileCheck>,
    /// Options of the dump that the restore needs as well.
    pub criu_options: Vec<String>,
}

/// A file the restored tree opens by path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileCheck {
    /// Absolute path.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// ELF build-id, empty if it has none: then the size decides.
    pub build_id: Vec<u8>,
}

/// Something that stands against a move, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// What the operator can do.
    pub remedy: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.remedy)
    }
}

/// A piece of an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageChunk {
    /// File name inside the image directory; no slash.
    pub name: String,
    /// Size of the whole file.
    pub size: u64,
    /// Where this piece belongs.
    pub offset: u64,
    /// The piece, at most [`limits::IMAGE_CHUNK_MAX`] bytes.
    pub data: Vec<u8>,
}

/// All images were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dumped {
    /// Number of image files.
    pub images: u32,
    /// Microseconds the tasks have been frozen when this was sent.
    pub frozen_us: u64,
    /// Lazy pages in the images, as the source counts them.
    pub lazy_pages: u64,
    /// How many of them pre-copy brought and nobody has written since. With any, `Clean` follows for all lazy pages.
    pub clean_pages: u64,
}

/// Which pages of a piece of the lazy map pre-copy brought and nobody has written since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clean {
    /// Number of the first page of the piece; a multiple of 8.
    pub first: u64,
    /// A bit for each page, the lowest of a byte first; at most [`limits::CLEAN_PIECE_MAX`] bytes. Pieces follow one
    /// another, and the last one ends with the byte of the last page.
    pub bits: Vec<u8>,
}

/// Where the lazy pages came from: `lazy = demand + push + precopied + zero + gone`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages the dump left behind.
    pub lazy: u64,
    /// First installed from the answer to a fault.
    pub demand: u64,
    /// First installed from the push.
    pub push: u64,
    /// First installed from what pre-copy had brought.
    pub precopied: u64,
    /// Installed as zero pages.
    pub zero: u64,
    /// Removed or unmapped by the task, or the task ended, before they arrived.
    pub gone: u64,
    /// Copies that found the page present (not part of the sum).
    pub redundant: u64,
}

/// Latency of faults that needed the source, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencySummary {
    /// Number of faults.
    pub count: u64,
    /// Mean.
    pub mean_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p99_9_ns: u64,
    /// Largest.
    pub max_ns: u64,
}

/// The destination's account of the move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Page origins.
    pub pages: PageCounts,
    /// Fault latency.
    pub latency: LatencySummary,
    /// Bytes received on the fault lane, headers included.
    pub fault_lane_bytes: u64,
    /// Bytes received on the push lanes, headers included.
    pub push_lane_bytes: u64,
    /// Resume to the last page settled, in microseconds.
    pub brownout_us: u64,
}

impl Control {
    /// Kind and body of the frame.
    #[must_use]
    pub fn encode(&self) -> (Kind, Vec<u8>) {
        let mut body = Encoder::default();
        let kind = match self {
            Self::Offer(offer) => {
                offer.encode(&mut body);
                Kind::Offer
            }
            Self::Verdict(problems) => {
                body.list(problems, |body, problem| {
                    body.string(&problem.what).string(&problem.remedy);
                });
                Kind::Verdict
            }
            Self::Image(chunk) => {
                body.string(&chunk.name).u64(chunk.size).u64(chunk.offset).blob(&chunk.data);
                Kind::Image
            }
            Self::Dumped(dumped) => {
                body.u32(dumped.images).u64(dumped.frozen_us).u64(dumped.lazy_pages).u64(dumped.clean_pages);
                Kind::Dumped
            }
            Self::Clean(clean) => {
                body.u64(clean.first).blob(&clean.bits);
                Kind::Clean
            }
            Self::Prepared => Kind::Prepared,
            Self::Commit => Kind::Commit,
            Self::Running => Kind::Running,
            Self::Complete(summary) => {
                for value in summary.fields() {
                    body.u64(value);
                }
                Kind::Complete
            }
            Self::Released => Kind::Released,
            Self::Abort(reason) => {
                body.string(reason);
                Kind::Abort
            }
            Self::RolledBack => Kind::RolledBack,
            Self::SettledMap(piece) => {
                piece.encode(&mut body);
                Kind::SettledMap
            }
            Self::Resumed => Kind::Resumed,
        };
        (kind, body.finish())
    }

    /// Reads the body of a frame of `kind`.
    ///
    /// # Errors
    /// [`CodecError`] for a kind that is no control message, a malformed body, or bytes left over.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, CodecError> {
        let mut fields = Decoder::new(body);
        let message = match kind {
            Kind::Offer => Self::Offer(Offer::decode(&mut fields)?),
            Kind::Verdict => Self::Verdict(fields.list("problems", |fields| {
                Ok(Problem { what: fields.string("problem")?, remedy: fields.string("remedy")? })
            })?),
            Kind::Image => Self::Image(ImageChunk::decode(&mut fields)?),
            Kind::Dumped => Self::Dumped(Dumped {
                images: fields.u32("image count")?,
                frozen_us: fields.u64("frozen time")?,
                lazy_pages: fields.u64("lazy pages")?,
                clean_pages: fields.u64("clean pages")?,
            }),
            Kind::Clean => Self::Clean(Clean::decode(&mut fields)?),
            Kind::Prepared => Self::Prepared,
            Kind::Commit => Self::Commit,
            Kind::Running => Self::Running,
            Kind::Complete => Self::Complete(Summary::decode(&mut fields)?),
            Kind::Released => Self::Released,
            Kind::Abort => Self::Abort(fields.string("reason")?),
            Kind::RolledBack => Self::RolledBack,
            Kind::SettledMap => Self::SettledMap(MapPiece::decode(&mut fields)?),
            Kind::Resumed => Self::Resumed,
            other => return Err(CodecError::Meaning { field: "control kind", value: other as u64 }),
        };
        fields.end()?;
        Ok(message)
    }
}

impl Offer {
    fn encode(&self, body: &mut Encoder) {
        body.string(&self.release)
            .string(&self.criu_version)
            .string(&self.machine)
            .string(&self.cpu_flags)
            .u32(self.root.0)
            .string(&self.name)
            .list(&self.pids, |body, pid| {
                body.u32(*pid);
            })
            .u64(self.memory_bytes)
            .u64(self.precopy_pages)
            .list(&self.files, |body, file| {
                body.string(&file.path).u64(file.size).blob(&file.build_id);
            })
            .list(&self.criu_options, |body, option| {
                body.string(option);
            });
    }

    fn decode(fields: &mut Decoder<'_>) -> Result<Self, CodecError> {
        Ok(Self {
            release: fields.string("release")?,
            criu_version: fields.string("criu version")?,
            machine: fields.string("machine")?,
            cpu_flags: fields.string("cpu flags")?,
            root: TaskId(fields.u32("root")?),
            name: fields.string("name")?,
            pids: fields.list("pids", |fields| fields.u32("pid"))?,
            memory_bytes: fields.u64("memory")?,
            precopy_pages: fields.u64("pre-copy pages")?,
            files: fields.list("files", |fields| {
                Ok(FileCheck {
                    path: fields.string("path")?,
                    size: fields.u64("file size")?,
                    build_id: fields.blob(limits::IMAGE_NAME_MAX, "build id")?.to_vec(),
                })
            })?,
            criu_options: fields.list("criu options", |fields| fields.string("criu option"))?,
        })
    }
}

impl ImageChunk {
    fn decode(fields: &mut Decoder<'_>) -> Result<Self, CodecError> {
        let name = fields.string("image name")?;
        let size = fields.u64("image size")?;
        let offset = fields.u64("image offset")?;
        let data = fields.blob(limits::IMAGE_CHUNK_MAX, "image data")?.to_vec();
        let plain = !name.is_empty()
            && name.len() <= limits::IMAGE_NAME_MAX
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !plain {
            return Err(CodecError::Meaning { field: "image name of length", value: name.len() as u64 });
        }
        let end = offset.checked_add(data.len() as u64);
        if size > limits::IMAGE_SIZE_MAX || end.is_none_or(|end| end > size) {
            return Err(CodecError::Bound { field: "image size", value: size, max: limits::IMAGE_SIZE_MAX });
        }
        Ok(Self { name, size, offset, data })
    }
}

impl Clean {
    fn decode(fields: &mut Decoder<'_>) -> Result<Self, CodecError> {
        let first = fields.u64("first clean page")?;
        if first % 8 != 0 {
            return Err(CodecError::Meaning { field: "first clean page", value: first });
        }
        Ok(Self { first, bits: fields.blob(limits::CLEAN_PIECE_MAX, "clean pages")?.to_vec() })
    }
}

impl Summary {
    const fn fields(&self) -> [u64; 17] {
        let (p, l) = (&self.pages, &self.latency);
        [
            p.lazy,
            p.demand,
            p.push,
            p.precopied,
            p.zero,
            p.gone,
            p.redundant,
            l.count,
            l.mean_ns,
            l.p50_ns,
            l.p90_ns,
            l.p99_ns,
            l.p99_9_ns,
            l.max_ns,
            self.fault_lane_bytes,
            self.push_lane_bytes,
            self.brownout_us,
        ]
    }

    fn decode(fields: &mut Decoder<'_>) -> Result<Self, CodecError> {
        let mut next = || fields.u64("summary");
        Ok(Self {
            pages: PageCounts {
                lazy: next()?,
                demand: next()?,
                push: next()?,
                precopied: next()?,
                zero: next()?,
                gone: next()?,
                redundant: next()?,
            },
            latency: LatencySummary {
                count: next()?,
                mean_ns: next()?,
                p50_ns: next()?,
                p90_ns: next()?,
                p99_ns: next()?,
                p99_9_ns: next()?,
                max_ns: next()?,
            },
            fault_lane_bytes: next()?,
            push_lane_bytes: next()?,
            brownout_us: next()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Control> {
        let offer = Offer {
            release: "0.1.0".into(),
            criu_version: "4.2".into(),
            machine: "x86_64".into(),
            cpu_flags: "fpu sse2".into(),
            root: TaskId(12),
            name: "redis".into(),
            pids: vec![12, 13],
            memory_bytes: 1 << 30,
            precopy_pages: 1 << 18,
            files: vec![FileCheck { path: "/usr/bin/redis".into(), size: 9, build_id: vec![1, 2] }],
            criu_options: vec!["--tcp-established".into()],
        };
        let chunk = ImageChunk { name: "pages-1.img".into(), size: 9, offset: 4, data: vec![1, 2, 3] };
        let mut summary = Summary::default();
        summary.pages.lazy = 7;
        summary.latency.max_ns = 8;
        summary.brownout_us = 9;
        vec![
            Control::Offer(offer),
            Control::Verdict(vec![Problem { what: "a".into(), remedy: "b".into() }]),
            Control::Image(chunk),
            Control::Dumped(Dumped { images: 3, frozen_us: 4, lazy_pages: 5, clean_pages: 2 }),
            Control::Clean(Clean { first: 8, bits: vec![1, 0x80] }),
            Control::Prepared,
            Control::Commit,
            Control::Running,
            Control::Complete(summary),
            Control::Released,
            Control::Abort("hook failed".into()),
            Control::RolledBack,
            Control::SettledMap(MapPiece { first: 64, pages: 12, bits: vec![0xff, 0x0f] }),
            Control::Resumed,
        ]
    }

    #[test]
    fn every_message_round_trips() {
        for message in samples() {
            let (kind, body) = message.encode();
            assert_eq!(Control::decode(kind, &body).unwrap(), message);
        }
    }

    #[test]
    fn every_truncation_and_every_rest_is_refused() {
        for message in samples() {
            let (kind, body) = message.encode();
            for len in 0..body.len() {
                assert!(Control::decode(kind, &body[..len]).is_err(), "{message:?} cut to {len}");
            }
            assert!(Control::decode(kind, &[&body[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn image_names_stay_in_their_directory() {
        for name in ["../x.img", "/etc/passwd", "a/b", "", ".", "..", ".hidden", "a\0b"] {
            let chunk = ImageChunk { name: name.into(), size: 0, offset: 0, data: vec![] };
            let (kind, body) = Control::Image(chunk).encode();
            assert!(Control::decode(kind, &body).is_err(), "{name:?}");
        }
    }

    #[test]
    fn image_pieces_stay_in_their_file() {
        for (size, offset) in [(2, 0), (3, 1), (u64::MAX, 0), (9, u64::MAX)] {
            let chunk = ImageChunk { name: "a.img".into(), size, offset, data: vec![0; 3] };
            let (kind, body) = Control::Image(chunk).encode();
            assert!(Control::decode(kind, &body).is_err(), "{size} {offset}");
        }
    }

    #[test]
    fn clean_pages_begin_at_a_byte() {
        let (kind, body) = Control::Clean(Clean { first: 4, bits: vec![1] }).encode();
        assert!(Control::decode(kind, &body).is_err());
    }

    #[test]
    fn lane_kinds_are_no_control_messages() {
        assert!(Control::decode(Kind::Pages, &[]).is_err());
    }
}
