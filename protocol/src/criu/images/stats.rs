//! `stats-dump` and `stats-restore` (no `.img` in these names): how long CRIU's own phases took.

use super::error::DecodeError;
use super::framing::{ImageKind, Records};
use super::{messages, parse, required};

const DUMP: &str = "dump_stats_entry";
const RESTORE: &str = "restore_stats_entry";

/// `dump_stats_entry`. Times are in µs and wrap after 71 minutes.
///
/// After `criu dump --lazy-pages` the file is written when the page server has already reset its counters:
/// `frozen_us` and `pages_lazy` are then meaningless.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Seizing the tasks.
    pub freezing_us: u32,
    /// From seized to let go (or to the page server, if lazy).
    pub frozen_us: u32,
    /// Collecting the pages.
    pub memdump_us: u32,
    /// Writing the pages.
    pub memwrite_us: u32,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages left to the parent images.
    pub pages_skipped_parent: u64,
    /// Pages written to the pages files.
    pub pages_written: u64,
    /// Pages left on the source.
    pub pages_lazy: u64,
}

/// `restore_stats_entry`. Times are in µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// Pages compared with a parent task's, to share them.
    pub pages_compared: u64,
    /// Pages found equal and shared.
    pub pages_skipped_cow: u64,
    /// Forking the tree.
    pub forking_us: u32,
    /// All of the restore.
    pub restore_us: u32,
    /// Pages read from the images; `None` from old CRIUs.
    pub pages_restored: Option<u64>,
}

/// `stats_entry`: one of the two, by the file it is from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// What `stats-dump` holds.
    pub dump: Option<DumpStats>,
    /// What `stats-restore` holds.
    pub restore: Option<RestoreStats>,
}

/// Decodes `stats-dump` or `stats-restore`.
///
/// # Errors
/// [`DecodeError`].
pub fn read_stats(image: &[u8]) -> Result<Stats, DecodeError> {
    let raw: messages::StatsEntry = parse("stats_entry", Records::only(ImageKind::Stats, image)?)?;
    Ok(Stats { dump: raw.dump.map(dump).transpose()?, restore: raw.restore.map(restore).transpose()? })
}

fn dump(raw: messages::DumpStatsEntry) -> Result<DumpStats, DecodeError> {
    Ok(DumpStats {
        freezing_us: required(raw.freezing_time, DUMP, "freezing_time")?,
        frozen_us: required(raw.frozen_time, DUMP, "frozen_time")?,
        memdump_us: required(raw.memdump_time, DUMP, "memdump_time")?,
        memwrite_us: required(raw.memwrite_time, DUMP, "memwrite_time")?,
        pages_scanned: required(raw.pages_scanned, DUMP, "pages_scanned")?,
        pages_skipped_parent: required(raw.pages_skipped_parent, DUMP, "pages_skipped_parent")?,
        pages_written: required(raw.pages_written, DUMP, "pages_written")?,
        // Newer than the other counters, so images from before lazy pages lack it.
        pages_lazy: raw.pages_lazy.unwrap_or(0),
    })
}

fn restore(raw: messages::RestoreStatsEntry) -> Result<RestoreStats, DecodeError> {
    Ok(RestoreStats {
        pages_compared: required(raw.pages_compared, RESTORE, "pages_compared")?,
        pages_skipped_cow: required(raw.pages_skipped_cow, RESTORE, "pages_skipped_cow")?,
        forking_us: required(raw.forking_time, RESTORE, "forking_time")?,
        restore_us: required(raw.restore_time, RESTORE, "restore_time")?,
        pages_restored: raw.pages_restored,
    })
}

#[cfg(test)]
mod tests {
    use super::super::build::{frame, write_stats};
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dump = DumpStats {
            freezing_us: 228,
            frozen_us: 85_632,
            memdump_us: 57_376,
            memwrite_us: 46_707,
            pages_scanned: 24_140,
            pages_skipped_parent: 2,
            pages_written: 21_012,
            pages_lazy: 3,
        };
        let restore = RestoreStats {
            pages_compared: 1,
            pages_skipped_cow: 2,
            forking_us: 3,
            restore_us: 4,
            pages_restored: Some(5),
        };
        for stats in [Stats { dump: Some(dump), restore: None }, Stats { dump: None, restore: Some(restore) }]
        {
            assert_eq!(read_stats(&write_stats(&stats)).unwrap(), stats);
        }
    }

    #[test]
    fn missing_dump_time_is_refused() {
        let error = read_stats(&frame(ImageKind::Stats, [vec![0x0a, 2, 0x08, 1]])).unwrap_err();
        assert!(matches!(error, DecodeError::FieldMissing { message: DUMP, field: "frozen_time" }));
    }

    #[test]
    fn missing_restore_time_is_refused() {
        let error = read_stats(&frame(ImageKind::Stats, [vec![0x12, 4, 0x08, 1, 0x10, 1]])).unwrap_err();
        assert!(matches!(error, DecodeError::FieldMissing { message: RESTORE, field: "forking_time" }));
    }
}
