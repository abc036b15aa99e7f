//! A thread in a restartable sequence, for tests.
//!
//! A thread that is preempted between the start and the commit of such a sequence goes on at its abort handler. The
//! kernel does it by the pointer in the thread's `struct rseq`, and forgets the pointer when it finds the thread
//! elsewhere: whoever takes a thread elsewhere and back behind its back breaks the promise.

use std::sync::atomic::AtomicBool;

/// What became of a thread in a restartable sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sequence {
    /// Whenever it was in the sequence the kernel knew of it.
    Kept,
    /// It was in the sequence, and the kernel had forgotten.
    Lost,
    /// The C library has registered no `struct rseq`.
    Absent,
}

#[cfg(target_env = "gnu")]
unsafe extern "C" {
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

/// Spins inside of a restartable sequence until `stop`, entering it again whenever it is aborted.
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
#[must_use]
pub fn spin_in_sequence(stop: &AtomicBool) -> Sequence {
    // SAFETY: plain values that the C library (from 2.35 on) sets before main.
    let (offset, size) = unsafe { (__rseq_offset, __rseq_size) };
    if size == 0 {
        return Sequence::Absent;
    }
    let lost: u64;
    // SAFETY: the C library says that `struct rseq` of this thread lies at that offset from the thread pointer, which
    // is at fs:0; `rseq_cs` is at 8 in it, is for the thread itself to write, and is cleared at the end. The
    // descriptor is static, names addresses in this block only, and the signature stands before the abort handler.
    // `stop` outlives the block; no stack is used, and only named registers are written.
    unsafe {
        std::arch::asm!(
            ".pushsection .data.rel, \"aw\"",
            ".balign 32",
            "20:",
            ".long 0, 0",
            ".quad 22f, 23f - 22f, 24f",
            ".popsection",
            "mov {area}, fs:0",
            "add {area}, {offset}",
            "lea {descriptor}, [rip + 20b]",
            "xor {lost:e}, {lost:e}",
            "21:",
            "mov [{area} + 8], {descriptor}",
            "22:",
            "pause",
            "cmp [{area} + 8], {descriptor}",
            "jne 25f",
            "cmp byte ptr [{stop}], 0",
            "je 22b",
            "23:",
            "jmp 26f",
            ".byte 0x0f, 0xb9, 0x3d",
            ".long 0x53053053",
            "24:",
            "jmp 21b",
            "25:",
            "mov {lost:e}, 1",
            "26:",
            "mov qword ptr [{area} + 8], 0",
            area = out(reg) _,
            descriptor = out(reg) _,
            offset = in(reg) offset,
            stop = in(reg) stop.as_ptr(),
            lost = out(reg) lost,
            options(nostack),
        );
    }
    if lost == 0 { Sequence::Kept } else { Sequence::Lost }
}

/// Not made for this architecture or C library.
#[cfg(not(all(target_arch = "x86_64", target_env = "gnu")))]
#[must_use]
pub fn spin_in_sequence(_stop: &AtomicBool) -> Sequence {
    Sequence::Absent
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn the_kernel_keeps_its_promise() {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| spin_in_sequence(&stop));
            // Each of these threads may take its processor.
            (0..50).for_each(|_| scope.spawn(|| ()).join().unwrap());
            stop.store(true, Ordering::Relaxed);
            assert_ne!(thread.join().unwrap(), Sequence::Lost);
        });
    }
}
