//! Installing what nobody waits for, slice by slice: demand goes first, and a changing address space is waited out.

use std::io;
use std::time::{Duration, Instant};

use crate::limits;
use crate::pages::{Arrival, Blocked};
use crate::tree::{TaskFamily, Tree};

/// Pages that could not be installed, and why.
pub struct Hindrance {
    /// What the kernel said.
    pub why: Blocked,
    /// The first of them.
    pub first: u64,
    /// Behind the last.
    pub end: u64,
}

impl Hindrance {
    /// Of an arrival of the pages `first..end`, if they did not settle.
    #[must_use]
    pub const fn of(arrival: Arrival, (first, end): (u64, u64)) -> Option<Self> {
        match arrival {
            Arrival::Settled => None,
            Arrival::Blocked(why) => Some(Self { why, first, end }),
        }
    }
}

/// Has `install` put pages of a family where they are missing, until nothing hinders it; it goes on where it was.
///
/// # Errors
/// An errno from the kernel that is no ordinary outcome.
pub fn install_slice(
    tree: &Tree,
    position: usize,
    mut install: impl FnMut(&mut TaskFamily) -> io::Result<Option<Hindrance>>,
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
        let Some(Hindrance { why, first, end }) = install(&mut tree.lock_last(position))? else {
            return Ok(());
        };
        if why == Blocked::Unregistered && begun.elapsed() > limits::UNREGISTERED_PATIENCE {
            let mut family = tree.lock_last(position);
            tracing::error!(task = %family.task(), first, pages = end - first, "area lost without an event");
            family.give_up(first, end);
            continue;
        }
        // The fault loop reads the event that is in the way; a fork of a large task takes a while.
        tries += 1;
        if tries < YIELDS { std::thread::yield_now() } else { std::thread::sleep(NAP) }
    }
}
