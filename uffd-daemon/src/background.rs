//! Installing what nobody waits for, slice by slice: demand goes first, and a changing address space is waited out.

use std::io;
use std::time::{Duration, Instant};

use crate::limits;
use crate::pages::{Blocked, Family, Installer};
use crate::tree::Tree;

/// What came of installing a piece.
pub enum Piece {
    /// It was the last.
    Last,
    /// There are more: whoever waits for the family comes first.
    More,
    /// The kernel did not take the pages `first..end` now.
    Blocked {
        /// Why.
        why: Blocked,
        /// The first of them.
        first: u64,
        /// Behind the last.
        end: u64,
    },
}

/// Has `install` put pages of a family where they are missing, piece by piece, until it has nothing left.
///
/// # Errors
/// An errno from the kernel that is no ordinary outcome.
pub fn install_slice<I: Installer>(
    tree: &Tree<I>,
    position: usize,
    mut install: impl FnMut(&mut Family<I>) -> io::Result<Piece>,
) -> io::Result<()> {
    const NAP: Duration = Duration::from_micros(100);
    const YIELDS: u32 = 50;
    let begun = Instant::now();
    let mut tries = 0;
    loop {
        while tree.demand_waits() && tries < 5 {
            // Demand goes first; the bound keeps a fault on a lost link from stopping everything else.
            tries += 1;
            std::thread::yield_now();
        }
        let (why, first, end) = loop {
            match install(&mut tree.lock_last(position))? {
                Piece::Last => return Ok(()),
                Piece::More => {}
                Piece::Blocked { why, first, end } => break (why, first, end),
            }
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
