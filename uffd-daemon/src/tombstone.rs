//! Word that nothing of a move is or will be on this host, for a daemon that follows this one.
//!
//! A source that has sent `Commit` and hears no more does not know whether its tasks run here. A daemon that has rolled back
//! says that they never did; one that is killed before it lets them run cannot. So it leaves word before it says `Prepared`,
//! adds before it lifts the barrier that CRIU has the last word, and takes it back once the tasks run:
//!
//! ```text
//!   leave ─▶ Prepared ─▶ ◀─ Commit ─ lift ─▶ the barrier is lifted ─▶ CRIU marks that it resumes ─▶ the tasks run ─▶ take back
//!   └─ killed here, CRIU kills what  ─┘      └─ killed here, CRIU does that and says ─┘
//!      it has restored                          so in its log, or the tasks run
//! ```
//!
//! A `serve` that is started again at the same address answers for it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use host::state_dir::{StateDir, write_whole};
use host::workdir::remove_if_there;
use protocol::wire::hello::{SessionId, SessionSecret};
use serde::{Deserialize, Serialize};

use crate::barrier;
use crate::limits;
use crate::session::StateConfig;

/// The kind of file.
const KIND: &str = "never-ran";

#[derive(Serialize, Deserialize)]
struct Word {
    session: [u8; 16],
    secret: [u8; 16],
    /// Where the daemon listened: there the source asks.
    listen: String,
    /// Which start of this host: a file system that came back may have kept what was taken back.
    boot: String,
    /// Where CRIU says how it has gone on, if the barrier was to be lifted.
    lifted: Option<PathBuf>,
}

/// Leaves it.
///
/// # Errors
/// The errno of writing it.
pub fn leave(state: &StateConfig) -> io::Result<()> {
    write(state, None)
}

/// Says that from here on it is as CRIU says whose barrier is in `dir`.
///
/// # Errors
/// The errno of writing it: it stands as it was then.
pub fn lift(state: &StateConfig, dir: &Path) -> io::Result<()> {
    write(state, Some(dir.to_owned()))
}

fn write(state: &StateConfig, lifted: Option<PathBuf>) -> io::Result<()> {
    let Some((session, secret)) = state.session else { return Ok(()) };
    let (listen, boot) = (state.listen.clone(), boot()?);
    let word = Word { session: session.0, secret: secret.0, listen, boot, lifted };
    write_whole(&state.dir.file(session, KIND), &serde_json::to_vec(&word)?)
}

/// Takes it back, if it was left.
///
/// # Errors
/// The errno of removing it: it stands then.
pub fn take_back(dir: &StateDir, session: SessionId) -> io::Result<()> {
    remove_if_there(&dir.file(session, KIND))
}

/// What daemons that listened at `listen` have left, the oldest first; what is too old or too much is removed. A CRIU that was
/// let go on is waited for.
///
/// # Errors
/// The errno of reading the directory.
pub fn find(dir: &StateDir, listen: &str) -> io::Result<Vec<(SessionId, SessionSecret)>> {
    let boot = boot()?;
    let deadline = Instant::now() + limits::RESUME_PATIENCE;
    let mut found = Vec::new();
    for path in dir.files(KIND)? {
        let read = || -> io::Result<_> {
            let word: Word = serde_json::from_slice(&fs::read(&path)?)?;
            Ok((fs::metadata(&path)?.modified()?, word))
        };
        match read() {
            Ok((_, word)) if word.boot == boot && word.listen != listen => {}
            Ok((since, word)) if word.boot == boot && word.stands(deadline) => {
                found.push((since, word, path))
            }
            // Of another start, or nobody can say so any more.
            _ => drop(fs::remove_file(&path)),
        }
    }
    found.sort_by_key(|(since, ..)| *since);
    let too_many = found.len().saturating_sub(limits::ROLLED_BACK_MAX);
    found.drain(..too_many).for_each(|(.., path)| drop(fs::remove_file(path)));
    Ok(found.into_iter().map(|(_, word, _)| (SessionId(word.session), SessionSecret(word.secret))).collect())
}

