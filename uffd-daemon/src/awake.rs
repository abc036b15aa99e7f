//! Keeps processors awake while faults come thick and fast.
//!
//! A processor with nothing to do is halted, and waking it costs more than all the work on a fault: a few microseconds on
//! bare metal, 30 to 50 in a virtual machine, and up to four times per fault. So as long as faults are frequent, a thread
//! of the lowest class (`SCHED_IDLE`) spins on each processor. It runs only where nobody else wants to, and whoever wakes
//! takes the processor from it at once; but the processor is awake.
//!
//! ```text
//!   Resting ──8 faults within 5 ms──▶ Spinning ──10 ms without so many──▶ Resting
//! ```
//!
//! There is no spinning beside a push, which keeps processors awake by itself and shares them badly: its threads give way
//! to a fault by yielding, and then wait for the spinner. Nor for many faulting threads: the scheduler does not move one that
//! waits for its turn to a processor that spins. The source cannot tell one thread from many, and does not spin.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::placement::Processors;

/// How long faults are counted before it is decided whether they are frequent.
const COUNTED: Duration = Duration::from_millis(5);
/// Faults within that time that are frequent: one per 600 us. Below, spinning costs more time than it saves.
const FREQUENT: u32 = 8;
/// Most threads that wait at once for whom it is worth while.
const FEW: u32 = 2;
/// How long a decision to spin holds: the next one comes before.
const HELD: Duration = Duration::from_millis(10);
/// Most processors that are kept awake. With more, those that are needed for a fault are few of many; where they
/// are is not known.
const PROCESSORS_MAX: usize = 4;
/// Pauses between two looks at the clock: some microseconds.
const PAUSES: u32 = 64;

/// Decides for the thread that resolves faults on this side whether processors are kept awake, and does it. Dropping
/// it ends that.
#[derive(Debug)]
pub struct Awake {
    shared: Arc<Shared>,
    spinners: Vec<JoinHandle<()>>,
    since: Instant,
    faults: u32,
    /// Many threads have waited since then.
    crowded: bool,
    /// Bytes that had been pushed at `since`.
    pushed: u64,
}

#[derive(Debug)]
struct Shared {
    began: Instant,
    /// Microseconds since `began`.
    until: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn at(&self, when: Instant) -> u64 {
        u64::try_from(when.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
    }

    fn spin(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            while self.at(Instant::now()) < self.until.load(Ordering::Relaxed) {
                (0..PAUSES).for_each(|_| std::hint::spin_loop());
            }
            std::thread::park();
        }
    }
}

impl Awake {
    /// For the processors that the calling thread may use. It never spins where that would be at the cost of others:
    /// with one processor or more than a few, or where processor time is limited and spinning would use it up.
    #[must_use]
    pub fn new() -> Self {
        let now = Instant::now();
        let shared = Arc::new(Shared { began: now, until: 0.into(), stop: false.into() });
        let processors = Processors::allowed().unwrap_or_else(|_| Processors::none());
        let count = processors.list().count();
        let mut spinners = Vec::new();
        if (2..=PROCESSORS_MAX).contains(&count) && !is_time_limited() {
            spinners.extend(processors.list().filter_map(|cpu| {
                let shared = shared.clone();
                let spinner = std::thread::Builder::new().name("awake".into());
                let spin = move || {
                    // Without the lowest class it would be in everybody's way.
                    match kernel::sched::set_idle().and_then(|()| processors.just(Some(cpu)).keep(0)) {
                        Ok(()) => shared.spin(),
                        Err(error) => tracing::debug!(cpu, "not kept awake: {error}"),
                    }
                };
                spinner.spawn(spin).ok()
            }));
        }
        Self { shared, spinners, since: now, faults: 0, crowded: false, pushed: 0 }
    }

    /// Notes a fault at `now`, when `waiting` faults have no answer yet, and `pushed` bytes came unasked so far.
    pub fn fault(&mut self, waiting: u32, now: Instant, pushed: u64) {
        if waiting > FEW && !self.crowded {
            self.crowded = true;
            self.shared.until.store(0, Ordering::Relaxed);
        }
        if now.saturating_duration_since(self.since) < COUNTED {
            self.faults = self.faults.saturating_add(1);
            return;
        }
        if self.faults >= FREQUENT && !self.crowded && pushed == self.pushed {
            self.shared.until.store(self.shared.at(now + HELD), Ordering::Relaxed);
            // Costs next to nothing where it spins already.
            self.spinners.iter().for_each(|spinner| spinner.thread().unpark());
        }
        (self.since, self.faults, self.pushed) = (now, 1, pushed);
        self.crowded = waiting > FEW;
    }
}

impl Default for Awake {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.until.store(0, Ordering::Relaxed);
        for spinner in self.spinners.drain(..) {
            spinner.thread().unpark();
            let _ = spinner.join();
        }
    }
}

/// Whether a control group limits the processor time of this process.
fn is_time_limited() -> bool {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else { return false };
    is_limited_in(Path::new("/sys/fs/cgroup"), group)
}

/// Whether `group`, or one that it is in, has a limit in its `cpu.max`: `max 100000` is none.
fn is_limited_in(root: &Path, group: &str) -> bool {
    let limited = |dir: &Path| {
        fs::read_to_string(dir.join("cpu.max")).is_ok_and(|limit| !limit.trim_start().starts_with("max"))
    };
    root.join(group).ancestors().take_while(|dir| dir.starts_with(root)).any(limited)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When what was decided last ends to hold, in microseconds.
    fn until(awake: &Awake) -> u64 {
        awake.shared.until.load(Ordering::Relaxed)
    }

    /// As many faults as are frequent, `waiting` at once, from `begun` on, and the one that ends the counting.
    fn count(awake: &mut Awake, begun: Instant, waiting: u32, pushed: [u64; 2]) {
        (0..FREQUENT).for_each(|_| awake.fault(waiting, begun, pushed[0]));
        awake.fault(1, begun + COUNTED, pushed[1]);
    }

    #[test]
    fn frequent_faults_keep_processors_awake_for_a_while() {
        let mut awake = Awake::new();
        let begun = awake.since;
        let ms = Duration::from_millis;
        (0..20).for_each(|at| awake.fault(1, begun + ms(at), 0));
        assert_eq!(until(&awake), 0, "one per millisecond is not frequent");
        count(&mut awake, begun + ms(30), 1, [0, 0]);
        assert_eq!(until(&awake), awake.shared.at(begun + ms(30) + COUNTED + HELD));
        count(&mut awake, begun + ms(40), FEW + 1, [0, 0]);
        assert_eq!(until(&awake), 0, "not among many threads");
        count(&mut awake, begun + ms(50), 1, [0, 4096]);
        assert_eq!(until(&awake), 0, "not beside a push");
        count(&mut awake, begun + ms(60), FEW, [4096, 4096]);
        assert!(until(&awake) > 0);
    }

    #[test]
    fn spinners_end_with_what_started_them() {
        let mut awake = Awake::new();
        let begun = awake.since;
        count(&mut awake, begun, 1, [0, 0]);
        drop(awake);
    }

    #[test]
    fn a_limit_of_any_group_above_counts() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b")).unwrap();
        let set =
            |group: &str, limit: &str| fs::write(root.path().join(group).join("cpu.max"), limit).unwrap();
        set("a", "max 100000\n");
        set("a/b", "max 100000\n");
        assert!(!is_limited_in(root.path(), "a/b"));
        set("a", "50000 100000\n");
        assert!(is_limited_in(root.path(), "a/b") && is_limited_in(root.path(), "a"));
        assert!(!is_limited_in(root.path(), ""));
    }
}
