//! Images from values: the inverse of the decoders, for tests of whatever reads images.
//!
//! The required fields that the values do not carry are written as zero, so that CRIU's own tools can decode the
//! result. It is not enough for `criu restore`, which needs far more than these images.

use prost::Message;

use super::core::CoreTask;
use super::framing::ImageKind;
use super::inventory::{Inventory, Lsm, NetworkLock, VERSION_1_1};
use super::messages;
use super::mm::{MmEntry, Vma, vma_status};
use super::pagemap::Pagemap;
use super::pstree::PstreeEntry;
use super::stats::{DumpStats, RestoreStats, Stats};
use crate::units::ImageAddr;

const MTYPE_X86_64: i32 = 1;

/// An image of `kind` with `records`. A record past 4 GiB, which no decoder takes, is left out.
#[must_use]
pub fn frame(kind: ImageKind, records: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut image = Vec::new();
    for magic in kind.leading_magic().into_iter().chain([kind.magic()]) {
        image.extend(magic.to_le_bytes());
    }
    for record in records {
        if let Ok(len) = u32::try_from(record.len()) {
            image.extend(len.to_le_bytes());
            image.extend(record);
        }
    }
    image
}

/// `inventory.img`.
#[must_use]
pub fn write_inventory(inventory: &Inventory) -> Vec<u8> {
    let raw = messages::InventoryEntry {
        img_version: Some(VERSION_1_1),
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        lsmtype: Some(match inventory.lsm {
            Lsm::None => 0,
            Lsm::Selinux => 1,
            Lsm::Apparmor => 2,
            Lsm::Unknown(number) => number,
        }),
        dump_uptime: inventory.dump_uptime_us,
        tcp_close: Some(inventory.tcp_close),
        network_lock_method: Some(match inventory.network_lock_method {
            NetworkLock::Iptables => 0,
            NetworkLock::Nftables => 1,
            NetworkLock::Skip => 2,
            NetworkLock::Unknown(number) => number,
        }),
        dump_criu_run_id: inventory.dump_criu_run_id.clone().map(String::into_bytes),
        allow_uprobes: Some(inventory.allow_uprobes),
    };
    frame(ImageKind::Inventory, [raw.encode_to_vec()])
}

/// `pstree.img`.
#[must_use]
pub fn write_pstree(entries: &[PstreeEntry]) -> Vec<u8> {
    let message = |entry: &PstreeEntry| messages::PstreeEntry {
        pid: Some(entry.pid.0),
        ppid: Some(entry.ppid),
        pgid: Some(entry.pgid),
        sid: Some(entry.sid),
        threads: entry.threads.clone(),
    };
    frame(ImageKind::Pstree, entries.iter().map(|entry| message(entry).encode_to_vec()))
}

/// `core-PID.img` of a main thread on x86-64.
#[must_use]
pub fn write_core(task: &CoreTask) -> Vec<u8> {
    let tc = messages::TaskCoreEntry {
        task_state: Some(task.state.number()),
        exit_code: Some(task.exit_code),
        personality: Some(0),
        flags: Some(0),
        blk_sigset: Some(0),
        comm: Some(task.comm.clone().into_bytes()),
    };
    let raw = messages::CoreEntry { mtype: Some(MTYPE_X86_64), tc: Some(tc) };
    frame(ImageKind::Core, [raw.encode_to_vec()])
}

/// `mm-PID.img`.
#[must_use]
pub fn write_mm(mm: &MmEntry) -> Vec<u8> {
    let raw = messages::MmEntry {
        mm_start_code: Some(0),
        mm_end_code: Some(0),
        mm_start_data: Some(0),
        mm_end_data: Some(0),
        mm_start_stack: Some(mm.start_stack),
        mm_start_brk: Some(mm.start_brk),
        mm_brk: Some(mm.brk),
        mm_arg_start: Some(0),
        mm_arg_end: Some(0),
        mm_env_start: Some(0),
        mm_env_end: Some(0),
        exe_file_id: Some(mm.exe_file_id),
        vmas: mm.vmas.iter().map(vma).collect(),
        thp_disabled: None,
    };
    frame(ImageKind::Mm, [raw.encode_to_vec()])
}

fn vma(vma: &Vma) -> messages::VmaEntry {
    messages::VmaEntry {
        start: Some(vma.start.get()),
        end: Some(vma.end.get()),
        pgoff: Some(vma.pgoff),
        shmid: Some(vma.shmid),
        prot: Some(vma.prot),
        flags: Some(vma.flags),
        status: Some(vma.status),
        fd: Some(-1),
        madv: Some(vma.madv),
    }
}

/// `pagemap-PID.img`. A page count that does not fit the narrow encoding is written wide.
#[must_use]
pub fn write_pagemap(pagemap: &Pagemap) -> Vec<u8> {
    frame(ImageKind::Pagemap, pagemap.records())
}

/// `stats-dump` or `stats-restore`.
#[must_use]
pub fn write_stats(stats: &Stats) -> Vec<u8> {
    let dump = |stats: &DumpStats| messages::DumpStatsEntry {
        freezing_time: Some(stats.freezing_us),
        frozen_time: Some(stats.frozen_us),
        memdump_time: Some(stats.memdump_us),
        memwrite_time: Some(stats.memwrite_us),
        pages_scanned: Some(stats.pages_scanned),
        pages_skipped_parent: Some(stats.pages_skipped_parent),
        pages_written: Some(stats.pages_written),
        pages_lazy: Some(stats.pages_lazy),
    };
    let restore = |stats: &RestoreStats| messages::RestoreStatsEntry {
        pages_compared: Some(stats.pages_compared),
        pages_skipped_cow: Some(stats.pages_skipped_cow),
        forking_time: Some(stats.forking_us),
        restore_time: Some(stats.restore_us),
        pages_restored: stats.pages_restored,
    };
    let raw = messages::StatsEntry {
        dump: stats.dump.as_ref().map(dump),
        restore: stats.restore.as_ref().map(restore),
    };
    frame(ImageKind::Stats, [raw.encode_to_vec()])
}

/// Readable and writable private anonymous memory from `start` to `end`, each rounded down to a page: the plainest
/// VMA that can be lazy.
#[must_use]
pub const fn anonymous_vma(start: u64, end: u64) -> Vma {
    Vma {
        start: ImageAddr::containing(start),
        end: ImageAddr::containing(end),
        pgoff: 0,
        shmid: 0,
        prot: 3,
        flags: 0x22,
        status: vma_status::REGULAR | vma_status::ANON_PRIVATE,
        madv: 0,
    }
}
