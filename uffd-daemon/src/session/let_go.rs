//! What became of tasks whose CRIU has ended badly behind the lifted barrier.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use host::mailbox::Mailbox;
use host::waiting;
use nix::libc::{SIGKILL, SIGSTOP, SIGTRAP};
use protocol::lazy_map::LazyMap;

use crate::barrier::Word;
use crate::handover::ReceiveError;
use crate::limits;

/// Whether the tasks run, or never did and never will, if that can be known: by the word that CRIU left, whether the hand-over had its
/// finish word or ended without it, and by the tasks below `proc`.
pub(super) fn whether_they_run(
    word: Word,
    finished: bool,
    ended_early: bool,
    proc: &Path,
    map: &LazyMap,
) -> Option<bool> {
    match word {
        // One that fails kills what it has restored.
        Word::Failed => Some(false),
        // One that is killed has let go of no task before the finish word, and of all behind its mark.
        Word::None if ended_early => Some(false),
        Word::None if finished => has_let_go(proc, map),
        Word::Resuming | Word::Resumed if all_live(proc, map) => Some(true),
        _ => None,
    }
}

/// Whether a CRIU that is gone has left with the finish word, and whether without: the hand-over's thread is about to find out.
pub(super) fn finish_word(handed_over: &Mailbox<Result<(), ReceiveError>>) -> (bool, bool) {
    let _ = waiting::readable_within(handed_over.as_fd(), limits::REASON_PATIENCE);
    handed_over.empty().into_iter().fold((false, false), |(finished, early), result| match result {
        Ok(()) => (true, early),
        Err(error) => (finished, early || error.is_early_end()),
    })
}

/// Whether a CRIU that was killed behind the finish word has let go of the tasks, as far as that can be known.
///
/// CRIU's code in a task blocks every signal until it jumps back into the program, and waits there for a word before it does. One that
/// was killed before it gave that word leaves all threads there for ever; one that was killed later leaves them to run, but a thread in
/// which it had just set a breakpoint ends its task.
fn has_let_go(proc: &Path, map: &LazyMap) -> Option<bool> {
    let deadline = Instant::now() + limits::LET_GO_PATIENCE;
    let mut some_left = false;
    loop {
        let held = all_live(proc, map).then(|| threads(proc, map).map(|thread| blocks_everything(&thread)));
        let held: Vec<bool> = held?.collect();
        let held = (held.len(), held.into_iter().filter(|held| *held).count());
        some_left |= held.0 != held.1;
        match held {
            _ if Instant::now() < deadline => std::thread::sleep(limits::WORD_LOOK),
            (_, 0) => return Some(true),
            _ if !some_left => return Some(false),
            _ => return None,
        }
    }
}

/// The directories of all threads.
fn threads(proc: &Path, map: &LazyMap) -> impl Iterator<Item = PathBuf> {
    let directories = map.tasks().iter().map(|task| proc.join(task.id.to_string()).join("task"));
    let entries = directories.filter_map(|directory| std::fs::read_dir(directory).ok()).flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect::<Vec<_>>().into_iter()
}

/// Whether a thread blocks every signal, as CRIU's code does (where CRIU has stopped it once, all but SIGTRAP); the C libraries leave
/// out those that they need themselves.
fn blocks_everything(thread: &Path) -> bool {
    const EXCEPT: u64 = 1 << (SIGKILL - 1) | 1 << (SIGSTOP - 1) | 1 << (SIGTRAP - 1);
    let status = std::fs::read_to_string(thread.join("status")).unwrap_or_default();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    let blocked = blocked.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    blocked.is_some_and(|mask| mask | EXCEPT == u64::MAX)
}

/// Whether every task with lazy pages is there and has not ended.
fn all_live(proc: &Path, map: &LazyMap) -> bool {
    let ended =
        |stat: &str| stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']));
    map.tasks().iter().all(|task| {
        std::fs::read_to_string(proc.join(task.id.to_string()).join("stat")).is_ok_and(|stat| !ended(&stat))
    })
}
