//! `mm-PID.img`: the address space of a task and its VMAs.

use super::error::DecodeError;
use super::framing::{ImageKind, Records};
use super::{aligned, fields, messages, parse, required};
use crate::criu::limits::{MAX_VMAS, MIN_VMA_BYTES};
use crate::units::{ImageAddr, PageRun};

const MM: &str = "mm_entry";
const VMA: &str = "vma_entry";

// mmap(2) flags, the same on x86-64 and aarch64.
const MAP_PRIVATE: u32 = 0x02;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_LOCKED: u32 = 0x2000;
const MAP_HUGETLB: u32 = 0x4_0000;

/// Bits of [`Vma::status`] that this project looks at, by CRIU's numbers.
pub mod vma_status {
    /// An ordinary VMA, restored by CRIU.
    pub const REGULAR: u32 = 1 << 0;
    /// The main thread's stack.
    pub const STACK: u32 = 1 << 1;
    /// The vsyscall page.
    pub const VSYSCALL: u32 = 1 << 2;
    /// The vDSO.
    pub const VDSO: u32 = 1 << 3;
    /// The heap (brk).
    pub const HEAP: u32 = 1 << 5;
    /// Private anonymous memory.
    pub const ANON_PRIVATE: u32 = 1 << 9;
    /// Data of the vDSO.
    pub const VVAR: u32 = 1 << 12;
    /// A guard region.
    pub const GUARD: u32 = 1 << 16;
}

/// `vma_entry`: one mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: ImageAddr,
    /// First address behind; above `start`.
    pub end: ImageAddr,
    /// Offset in the mapped file, in bytes.
    pub pgoff: u64,
    /// Id of the mapped file or shared memory; 0 for private anonymous memory.
    pub shmid: u64,
    /// `PROT_*` bits.
    pub prot: u32,
    /// `MAP_*` bits.
    pub flags: u32,
    /// What CRIU takes the VMA for: bits of [`vma_status`] and others.
    pub status: u32,
    /// Bitmap of `MADV_*` advice in force.
    pub madv: u64,
}

impl Vma {
    /// The pages of the VMA.
    #[must_use]
    pub const fn run(&self) -> PageRun {
        PageRun { start: self.start, pages: self.end.pages_since(self.start) }
    }

    /// Whether CRIU leaves pages of this VMA on the source and registers it with userfaultfd at restore: private
    /// anonymous memory that is neither locked, nor huge pages, nor the kernel's.
    /// AIO rings and shadow stacks pass too, though their pages are never lazy.
    #[must_use]
    pub const fn can_be_lazy(&self) -> bool {
        const NEEDED: u32 = MAP_PRIVATE | MAP_ANONYMOUS;
        const FORBIDDEN: u32 = MAP_LOCKED | MAP_HUGETLB;
        const KERNELS: u32 = vma_status::VSYSCALL | vma_status::VDSO | vma_status::VVAR;
        self.flags & (NEEDED | FORBIDDEN) == NEEDED && self.status & KERNELS == 0
    }
}

/// `mm_entry`, as far as it matters to a move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MmEntry {
    /// VMAs in ascending order, not overlapping.
    pub vmas: Vec<Vma>,
    /// Where the main stack began, not aligned.
    pub start_stack: u64,
    /// Where the heap begins, not aligned.
    pub start_brk: u64,
    /// Where the heap ends, not aligned.
    pub brk: u64,
    /// Id of the executable in `files.img`.
    pub exe_file_id: u32,
}

/// Decodes `mm-PID.img`.
///
/// # Errors
/// [`DecodeError`].
pub fn read_mm(image: &[u8]) -> Result<MmEntry, DecodeError> {
    let record = Records::only(ImageKind::Mm, image)?;
    // Counted first: two bytes are enough for a VMA that takes a hundred once it is decoded.
    let mut count = 0;
    fields::visit(MM, record, |number| count += usize::from(number == messages::MM_VMAS))?;
    if count > MAX_VMAS {
        return Err(DecodeError::TooMany { message: MM, what: "VMAs", limit: MAX_VMAS });
    }
    if record.len() < count * MIN_VMA_BYTES {
        return Err(DecodeError::Malformed { message: VMA });
    }
    let raw: messages::MmEntry = parse(MM, record)?;
    Ok(MmEntry {
        vmas: vmas(&raw.vmas)?,
        start_stack: required(raw.mm_start_stack, MM, "mm_start_stack")?,
        start_brk: required(raw.mm_start_brk, MM, "mm_start_brk")?,
        brk: required(raw.mm_brk, MM, "mm_brk")?,
        exe_file_id: required(raw.exe_file_id, MM, "exe_file_id")?,
    })
}

fn vmas(raw: &[messages::VmaEntry]) -> Result<Vec<Vma>, DecodeError> {
    let mut vmas: Vec<Vma> = Vec::with_capacity(raw.len());
    for raw in raw {
        let vma = vma(raw)?;
        if let Some(previous) = vmas.last().filter(|previous| vma.start < previous.end) {
            let (start, previous_end) = (vma.start.get(), previous.end.get());
            return Err(DecodeError::Unsorted { message: VMA, start, previous_end });
        }
        vmas.push(vma);
    }
    Ok(vmas)
}

