//! `pstree.img`: the tasks of a checkpoint.

use std::collections::BTreeSet;

use super::error::DecodeError;
use super::framing::{ImageKind, Records};
use super::{messages, parse, required};
use crate::criu::limits::{MAX_PID, MAX_PSTREE_RECORD_BYTES, MAX_TASKS, MAX_THREADS_PER_TASK};
use crate::units::TaskId;

const MESSAGE: &str = "pstree_entry";

/// `pstree_entry`: one task, alive or dead. All ids are those of the task's own PID namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PstreeEntry {
    /// Pid of the task.
    pub pid: TaskId,
    /// Pid of its parent, 0 for the root of the tree.
    pub ppid: u32,
    /// Process group; 0 if it is outside the namespace.
    pub pgid: u32,
    /// Session; 0 if it is outside the namespace.
    pub sid: u32,
    /// Thread ids, the main thread's first. Of a dead task CRIU writes one id from uninitialised memory, so they
    /// mean something only after the core image said that the task lives, and are not checked here.
    pub threads: Vec<u32>,
}

/// Decodes `pstree.img`: at least one task, no pid twice, in the order of the image (parents first).
///
/// # Errors
/// [`DecodeError`].
pub fn read_pstree(image: &[u8]) -> Result<Vec<PstreeEntry>, DecodeError> {
    let mut entries = Vec::new();
    let mut seen = BTreeSet::new();
    for record in Records::new(ImageKind::Pstree, image)? {
        let entry = entry(record?)?;
        if entries.len() == MAX_TASKS {
            return Err(DecodeError::TooMany { message: MESSAGE, what: "tasks", limit: MAX_TASKS });
        }
        if !seen.insert(entry.pid) {
            return Err(DecodeError::DuplicateTask(entry.pid.0));
        }
        entries.push(entry);
    }
    if entries.is_empty() {
        return Err(DecodeError::RecordMissing { kind: ImageKind::Pstree });
    }
    Ok(entries)
}

fn entry(record: &[u8]) -> Result<PstreeEntry, DecodeError> {
    let limit = MAX_THREADS_PER_TASK;
    let too_many = DecodeError::TooMany { message: MESSAGE, what: "threads", limit };
    if record.len() > MAX_PSTREE_RECORD_BYTES {
        return Err(too_many);
    }
    let raw: messages::PstreeEntry = parse(MESSAGE, record)?;
    let pid = required(raw.pid, MESSAGE, "pid")?;
    if pid == 0 || pid > MAX_PID {
        return Err(DecodeError::Pid { message: MESSAGE, pid });
    }
    if raw.threads.len() > limit {
        return Err(too_many);
    }
    Ok(PstreeEntry {
        pid: TaskId(pid),
        ppid: outer_pid(raw.ppid, "ppid")?,
        pgid: outer_pid(raw.pgid, "pgid")?,
        sid: outer_pid(raw.sid, "sid")?,
        threads: raw.threads,
    })
}

