//! When the source is gone for good and the operator says so: missing pages are poisoned. A thread that touches one gets
//! SIGBUS, and memory that is here stays right. Nothing reads as zero that was not.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernel::uffd::{Event, EventBuffer, Install, Uffd};
use protocol::units::pages_to_bytes;

use crate::limits;
use crate::pages::{Rest, What, in_one_area};
use crate::takeover::{ServedSpace, Taken};
use crate::tree::TaskFamily;

/// Poisons every missing page of a move that was taken over, says where, and lets the tasks go on. Returns how many.
///
/// # Errors
/// An errno of the kernel that is no ordinary outcome; `TimedOut` if an address space never stops changing.
pub fn abandon(taken: &Taken) -> io::Result<u64> {
    let mut served = taken.served.clone();
    let mut events = EventBuffer::default();
    let mut poisoned = 0;
    let mut at = 0;
    while let Some(space) = served.get(at).cloned() {
        let deadline = Instant::now() + limits::ABANDON_PATIENCE;
        loop {
            let mut family = taken.tree.lock(space.family);
            served.extend(read_events(&mut family, &space, &mut events)?);
            match poison(&mut family, &space)? {
                (pages, true) => {
                    poisoned += pages;
                    break;
                }
                (pages, false) => poisoned += pages,
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // An event that is on its way is in the way.
            drop(family);
            std::thread::sleep(Duration::from_millis(1));
        }
        at += 1;
    }
    taken.wake_all();
    Ok(poisoned)
}

/// Takes in what a task did to its address space; its new children.
fn read_events(
    family: &mut TaskFamily,
    of: &ServedSpace,
    events: &mut EventBuffer,
) -> io::Result<Vec<ServedSpace>> {
    let mut children = Vec::new();
    of.uffd.read(events, |event| match event {
        Event::Fork { child } => {
            let uffd = Arc::new(Uffd::from(child));
            let space = family.forked(of.space, uffd.clone());
            children.extend(space.map(|space| ServedSpace { family: of.family, space, uffd }));
        }
        event => What::of(&event).into_iter().for_each(|what| family.changed(of.space, what)),
    })?;
    Ok(children)
}

/// Poisons what is missing: how many pages, and whether that was all.
fn poison(family: &mut TaskFamily, of: &ServedSpace) -> io::Result<(u64, bool)> {
    let (task, end) = (family.task(), family.map().pages);
    let (mut poisoned, mut from) = (0, 0);
    if family.rest(of.space)? == Rest::Changing {
        return Ok((0, false));
    }
    while let Some(stretch) = family.space(of.space).and_then(|space| space.remote_in(from, end)) {
        let poison = |pages| of.uffd.poison(stretch.at.get(), pages_to_bytes(pages));
        let pages = match in_one_area(stretch.pages, poison)? {
            Install::Done { pages } => {
                let last = stretch.at.get() + pages_to_bytes(pages) - 1;
                tracing::error!(%task, "poisoned {pages} pages at {:#x}-{last:#x}", stretch.at.get());
                poisoned += pages;
                pages
            }
            // It arrived and was not acknowledged, or is mapped by nobody any more.
            Install::Present | Install::Unregistered => 1,
            Install::Deferred => return Ok((poisoned, false)),
            Install::TaskGone => return Ok((poisoned, true)),
        };
        family.settled_otherwise(of.space, stretch.first, pages.max(1));
        from = stretch.first + pages.max(1);
    }
    Ok((poisoned, true))
}
