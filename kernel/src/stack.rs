//! A thread with its stack pointer where a test wants it.

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
        });
    }
}
