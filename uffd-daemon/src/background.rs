//! Installing what nobody waits for, slice by slice: demand goes first, and a changing address space is waited out.

use std::io;
use std::time::{Duration, Instant};

use crate::limits;
use crate::pages::{Arrival, Blocked};
use crate::tree::{TaskFamily, Tree};

/// Has `install` put the pages `first..end` of a family where they are missing, until it could.
///
/// # Errors
/// An errno from the kernel that is no ordinary outcome.
pub fn install_slice(
    tree: &Tree,
    position: usize,
    (first, end): (u64, u64),
    mut install: impl FnMut(&mut TaskFamily) -> io::Result<Arrival>,
) -> io::Result<()> {
    const NAP: Duration = Duration::from_micros(100);
    const YIELDS: u32 = 50;
    let begun = Instant::now();
    let mut tries = 0;
    loop {
        while tree.demand_waits() && tries < YIELDS {
            // Demand goes first; the bound keeps a fault on a lost link from stopping everything else.
            tries += 1;
            std::thread::yield_now();
        }
        let blocked = match install(&mut tree.lock_last(position))? {
            Arrival::Settled => return Ok(()),
            Arrival::Blocked(blocked) => blocked,
        };
        if blocked == Blocked::Unregistered && begun.elapsed() > limits::UNREGISTERED_PATIENCE {
            let mut family = tree.lock_last(position);
            tracing::error!(task = %family.task(), first, pages = end - first, "area lost without an event");
            family.give_up(first, end);
            return Ok(());
        }
        // The fault loop reads the event that is in the way; a fork of a large task takes a while.
        tries += 1;
        if tries < YIELDS { std::thread::yield_now() } else { std::thread::sleep(NAP) }
    }
}
