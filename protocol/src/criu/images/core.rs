//! `core-PID.img`: only whether the task lives, how it ended and what it is called.

use super::error::DecodeError;
use super::framing::{ImageKind, Records};
use super::{messages, parse, required};
use crate::criu::limits::MAX_COMM_BYTES;

const MESSAGE: &str = "task_core_entry";

/// State of a task at the dump, by CRIU's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Runs again after restore.
    Alive,
    /// A zombie; this is how CRIU writes one. Restore makes a process and lets it exit.
    Dead,
    /// Stopped by a signal; stays stopped after restore, but has memory like a live one.
    Stopped,
    /// A zombie as CRIU sees it while dumping; not written by any version known.
    Zombie,
    /// A number this program does not know.
    Unknown(u32),
}

impl TaskState {
    /// Whether the task has memory, and so an mm and a pagemap image. `None` for an unknown state.
    #[must_use]
    pub const fn has_memory(self) -> Option<bool> {
        match self {
            Self::Alive | Self::Stopped => Some(true),
            Self::Dead | Self::Zombie => Some(false),
            Self::Unknown(_) => None,
        }
    }

    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Alive => 1,
            Self::Dead => 2,
            Self::Stopped => 3,
            Self::Zombie => 6,
            Self::Unknown(number) => number,
        }
    }

    const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Alive,
            2 => Self::Dead,
            3 => Self::Stopped,
            6 => Self::Zombie,
            _ => Self::Unknown(number),
        }
    }
}

/// `core_entry.tc` of a task's main thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreTask {
    /// State at the dump.
    pub state: TaskState,
    /// Exit status as `wait` gives it, of a dead task.
    pub exit_code: u32,
    /// Name of the task for messages: from at most 15 bytes, what is not UTF-8 replaced.
    pub comm: String,
}

/// Decodes `core-PID.img` of a main thread.
///
/// # Errors
/// [`DecodeError`]; [`DecodeError::FieldMissing`] also for the image of another thread, which has no `tc`.
pub fn read_core(image: &[u8]) -> Result<CoreTask, DecodeError> {
    let raw: messages::CoreEntry = parse("core_entry", Records::only(ImageKind::Core, image)?)?;
    let task = required(raw.tc, "core_entry", "tc")?;
    let comm = task.comm.unwrap_or_default();
    let comm = comm.get(..MAX_COMM_BYTES).unwrap_or(&comm);
    Ok(CoreTask {
        state: TaskState::from_number(required(task.task_state, MESSAGE, "task_state")?),
        exit_code: required(task.exit_code, MESSAGE, "exit_code")?,
        comm: String::from_utf8_lossy(comm).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::build::{frame, write_core};
    use super::*;

    fn read(tc: Option<messages::TaskCoreEntry>) -> Result<CoreTask, DecodeError> {
        let core = messages::CoreEntry { mtype: Some(1), tc };
        read_core(&frame(ImageKind::Core, [core.encode_to_vec()]))
    }

    fn raw() -> messages::TaskCoreEntry {
        messages::TaskCoreEntry { task_state: Some(1), exit_code: Some(0), ..Default::default() }
    }

    #[test]
    fn what_is_written_is_read() {
        for state in [TaskState::Alive, TaskState::Dead, TaskState::Stopped, TaskState::Zombie] {
            let task = CoreTask { state, exit_code: 0x300, comm: "redis-server".to_owned() };
            assert_eq!(read_core(&write_core(&task)).unwrap(), task);
            assert_eq!(state.has_memory(), Some(matches!(state, TaskState::Alive | TaskState::Stopped)));
        }
    }

    /// The image CRIU 4.1.1 wrote for a zombie.
    #[test]
    fn zombie_of_criu_4_1_1_is_dead() {
        let record = b"\x08\x01\x1a\x14\x08\x02\x10\x80\x06\x18\x00\x20\x00\x28\x00\x32\x07python3";
        let task = read_core(&frame(ImageKind::Core, [record.to_vec()])).unwrap();
        assert_eq!(task, CoreTask { state: TaskState::Dead, exit_code: 0x300, comm: "python3".to_owned() });
    }

    #[test]
    fn unknown_state_is_kept_as_such() {
        let task = read(Some(messages::TaskCoreEntry { task_state: Some(4), ..raw() })).unwrap();
        assert_eq!(task.state, TaskState::Unknown(4));
        assert_eq!(task.state.has_memory(), None);
    }

    #[test]
    fn name_of_any_bytes_is_cut_and_made_printable() {
        let comm = [&[0xff_u8, b'a'][..], &[b'b'; 100]].concat();
        let task = read(Some(messages::TaskCoreEntry { comm: Some(comm), ..raw() })).unwrap();
        assert_eq!(task.comm, format!("\u{fffd}a{}", "b".repeat(13)));
    }

    #[test]
    fn core_of_another_thread_is_refused() {
        assert!(matches!(read(None), Err(DecodeError::FieldMissing { field: "tc", .. })));
    }

    #[test]
    fn missing_state_is_refused() {
        let error = read(Some(messages::TaskCoreEntry { task_state: None, ..raw() })).unwrap_err();
        assert!(matches!(error, DecodeError::FieldMissing { field: "task_state", .. }));
    }
}