fn outer_pid(value: Option<u32>, field: &'static str) -> Result<u32, DecodeError> {
    let pid = required(value, MESSAGE, field)?;
    if pid > MAX_PID { Err(DecodeError::Pid { message: MESSAGE, pid }) } else { Ok(pid) }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::build::{frame, write_pstree};
    use super::*;

    fn task(pid: u32) -> PstreeEntry {
        PstreeEntry { pid: TaskId(pid), ppid: 0, pgid: pid, sid: pid, threads: vec![pid, pid + 1] }
    }

    fn raw(pid: u32) -> messages::PstreeEntry {
        messages::PstreeEntry { pid: Some(pid), ppid: Some(0), pgid: Some(1), sid: Some(1), threads: vec![] }
    }

    fn read(entries: &[messages::PstreeEntry]) -> Result<Vec<PstreeEntry>, DecodeError> {
        read_pstree(&frame(ImageKind::Pstree, entries.iter().map(Message::encode_to_vec)))
    }

    #[test]
    fn what_is_written_is_read_in_order() {
        let entries = [task(9), task(3), PstreeEntry { ppid: 9, threads: vec![], ..task(5) }];
        assert_eq!(read_pstree(&write_pstree(&entries)).unwrap(), entries);
    }

    /// The entry CRIU 4.1.1 wrote for a zombie: its thread id is no pid at all.
    #[test]
    fn thread_id_of_a_dead_task_is_not_looked_at() {
        let record = [0x08, 0xaf, 0x2a, 0x10, 0x85, 0x2a, 0x18, 0x85, 0x2a, 0x20, 0x85, 0x2a, 0x28];
        let record = [&record[..], &[0xc0, 0xe7, 0xda, 0x95, 0x06]].concat();
        let entries = read_pstree(&frame(ImageKind::Pstree, [record])).unwrap();
        assert_eq!(entries[0].pid, TaskId(0x152f));
        assert_eq!(entries[0].threads, [0x62b6_b3c0]);
    }

    #[test]
    fn packed_threads_are_read_too() {
        let record = [&raw(7).encode_to_vec()[..], &[0x2a, 2, 7, 8]].concat();
        assert_eq!(read_pstree(&frame(ImageKind::Pstree, [record])).unwrap()[0].threads, [7, 8]);
    }

    #[test]
    fn no_task_is_refused() {
        assert!(matches!(read(&[]), Err(DecodeError::RecordMissing { .. })));
    }

    #[test]
    fn pid_zero_or_beyond_the_kernels_is_refused() {
        for pid in [0, MAX_PID + 1, u32::MAX] {
            assert!(matches!(read(&[raw(pid)]), Err(DecodeError::Pid { .. })), "{pid}");
        }
    }

    #[test]
    fn parent_beyond_the_kernels_pids_is_refused() {
        let entry = messages::PstreeEntry { ppid: Some(MAX_PID + 1), ..raw(1) };
        assert!(matches!(read(&[entry]), Err(DecodeError::Pid { .. })));
    }

    #[test]
    fn pid_listed_twice_is_refused() {
        assert!(matches!(read(&[raw(4), raw(5), raw(4)]), Err(DecodeError::DuplicateTask(4))));
    }

    #[test]
    fn missing_fields_are_refused() {
        for field in ["pid", "ppid", "pgid", "sid"] {
            let mut entry = raw(1);
            match field {
                "pid" => entry.pid = None,
                "ppid" => entry.ppid = None,
                "pgid" => entry.pgid = None,
                _ => entry.sid = None,
            }
            let error = read(&[entry]).unwrap_err();
            assert!(matches!(error, DecodeError::FieldMissing { field: f, .. } if f == field));
        }
    }

    #[test]
    fn too_many_tasks_are_refused() {
        let entries: Vec<_> = (1..=u32::try_from(MAX_TASKS).unwrap() + 1).map(raw).collect();
        assert!(read(&entries[..MAX_TASKS]).is_ok());
        assert!(matches!(read(&entries), Err(DecodeError::TooMany { what: "tasks", .. })));
    }

    #[test]
    fn too_many_threads_are_refused() {
        let entry = messages::PstreeEntry { threads: vec![1; MAX_THREADS_PER_TASK + 1], ..raw(1) };
        assert!(matches!(read(&[entry]), Err(DecodeError::TooMany { what: "threads", .. })));
    }

    #[test]
    fn a_record_of_more_than_all_threads_is_refused_before_it_is_decoded() {
        // Not even a message: it is refused as too long, not as malformed.
        let record = vec![0xff; MAX_PSTREE_RECORD_BYTES + 1];
        let error = read_pstree(&frame(ImageKind::Pstree, [record])).unwrap_err();
        assert!(matches!(error, DecodeError::TooMany { what: "threads", .. }));
    }
}