impl Word {
    /// Whether nothing has run; a CRIU that was let go on has to say so, and may until then.
    fn stands(&self, deadline: Instant) -> bool {
        let Some(dir) = &self.lifted else { return true };
        loop {
            match barrier::word(dir) {
                barrier::Word::Failed => return true,
                barrier::Word::None if dir.exists() && Instant::now() < deadline => {
                    std::thread::sleep(limits::WORD_LOOK);
                }
                // Somebody has removed it, or it was killed as well: that it has not run is not known.
                _ => return false,
            }
        }
    }
}

fn boot() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dir: &StateDir, number: u8, listen: &str) -> StateConfig {
        let session = Some((SessionId([number; 16]), SessionSecret([number + 100; 16])));
        StateConfig { dir: dir.clone(), listen: listen.into(), link: Vec::new(), session }
    }

    #[test]
    fn what_was_left_and_not_taken_back_is_found_by_who_listens_there() {
        let place = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&place.path().join("state")).unwrap();
        for (number, listen) in [(1, "a:1"), (2, "a:1"), (3, "a:2")] {
            leave(&state(&dir, number, listen)).unwrap();
        }
        take_back(&dir, SessionId([1; 16])).unwrap();
        take_back(&dir, SessionId([1; 16])).unwrap();
        assert_eq!(find(&dir, "a:1").unwrap(), [(SessionId([2; 16]), SessionSecret([102; 16]))]);
        assert_eq!(find(&dir, "a:2").unwrap().len(), 1);
        assert!(find(&dir, "a:3").unwrap().is_empty());
    }

    #[test]
    fn what_is_not_whole_or_of_another_start_says_nothing() {
        let place = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&place.path().join("state")).unwrap();
        leave(&state(&dir, 1, "a:1")).unwrap();
        let path = dir.file(SessionId([1; 16]), KIND);
        let whole = fs::read_to_string(&path).unwrap();
        let old = whole.replace(boot().unwrap().trim(), "before");
        assert_ne!(old, whole);
        for said in [old.as_str(), &whole[..whole.len() / 2], ""] {
            fs::write(&path, said).unwrap();
            assert!(find(&dir, "a:1").unwrap().is_empty());
            assert!(!path.exists());
        }
    }
    #[test]
    fn behind_the_barrier_criu_has_the_last_word() {
        let place = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&place.path().join("state")).unwrap();
        let state = state(&dir, 1, "a:1");
        let work = |name: &str| {
            let path = place.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (failed, resumed) = (work("failed"), work("resumed"));
        for path in [&failed, &resumed] {
            fs::write(path.join(barrier::LOG), "Error (criu/cr-restore.c:1): Restoring FAILED.\n").unwrap();
        }
        fs::write(resumed.join("resumed"), "").unwrap();
        for (path, stands) in [(failed, true), (resumed, false), (place.path().join("removed"), false)] {
            leave(&state).unwrap();
            lift(&state, &path).unwrap();
            assert_eq!(find(&dir, "a:1").unwrap().len(), usize::from(stands), "{path:?}");
            assert_eq!(dir.file(SessionId([1; 16]), KIND).exists(), stands);
        }
    }

    #[test]
    fn a_criu_that_is_still_at_work_is_waited_for() {
        let place = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&place.path().join("state")).unwrap();
        let work = place.path().join("work");
        fs::create_dir(&work).unwrap();
        lift(&state(&dir, 1, "a:1"), &work).unwrap();
        let follower = std::thread::spawn({
            let dir = dir.clone();
            move || find(&dir, "a:1").unwrap()
        });
        fs::write(work.join(barrier::LOG), "Restoring FAILED").unwrap();
        assert_eq!(follower.join().unwrap().len(), 1);
    }
}
