//! Keeps the fault loop on the faulting thread's processor, and the push off it, as long as there are faults.
//!
//! A userfaultfd of CRIU does not tell which thread faulted: a thread of its own looks in /proc now and then.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use host::placement::{self, Processors};

use crate::limits;
use crate::tree::Tree;

/// Threads to steer, those that are known.
#[derive(Debug, Default)]
pub struct Steered(Mutex<Vec<i32>>);

impl Steered {
    /// The calling thread is one, until what this returns is dropped.
    #[must_use]
    pub fn this_thread(&self) -> impl Drop {
        self.thread(placement::this_thread())
    }

    /// This thread is one, until what this returns is dropped.
    #[must_use]
    pub fn thread(&self, id: i32) -> impl Drop {
        self.threads().push(id);
        Here(self, id)
    }

    fn keep(&self, to: Processors) {
        for thread in self.threads().iter() {
            // It may end right now.
            let _ = to.keep(*thread);
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<i32>> {
        // One more or less is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Here<'a>(&'a Steered, i32);

impl Drop for Here<'_> {
    fn drop(&mut self) {
        self.0.threads().retain(|thread| *thread != self.1);
    }
}

/// Steers until it is dropped.
#[derive(Debug)]
pub struct Steering {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Steering {
    /// Watches the processes with these directories in a /proc.
    #[must_use]
    pub fn start(tree: Arc<Tree>, processes: Vec<PathBuf>) -> Self {
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::Builder::new().name("steering".into()).spawn(move || {
            let Ok(allowed) = Processors::allowed() else { return };
            if allowed.only().is_some() {
                return;
            }
            let (mut demands, mut quiet, mut avoided) = (0, 0, Processors::none());
            let mut pause = limits::STEERING_PAUSE;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let faults = [&tree.demands, &tree.local_faults].map(|count| count.load(Ordering::Relaxed));
                let now = faults.iter().sum();
                quiet = if now == demands { quiet + 1 } else { 0 };
                demands = now;
                let mut found = Processors::none();
                if quiet == 0 {
                    for process in &processes {
                        // One that ended runs nowhere.
                        let _ = placement::add_processors_of(process, limits::STEERED_THREADS, &mut found);
                    }
                }
                pause = limits::STEERING_PAUSE * if quiet < limits::STEERING_MEMORY { 1 } else { 10 };
                let forgotten = quiet >= limits::STEERING_MEMORY;
                if found != avoided && (forgotten || found != Processors::none()) {
                    avoided = found;
                    for push in [&tree.push_thread, &tree.push_pump, &tree.installing_thread] {
                        push.keep(allowed.without(found));
                    }
                    tree.fault_thread.keep(allowed.just(found.only()));
                }
            }
        });
        Self { stop: Some(stop), thread: thread.ok() }
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
