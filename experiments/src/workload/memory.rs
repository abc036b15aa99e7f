//! Memory that a host gave its guest long ago.

use std::hint::black_box;

/// Touches `mib` MiB of memory and frees them. A guest that reports free pages to its host has to get them back when
/// they are used again, which can take several times as long as installing a page: whoever is measured next finds
/// memory that is there, and not as much of it as the run before happened to leave.
pub fn touch_and_free(mib: usize) {
    drop(black_box(vec![1u8; mib << 20]));
}
