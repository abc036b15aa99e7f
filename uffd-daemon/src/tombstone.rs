//! Word that nothing of a move is or will be on this host, for a daemon that follows this one.
//!
//! A source that has sent `Commit` and hears no more does not know whether its tasks run here. A daemon that has rolled back
//! says that they never did; one that is killed before it lets them run cannot. So it leaves word before it says `Prepared`,
//! and takes it back before it lifts the barrier:
//!
//! ```text
//!   leave ─▶ Prepared ─▶ ◀─ Commit ─ take back ─▶ lift the barrier ─▶ the tasks run
//!   └────── killed here, CRIU kills what it has restored ──────┘
//! ```
//!
//! A `serve` that is started again at the same address answers for it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use host::state_dir::StateDir;
use host::workdir::remove_if_there;
use protocol::wire::hello::{SessionId, SessionSecret};
use serde::{Deserialize, Serialize};

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
}

/// Leaves it.
///
/// # Errors
/// The errno of writing it.
pub fn leave(state: &StateConfig) -> io::Result<()> {
    let Some((session, secret)) = state.session else { return Ok(()) };
    let word = Word { session: session.0, secret: secret.0, listen: state.listen.clone(), boot: boot()? };
    let path = state.dir.file(session, KIND);
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(serde_json::to_writer(&file, &word)?)
}

/// Takes it back, if it was left.
///
/// # Errors
/// The errno of removing it: it stands then.
pub fn take_back(dir: &StateDir, session: SessionId) -> io::Result<()> {
    remove_if_there(&dir.file(session, KIND))
}

/// What daemons that listened at `listen` have left, the oldest first; what is too old or too much is removed.
///
/// # Errors
/// The errno of reading the directory.
pub fn find(dir: &StateDir, listen: &str) -> io::Result<Vec<(SessionId, SessionSecret)>> {
    let boot = boot()?;
    let mut found = Vec::new();
    for path in dir.files(KIND)? {
        let read = || -> io::Result<_> {
            let word: Word = serde_json::from_slice(&fs::read(&path)?)?;
            Ok((fs::metadata(&path)?.modified()?, word))
        };
        match read() {
            Ok((_, word)) if word.boot == boot && word.listen != listen => {}
            Ok((since, word)) if word.boot == boot => found.push((since, word, path)),
            // Of another start; or its daemon was killed before it was whole, and has not said `Prepared`.
            _ => drop(fs::remove_file(&path)),
        }
    }
    found.sort_by_key(|(since, ..)| *since);
    let too_many = found.len().saturating_sub(limits::ROLLED_BACK_MAX);
    found.drain(..too_many).for_each(|(.., path)| drop(fs::remove_file(path)));
    Ok(found.into_iter().map(|(_, word, _)| (SessionId(word.session), SessionSecret(word.secret))).collect())
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
        assert!(leave(&state(&dir, 1, "a:1")).is_err(), "a session is used once");
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
}
