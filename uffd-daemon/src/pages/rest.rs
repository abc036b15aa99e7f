//! Changes of a family's spaces: each waits until its space is at rest (`under_way.rs`).

use std::io;

use kernel::uffd::Probe;
use protocol::units::TaskAddr;

use super::family::{Family, Member, SpaceId};
use super::installer::Installer;
use super::space::Space;
use super::under_way::{ANYWHERE, Child, Order, What, find_order, may_differ, play};

/// Whether a space is at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Something is under way: try again.
    Changing,
    /// It is; what was read took effect in the order of its events.
    AsRead,
    /// It is; what was read took effect in this order.
    Ordered(Order),
}

impl<I: Installer> Family<I> {
    /// Whether a change under way leaves in doubt what belongs at `at`.
    #[must_use]
    pub fn is_in_doubt(&self, id: SpaceId, at: TaskAddr) -> bool {
        self.get(id).is_some_and(|member| member.is_in_doubt(at))
    }

    /// The task changed the space. A fork is told as [`Family::forked`]. Until the space is at rest, see [`Family::rest`],
    /// nothing is installed in it.
    pub fn changed(&mut self, id: SpaceId, what: What) {
        let Some(member) = self.member(id) else { return };
        match what {
            // Whatever it may have to do with was read before.
            What::Removed { start, end } if !member.is_changing() => member.space.remove(start, end),
            _ => member.under_way.push(what),
        }
    }

    /// The task forked: the child misses what the parent missed. What that was is known once the parent is at rest.
    pub fn forked(&mut self, parent: SpaceId, child: I) -> Option<SpaceId> {
        self.member(parent)?;
        Some(self.forked_again(parent, Some(child)))
    }

    /// Whether changes are perhaps under way in a space, or in those that it was forked off.
    #[must_use]
    pub fn is_changing(&self, id: SpaceId) -> bool {
        self.get(id).is_some_and(Member::is_changing)
    }

    /// Applies what was read of a space, if nothing is under way there any more.
    ///
    /// # Errors
    /// An errno from the kernel that is no ordinary outcome.
    pub fn rest(&mut self, id: SpaceId) -> io::Result<Rest> {
        let Some(member) = self.get(id) else { return Ok(Rest::AsRead) };
        if !member.is_changing() {
            return Ok(Rest::AsRead);
        }
        if member.unborn_of.is_some() {
            return Ok(Rest::Changing);
        }
        // Before Linux 5.13 everything seems to be registered.
        let tells = match member.installer.probe(ANYWHERE)? {
            Probe::Changing => return Ok(Rest::Changing),
            Probe::Registered => false,
            Probe::Unregistered | Probe::TaskGone => true,
        };
        let changes = &member.under_way;
        let mut order = Order::as_read(changes.len());
        if tells && member.space.remote_pages() > 0 && may_differ(changes) {
            let children = changes.iter().filter_map(|what| match what {
                What::Forked { child } => Some(Child { id: *child, changes: &self.get(*child)?.under_way }),
                _ => None,
            });
            let probe = |who: Option<SpaceId>, at| {
                let asked = who.map_or(Some(member), |child| self.get(child));
                asked.map_or(Ok(Probe::TaskGone), |asked| asked.installer.probe(at))
            };
            match find_order(&member.space, changes, &children.collect::<Vec<_>>(), probe)? {
                Some(found) => order = found,
                None => return Ok(Rest::Changing),
            }
        }
        self.rested(id, &order);
        Ok(if order.is_as_read() { Rest::AsRead } else { Rest::Ordered(order) })
    }

    /// As [`Family::rest`], where no order has to be found, and recorded; false otherwise.
    pub(super) fn rest_alone(&mut self, id: SpaceId) -> io::Result<bool> {
        let differs = self.get(id).is_some_and(|member| may_differ(&member.under_way));
        Ok(!differs && self.rest(id)? == Rest::AsRead)
    }

    /// Applies what was read of a space in this order.
    fn rested(&mut self, id: SpaceId, order: &Order) {
        let Some(member) = self.member(id) else { return };
        let changes = std::mem::take(&mut member.under_way);
        let mut children = Vec::new();
        play(&mut member.space, &changes, order, |child, space| children.push((child, space.clone())));
        for (child, space) in children {
            if let Some(child) = self.member(child) {
                (child.space, child.unborn_of) = (space, None);
            }
        }
    }

    /// A space is at rest, from a record that has no order for it: what was read before took effect as it was read.
    pub fn rested_as_read(&mut self, id: SpaceId) {
        if self.get(id).is_some_and(|member| !member.under_way.is_empty()) {
            self.rested_again(id, Order::as_read);
        }
    }

    /// As [`Family::rested_as_read`], in this order.
    pub fn rested_in_order(&mut self, id: SpaceId, packed: u64) {
        self.rested_again(id, |count| Order::unpacked(packed, count));
    }

    fn rested_again(&mut self, id: SpaceId, order: impl FnOnce(usize) -> Order) {
        // Who is at rest had begun.
        if let Some(parent) = self.get(id).and_then(|member| member.unborn_of) {
            self.rested_as_read(parent);
        }
        let count = self.get(id).map_or(0, |member| member.under_way.len());
        self.rested(id, &order(count));
    }

    /// As [`Family::restored`], from a record; without an installer the space keeps its number and is not served.
    pub fn restored_again(&mut self, installer: Option<I>) -> SpaceId {
        let space = Space::restored(&self.map);
        self.add(Some(space).zip(installer), None)
    }

    /// As [`Family::forked`], from a record.
    pub fn forked_again(&mut self, parent: SpaceId, installer: Option<I>) -> SpaceId {
        let space = self.member(parent).is_some().then(|| Space::unknown(self.map.pages));
        let child = self.add(space.zip(installer), Some(parent));
        self.changed(parent, What::Forked { child });
        child
    }
}
