//! CRIU's messages as they stand in the images, field by field: numbers, types and nothing else.
//!
//! Every field is optional here, because prost reads an absent required field as zero; the decoders insist on
//! the required ones. Fields nobody needs are left out and skipped, except the required ones of messages that
//! [`super::build`] writes: CRIU's own tools refuse an image without them.
//! Source of the numbers: `images/*.proto` of CRIU 4.2.

use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub(super) struct InventoryEntry {
    #[prost(uint32, optional, tag = "1")]
    pub(super) img_version: Option<u32>,
    #[prost(bool, optional, tag = "2")]
    pub(super) fdinfo_per_id: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub(super) ns_per_id: Option<bool>,
    #[prost(int32, optional, tag = "6")]
    pub(super) lsmtype: Option<i32>,
    #[prost(uint64, optional, tag = "8")]
    pub(super) dump_uptime: Option<u64>,
    #[prost(bool, optional, tag = "10")]
    pub(super) tcp_close: Option<bool>,
    #[prost(uint32, optional, tag = "11")]
    pub(super) network_lock_method: Option<u32>,
    #[prost(bytes = "vec", optional, tag = "13")]
    pub(super) dump_criu_run_id: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "14")]
    pub(super) allow_uprobes: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PstreeEntry {
    #[prost(uint32, optional, tag = "1")]
    pub(super) pid: Option<u32>,
    #[prost(uint32, optional, tag = "2")]
    pub(super) ppid: Option<u32>,
    #[prost(uint32, optional, tag = "3")]
    pub(super) pgid: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub(super) sid: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub(super) threads: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CoreEntry {
    #[prost(int32, optional, tag = "1")]
    pub(super) mtype: Option<i32>,
    #[prost(message, optional, tag = "3")]
    pub(super) tc: Option<TaskCoreEntry>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TaskCoreEntry {
    #[prost(uint32, optional, tag = "1")]
    pub(super) task_state: Option<u32>,
    #[prost(uint32, optional, tag = "2")]
    pub(super) exit_code: Option<u32>,
    #[prost(uint32, optional, tag = "3")]
    pub(super) personality: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub(super) flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub(super) blk_sigset: Option<u64>,
    // A string in CRIU, but a task may name itself with any bytes.
    #[prost(bytes = "vec", optional, tag = "6")]
    pub(super) comm: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct MmEntry {
    #[prost(uint64, optional, tag = "1")]
    pub(super) mm_start_code: Option<u64>,
    #[prost(uint64, optional, tag = "2")]
    pub(super) mm_end_code: Option<u64>,
    #[prost(uint64, optional, tag = "3")]
    pub(super) mm_start_data: Option<u64>,
    #[prost(uint64, optional, tag = "4")]
    pub(super) mm_end_data: Option<u64>,
    #[prost(uint64, optional, tag = "5")]
    pub(super) mm_start_stack: Option<u64>,
    #[prost(uint64, optional, tag = "6")]
    pub(super) mm_start_brk: Option<u64>,
    #[prost(uint64, optional, tag = "7")]
    pub(super) mm_brk: Option<u64>,
    #[prost(uint64, optional, tag = "8")]
    pub(super) mm_arg_start: Option<u64>,
    #[prost(uint64, optional, tag = "9")]
    pub(super) mm_arg_end: Option<u64>,
    #[prost(uint64, optional, tag = "10")]
    pub(super) mm_env_start: Option<u64>,
    #[prost(uint64, optional, tag = "11")]
    pub(super) mm_env_end: Option<u64>,
    #[prost(uint32, optional, tag = "12")]
    pub(super) exe_file_id: Option<u32>,
    #[prost(message, repeated, tag = "14")]
    pub(super) vmas: Vec<VmaEntry>,
    #[prost(bool, optional, tag = "17")]
    pub(super) thp_disabled: Option<bool>,
}

/// Number of the field `vmas` of [`MmEntry`].
pub(super) const MM_VMAS: u64 = 14;

#[derive(Clone, PartialEq, Message)]
pub(super) struct VmaEntry {
    #[prost(uint64, optional, tag = "1")]
    pub(super) start: Option<u64>,
    #[prost(uint64, optional, tag = "2")]
    pub(super) end: Option<u64>,
    #[prost(uint64, optional, tag = "3")]
    pub(super) pgoff: Option<u64>,
    #[prost(uint64, optional, tag = "4")]
    pub(super) shmid: Option<u64>,
    #[prost(uint32, optional, tag = "5")]
    pub(super) prot: Option<u32>,
    #[prost(uint32, optional, tag = "6")]
    pub(super) flags: Option<u32>,
    #[prost(uint32, optional, tag = "7")]
    pub(super) status: Option<u32>,
    #[prost(sint64, optional, tag = "8")]
    pub(super) fd: Option<i64>,
    #[prost(uint64, optional, tag = "9")]
    pub(super) madv: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PagemapHead {
    #[prost(uint32, optional, tag = "1")]
    pub(super) pages_id: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PagemapEntry {
    #[prost(uint64, optional, tag = "1")]
    pub(super) vaddr: Option<u64>,
    #[prost(uint32, optional, tag = "2")]
    pub(super) compat_nr_pages: Option<u32>,
    #[prost(bool, optional, tag = "3")]
    pub(super) in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub(super) flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub(super) nr_pages: Option<u64>,
}

/// Highest field of [`PagemapEntry`] that CRIU up to 4.2 writes.
pub(super) const PAGEMAP_ENTRY_LAST: u64 = 5;

#[derive(Clone, PartialEq, Message)]
pub(super) struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    pub(super) dump: Option<DumpStatsEntry>,
    #[prost(message, optional, tag = "2")]
    pub(super) restore: Option<RestoreStatsEntry>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DumpStatsEntry {
    #[prost(uint32, optional, tag = "1")]
    pub(super) freezing_time: Option<u32>,
    #[prost(uint32, optional, tag = "2")]
    pub(super) frozen_time: Option<u32>,
    #[prost(uint32, optional, tag = "3")]
    pub(super) memdump_time: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub(super) memwrite_time: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub(super) pages_scanned: Option<u64>,
    #[prost(uint64, optional, tag = "6")]
    pub(super) pages_skipped_parent: Option<u64>,
    #[prost(uint64, optional, tag = "7")]
    pub(super) pages_written: Option<u64>,
    #[prost(uint64, optional, tag = "9")]
    pub(super) pages_lazy: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RestoreStatsEntry {
    #[prost(uint64, optional, tag = "1")]
    pub(super) pages_compared: Option<u64>,
    #[prost(uint64, optional, tag = "2")]
    pub(super) pages_skipped_cow: Option<u64>,
    #[prost(uint32, optional, tag = "3")]
    pub(super) forking_time: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub(super) restore_time: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub(super) pages_restored: Option<u64>,
}
