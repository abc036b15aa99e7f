//! A thread with its stack pointer, or its registers, as a test wants them.

use std::sync::atomic::AtomicBool;

/// Spins with the stack pointer on the first byte of a page until `stop`.
#[cfg(target_arch = "x86_64")]
pub fn spin_on_page_boundary(stop: &AtomicBool) {
    // SAFETY: the stack pointer moves down by less than a page, into the unused part of a thread's stack, and is
    // back before the block ends; nothing is pushed in between, and signal frames go below it; `stop` outlives
    // the block.
    unsafe {
        std::arch::asm!(
            "mov {saved}, rsp",
            "and rsp, -4096",
            "2:",
            "pause",
            "cmp byte ptr [{stop}], 0",
            "je 2b",
            "mov rsp, {saved}",
            saved = out(reg) _,
            stop = in(reg) stop.as_ptr(),
        );
    }
}

/// Spins with patterns in vector and general registers until `stop`; whether they were still there at the end.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub fn spin_with_patterns(stop: &AtomicBool) -> bool {
    const PATTERN: u64 = 0x0123_4567_89ab_cdef;
    let (mut first, mut last, mut r8, mut r15) = (0_u64, 0_u64, 0_u64, 0_u64);
    // SAFETY: reads `stop`, which outlives the block; touches no other memory, no stack, and only registers that are
    // named as written.
    unsafe {
        std::arch::asm!(
            "mov r8, {pattern}",
            "mov r15, {pattern}",
            "movq xmm0, {pattern}",
            "movq xmm15, {pattern}",
            "2:",
            "pause",
            "cmp byte ptr [{stop}], 0",
            "je 2b",
            "movq {first}, xmm0",
            "movq {last}, xmm15",
            pattern = in(reg) PATTERN,
            stop = in(reg) stop.as_ptr(),
            first = out(reg) first,
            last = out(reg) last,
            out("r8") r8,
            out("r15") r15,
            out("xmm0") _,
            out("xmm15") _,
            options(nostack),
        );
    }
    [first, last, r8, r15] == [PATTERN; 4]
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn stops() {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| spin_on_page_boundary(&stop));
            stop.store(true, Ordering::Relaxed);
            thread.join().unwrap();
            stop.store(false, Ordering::Relaxed);
            let thread = scope.spawn(|| spin_with_patterns(&stop));
            stop.store(true, Ordering::Relaxed);
            assert!(thread.join().unwrap());
        });
    }
}
