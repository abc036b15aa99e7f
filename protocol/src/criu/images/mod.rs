//! Image files as bytes: magic words, records, messages. Pure: bytes in, checked values out, and back.
//!
//! | file | decoder | value |
//! |---|---|---|
//! | `inventory.img` | [`read_inventory`] | [`Inventory`] |
//! | `pstree.img` | [`read_pstree`] | [`PstreeEntry`]s |
//! | `core-PID.img` | [`read_core`] | [`CoreTask`] |
//! | `mm-PID.img` | [`read_mm`] | [`MmEntry`] with [`Vma`]s |
//! | `pagemap-PID.img` | [`read_pagemap`] | [`Pagemap`]: head and [`PagemapEntry`]s |
//! | `stats-dump`, `stats-restore` | [`read_stats`] | [`Stats`] |
//!
//! What a decoder gives is checked: addresses are page-aligned, ranges ascend and do not overlap, pids are pids,
//! required fields were there. [`build`] writes the same images, for tests of whatever reads them.

pub mod build;
mod core;
mod error;
mod fields;
mod framing;
mod inventory;
mod messages;
mod mm;
mod pagemap;
mod pstree;
mod stats;

pub use self::core::{CoreTask, TaskState, read_core};
pub use build::{write_core, write_inventory, write_mm, write_pagemap, write_pstree, write_stats};
pub use error::DecodeError;
pub use framing::{COMMON_MAGIC, ImageKind, Records, SERVICE_MAGIC};
pub use inventory::{Inventory, Lsm, NetworkLock, read_inventory};
pub use mm::{MmEntry, Vma, read_mm, vma_status};
pub use pagemap::{PageFlags, Pagemap, PagemapEntry, PagemapHead, read_pagemap};
pub use pstree::{PstreeEntry, read_pstree};
pub use stats::{DumpStats, RestoreStats, Stats, read_stats};

use crate::units::ImageAddr;

/// The value of a field that proto2 calls required and prost cannot.
fn required<T>(value: Option<T>, message: &'static str, field: &'static str) -> Result<T, DecodeError> {
    value.ok_or(DecodeError::FieldMissing { message, field })
}

fn parse<M: prost::Message + Default>(message: &'static str, record: &[u8]) -> Result<M, DecodeError> {
    M::decode(record).map_err(|source| DecodeError::Protobuf { message, source })
}

fn aligned(message: &'static str, address: u64) -> Result<ImageAddr, DecodeError> {
    ImageAddr::aligned(address).ok_or(DecodeError::Unaligned { message, address })
}

/// Every decoder takes any bytes without a panic, behind good magic words too.
#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_all(image: &[u8]) {
        let _ = read_inventory(image);
        let _ = read_pstree(image);
        let _ = read_core(image);
        let _ = read_mm(image);
        let _ = read_pagemap(image);
        let _ = read_stats(image);
    }

    fn framed(kind: ImageKind, records: &[Vec<u8>]) -> Vec<u8> {
        build::frame(kind, records.iter().cloned())
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(image in proptest::collection::vec(any::<u8>(), 0..200)) {
            decode_all(&image);
        }

        #[test]
        fn any_records_decode_or_fail(
            records in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..4),
        ) {
            use ImageKind::{Core, Inventory, Mm, Pagemap, Pstree, Stats};
            for kind in [Inventory, Pstree, Core, Mm, Pagemap, Stats] {
                decode_all(&framed(kind, &records));
            }
        }

        #[test]
        fn any_field_values_decode_or_fail(
            vma in proptest::array::uniform10(any::<u64>()),
            vaddr in any::<u64>(),
            compat_nr_pages in any::<u32>(),
            in_parent in any::<Option<bool>>(),
            flags in any::<Option<u32>>(),
            nr_pages in any::<Option<u64>>(),
        ) {
            let mut record = Vec::new();
            for (field, value) in (1_u8..).zip(vma) {
                record.push(field << 3);
                prost::encode_length_delimiter(usize::try_from(value).unwrap(), &mut record).unwrap();
            }
            decode_all(&framed(ImageKind::Mm, &[record]));
            let entry = messages::PagemapEntry {
                vaddr: Some(vaddr),
                compat_nr_pages: Some(compat_nr_pages),
                in_parent,
                flags,
                nr_pages,
            };
            let head = messages::PagemapHead { pages_id: Some(1) };
            let records = [prost::Message::encode_to_vec(&head), prost::Message::encode_to_vec(&entry)];
            decode_all(&framed(ImageKind::Pagemap, &records));
        }
    }
}