fn vma(raw: &messages::VmaEntry) -> Result<Vma, DecodeError> {
    let start = aligned(VMA, required(raw.start, VMA, "start")?)?;
    let end = aligned(VMA, required(raw.end, VMA, "end")?)?;
    if end <= start {
        return Err(DecodeError::EmptyVma { start: start.get(), end: end.get() });
    }
    Ok(Vma {
        start,
        end,
        pgoff: required(raw.pgoff, VMA, "pgoff")?,
        shmid: required(raw.shmid, VMA, "shmid")?,
        prot: required(raw.prot, VMA, "prot")?,
        flags: required(raw.flags, VMA, "flags")?,
        status: required(raw.status, VMA, "status")?,
        madv: raw.madv.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::build::{anonymous_vma, frame, write_mm};
    use super::*;

    fn read(vmas: &[messages::VmaEntry]) -> Result<MmEntry, DecodeError> {
        let raw = messages::MmEntry {
            mm_start_stack: Some(1),
            mm_start_brk: Some(2),
            mm_brk: Some(3),
            exe_file_id: Some(4),
            vmas: vmas.to_vec(),
            ..Default::default()
        };
        read_mm(&frame(ImageKind::Mm, [raw.encode_to_vec()]))
    }

    fn raw(start: u64, end: u64) -> messages::VmaEntry {
        messages::VmaEntry {
            start: Some(start),
            end: Some(end),
            pgoff: Some(0),
            shmid: Some(0),
            prot: Some(3),
            flags: Some(0x22),
            status: Some(0x201),
            fd: Some(-1),
            madv: None,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut file = anonymous_vma(0x9000, 0xa000);
        (file.pgoff, file.shmid, file.flags, file.status, file.madv) = (0x2000, 7, 2, 0x41, 1 << 14);
        let vmas = vec![anonymous_vma(0x1000, 0x3000), anonymous_vma(0x3000, 0x4000), file];
        let mm = MmEntry { vmas, start_stack: 0x7ffe_1234, start_brk: 0x5001, brk: 0x6002, exe_file_id: 9 };
        assert_eq!(read_mm(&write_mm(&mm)).unwrap(), mm);
        assert_eq!(mm.vmas[0].run().pages, 2);
    }

    #[test]
    fn only_private_anonymous_memory_can_be_lazy() {
        let plain = anonymous_vma(0x1000, 0x2000);
        assert!(plain.can_be_lazy());
        for flags in [0x02, 0x20, 0x21, 0x2022, 0x4_0022] {
            assert!(!Vma { flags, ..plain }.can_be_lazy(), "flags {flags:#x}");
        }
        for status in [vma_status::VDSO, vma_status::VVAR, vma_status::VSYSCALL] {
            assert!(!Vma { status: plain.status | status, ..plain }.can_be_lazy(), "status {status:#x}");
        }
        assert!(Vma { flags: 0x122, status: plain.status | vma_status::STACK, ..plain }.can_be_lazy());
    }

    #[test]
    fn unaligned_vma_is_refused() {
        for vma in [raw(0x1001, 0x3000), raw(0x1000, 0x3001)] {
            assert!(matches!(read(&[vma]), Err(DecodeError::Unaligned { .. })));
        }
    }

    #[test]
    fn empty_or_backward_vma_is_refused() {
        for vma in [raw(0x3000, 0x3000), raw(0x3000, 0x1000)] {
            assert!(matches!(read(&[vma]), Err(DecodeError::EmptyVma { start: 0x3000, .. })));
        }
    }

    #[test]
    fn unsorted_vmas_are_refused() {
        let error = read(&[raw(0x3000, 0x4000), raw(0x1000, 0x2000)]).unwrap_err();
        assert!(matches!(error, DecodeError::Unsorted { start: 0x1000, previous_end: 0x4000, .. }));
    }

    #[test]
    fn overlapping_vmas_are_refused() {
        let error = read(&[raw(0x1000, 0x4000), raw(0x3000, 0x5000)]).unwrap_err();
        assert!(matches!(error, DecodeError::Unsorted { start: 0x3000, previous_end: 0x4000, .. }));
    }

    #[test]
    fn missing_vma_field_is_refused() {
        let error = read(&[messages::VmaEntry { status: None, ..raw(0x1000, 0x2000) }]).unwrap_err();
        assert!(matches!(error, DecodeError::FieldMissing { message: VMA, field: "status" }));
    }

    #[test]
    fn missing_mm_field_is_refused() {
        let error = read_mm(&frame(ImageKind::Mm, [vec![0x28, 1, 0x30, 1]])).unwrap_err();
        assert!(matches!(error, DecodeError::FieldMissing { message: MM, field: "mm_brk" }));
    }

    #[test]
    fn too_many_vmas_are_refused_before_they_are_decoded() {
        let record = [0x72, 0].repeat(MAX_VMAS + 1);
        let error = read_mm(&frame(ImageKind::Mm, [record])).unwrap_err();
        assert!(matches!(error, DecodeError::TooMany { what: "VMAs", .. }));
    }

    #[test]
    fn vmas_too_short_for_their_fields_are_refused_before_they_are_decoded() {
        let error = read_mm(&frame(ImageKind::Mm, [[0x72, 0].repeat(MAX_VMAS)])).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed { message: VMA }));
        let plain = anonymous_vma(0, 0x1000);
        assert!(read_mm(&write_mm(&MmEntry { vmas: vec![plain], ..MmEntry::default() })).is_ok());
    }

    #[test]
    fn record_that_breaks_off_is_refused() {
        let error = read_mm(&frame(ImageKind::Mm, [vec![0x72, 5, 0]])).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed { message: MM }));
    }
}
