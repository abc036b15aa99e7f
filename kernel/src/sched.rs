//! How soon a thread gets the processor.

use std::io;

/// `struct sched_attr`, first version with utilisation clamps (56 bytes).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
    util_min: u32,
    util_max: u32,
}
const _: () = assert!(size_of::<SchedAttr>() == 56);

const SCHED_OTHER: u32 = 0;
const SCHED_FIFO: u32 = 1;
const SCHED_BATCH: u32 = 3;
const SCHED_IDLE: u32 = 5;

/// Gives the calling thread a time slice under the normal policy; its niceness stays.
///
/// A thread that wakes with a shorter slice than the running one's takes the processor at once (kernels from
/// 6.12 on); with equal slices the running thread finishes its own first, up to some milliseconds. Older
/// kernels ignore the slice.
///
/// # Errors
/// The errno of `sched_setattr(2)`.
pub fn set_slice(slice_ns: u64) -> io::Result<()> {
    set(SCHED_OTHER, slice_ns)
}

/// Gives the calling thread a time slice under the policy of work that nobody waits for: when it wakes it does not take
/// the processor from whoever runs, but whoever wakes takes it as with [`set_slice`]. Its niceness stays.
///
/// # Errors
/// The errno of `sched_setattr(2)`.
pub fn set_batch(slice_ns: u64) -> io::Result<()> {
    set(SCHED_BATCH, slice_ns)
}

/// Puts the calling thread into the lowest class: it runs where nobody else wants to, and whoever wakes takes the
/// processor from it at once. Its niceness stays.
///
/// # Errors
/// The errno of `sched_setattr(2)`.
pub fn set_idle() -> io::Result<()> {
    set(SCHED_IDLE, 0)
}

fn set(policy: u32, slice_ns: u64) -> io::Result<()> {
    // SAFETY: no pointers; 0 is the calling thread, for which the call cannot fail.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    SchedAttr::of(policy, slice_ns, nice).apply()
}

impl SchedAttr {
    const fn of(policy: u32, slice_ns: u64, nice: i32) -> Self {
        Self {
            size: 56,
            policy,
            flags: 0,
            nice,
            priority: 0,
            runtime_ns: slice_ns,
            deadline_ns: 0,
            period_ns: 0,
            util_min: 0,
            util_max: 0,
        }
    }

    /// For the calling thread.
    fn apply(&self) -> io::Result<()> {
        // SAFETY: the struct lives through the call and `size` is its size; 0 is the calling thread; the kernel
        // only reads it.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(self), 0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Does something that takes microseconds before any thread of the normal policies gets the processor: as `SCHED_FIFO` where that is
/// allowed, otherwise as the calling thread is.
pub fn urgently<T>(what: impl FnOnce() -> T) -> T {
    let mut before = SchedAttr::of(SCHED_OTHER, 0, 0);
    // SAFETY: the struct lives through the call, which writes at most the size that it is told; any bits are a valid one; 0 is
    // the calling thread.
    let known = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut before, 56, 0) } == 0;
    let urgent = known && SchedAttr { priority: 1, ..SchedAttr::of(SCHED_FIFO, 0, 0) }.apply().is_ok();
    let done = what();
    if urgent {
        // What it was before is allowed.
        let _ = before.apply();
    }
    done
}

/// Gives the calling thread another niceness: from 0 (its share) to 19 (what others leave).
///
/// # Errors
/// The errno of `setpriority(2)`.
pub fn set_niceness(nice: i32) -> io::Result<()> {
    // SAFETY: no pointers; on Linux 0 is the calling thread, not its process.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_step_back_alone() {
        let of = |tid: i32| {
            let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap();
            let (_, rest) = stat.rsplit_once(')').unwrap();
            rest.split_whitespace().nth(16).unwrap().parse::<i32>().unwrap()
        };
        let before = of(nix::unistd::gettid().as_raw());
        std::thread::spawn(move || {
            set_niceness(before + 3).unwrap();
            assert_eq!(of(nix::unistd::gettid().as_raw()), before + 3);
        })
        .join()
        .unwrap();
        assert_eq!(of(nix::unistd::gettid().as_raw()), before);
    }

    #[test]
    fn a_thread_is_what_it_was_behind_something_urgent() {
        let now = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields: Vec<i64> =
                stat.rsplit_once(')').unwrap().1.split_whitespace().skip(1).flat_map(str::parse).collect();
            // Niceness and policy, fields 19 and 41.
            (fields[15], fields[37])
        };
        std::thread::spawn(move || {
            set_niceness(7).unwrap();
            let before = now();
            let within = urgently(now);
            assert!([i64::from(SCHED_FIFO), before.1].contains(&within.1), "{within:?}");
            assert_eq!((now(), now().0), (before, 7));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_thread_may_shorten_its_own_slice() {
        std::thread::spawn(|| set_slice(100_000).unwrap()).join().unwrap();
    }

    #[test]
    fn a_thread_may_leave_the_processor_to_everybody() {
        let of_a_thread = || {
            set_idle().unwrap();
            std::fs::read_to_string("/proc/thread-self/sched").unwrap_or_default()
        };
        let sched = std::thread::spawn(of_a_thread).join().unwrap();
        let policy = sched
            .lines()
            .find_map(|line| line.strip_prefix("policy")?.split(':').nth(1)?.trim().parse().ok());
        // Kernels without that file are said to have done it by not failing.
        assert!(policy.is_none_or(|policy: u32| policy == SCHED_IDLE), "{sched}");
    }
}
