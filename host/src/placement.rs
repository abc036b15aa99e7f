//! Which processors a thread may run on.
//!
//! A fault is quick when everything it needs stays on the processor that the faulting thread leaves: another one
//! has to be woken, or is taken by somebody. So the threads of the fault path go there, and the push goes elsewhere
//! as long as there are faults.

use std::fs;
use std::io;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};

/// A set of processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processors(CpuSet);

impl Processors {
    /// None at all.
    #[must_use]
    pub fn none() -> Self {
        Self(CpuSet::new())
    }

    /// Those that the calling thread may use: what the operator allows.
    ///
    /// # Errors
    /// The errno of `sched_getaffinity(2)`.
    pub fn allowed() -> io::Result<Self> {
        Ok(Self(sched_getaffinity(Pid::from_raw(0))?))
    }

    /// Adds one; a number beyond what the system call knows is left out.
    pub fn add(&mut self, cpu: usize) {
        let _ = self.0.set(cpu);
    }

    /// Their numbers, rising.
    pub fn list(self) -> impl Iterator<Item = usize> {
        (0..CpuSet::count()).filter(move |cpu| self.0.is_set(*cpu).unwrap_or(false))
    }

    /// The only one, if there is just one.
    #[must_use]
    pub fn only(self) -> Option<usize> {
        let mut list = self.list();
        list.next().filter(|_| list.next().is_none())
    }

    /// Those of `self` without `others`; all of `self` if that leaves none.
    #[must_use]
    pub fn without(self, others: Self) -> Self {
        let mut rest = Self::none();
        self.list().filter(|cpu| !others.0.is_set(*cpu).unwrap_or(false)).for_each(|cpu| rest.add(cpu));
        if rest == Self::none() { self } else { rest }
    }

    /// Just `cpu`, if it is one of `self`; all of `self` otherwise.
    #[must_use]
    pub fn just(self, cpu: Option<usize>) -> Self {
        let mut just = Self::none();
        cpu.filter(|cpu| self.0.is_set(*cpu).unwrap_or(false)).into_iter().for_each(|cpu| just.add(cpu));
        if just == Self::none() { self } else { just }
    }

    /// Keeps a thread of this process there; 0 is the calling one.
    ///
    /// # Errors
    /// `ESRCH` if it has ended.
    pub fn keep(self, thread: i32) -> io::Result<()> {
        Ok(sched_setaffinity(Pid::from_raw(thread), &self.0)?)
    }
}

/// The calling thread's id, for [`Processors::keep`].
#[must_use]
pub fn this_thread() -> i32 {
    gettid().as_raw()
}

/// The ids of a process's threads, for [`Processors::keep`]; none if it has ended.
pub fn threads_of(pid: u32) -> impl Iterator<Item = i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Adds the processors of a process's threads that run, or wait for a page of a userfaultfd. `process` is its
/// directory in a /proc. Of a process with more than `most` threads, none: then they are everywhere.
///
/// # Errors
/// The errno of reading the directory.
pub fn add_processors_of(process: &Path, most: usize, found: &mut Processors) -> io::Result<()> {
    let threads: Vec<_> = fs::read_dir(process.join("task"))?.flatten().take(most + 1).collect();
    if threads.len() > most {
        return Ok(());
    }
    for thread in threads {
        // One that ended meanwhile runs nowhere.
        let Ok(stat) = fs::read_to_string(thread.path().join("stat")) else { continue };
        let Some((state, cpu)) = state_and_processor(&stat) else { continue };
        let wait = || fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
        if state == 'R' || wait() == "handle_userfault" {
            found.add(cpu);
        }
    }
    Ok(())
}

/// The state letter, and the processor that a thread was last on: fields 3 and 39 of a `stat`.
fn state_and_processor(stat: &str) -> Option<(char, usize)> {
    // The name, field 2, may hold anything; the last parenthesis ends it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(35)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_state_and_processor_behind_any_name() {
        let fields: Vec<String> = (4..53).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) b (c) R {}", fields.join(" "));
        assert_eq!(state_and_processor(&stat), Some(('R', 39)));
        assert_eq!(state_and_processor("7 (a) R 1 2"), None);
    }

    #[test]
    fn sets_are_never_left_empty() {
        let of = |cpus: &[usize]| {
            let mut set = Processors::none();
            cpus.iter().for_each(|cpu| set.add(*cpu));
            set
        };
        assert_eq!(of(&[0, 1, 2]).without(of(&[1])), of(&[0, 2]));
        assert_eq!(of(&[0, 1]).without(of(&[0, 1, 5])), of(&[0, 1]));
        assert_eq!(of(&[0, 1]).just(Some(1)), of(&[1]));
        assert_eq!(of(&[0, 1]).just(Some(4)), of(&[0, 1]));
        assert_eq!(of(&[0, 1]).just(None), of(&[0, 1]));
        assert_eq!((of(&[3]).only(), of(&[3, 4]).only(), of(&[]).only()), (Some(3), None, None));
    }

    #[test]
    fn a_thread_is_kept_where_it_is_put() {
        let thread = std::thread::spawn(|| {
            let allowed = Processors::allowed().unwrap();
            let cpu = allowed.list().next();
            allowed.just(cpu).keep(0).unwrap();
            assert_eq!(Processors::allowed().unwrap().only(), cpu);
            let mut found = Processors::none();
            add_processors_of(Path::new("/proc/self"), 1000, &mut found).unwrap();
            assert!(found.list().any(|found| Some(found) == cpu));
        });
        thread.join().unwrap();
    }
}
