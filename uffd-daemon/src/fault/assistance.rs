//! Several loops of one session: the first reads always, the others as long as many threads wait at once.

use std::sync::atomic::Ordering;

use super::{Command, FaultLoop};
use crate::limits;
use crate::pages::AddressSpace;
use crate::takeover::ServedSpace;
use crate::upstream::Upstream;

impl<U: Upstream, I: AddressSpace> FaultLoop<U, I> {
    /// Serves a space that no other loop knows yet.
    pub(super) fn serve(&mut self, space: ServedSpace<I>) {
        for other in &self.others {
            other.send(Command::Adopt(space.clone()));
        }
        self.served.push(space);
    }

    /// Serves a space that another one knows: the first loop tells all others.
    pub(super) fn adopt(&mut self, space: ServedSpace<I>) {
        let known = |served: &ServedSpace<I>| (served.family, served.space) == (space.family, space.space);
        if self.served.iter().any(known) {
            return;
        }
        // A daemon before this one may have ended in the middle of a change.
        if self.tree.lock(space.family).is_changing(space.space) {
            self.awaits_rest(space.family, space.space);
        }
        match self.number {
            0 => self.serve(space),
            _ => self.served.push(space),
        }
    }

    /// After faults were read: has the others read as well if many wait.
    pub(super) fn seek_assistance(&mut self) {
        if self.number > 0 {
            self.assists_until = self.now + limits::ASSISTANCE;
        } else if !self.others.is_empty()
            && self.now >= self.assists_until
            && self.tree.demand_outstanding.load(Ordering::Relaxed) >= limits::CROWD
        {
            // Half of it: they go on without a pause as long as there is a crowd.
            self.assists_until = self.now + limits::ASSISTANCE / 2;
            self.others.iter().for_each(|other| other.send(Command::Assist));
        }
    }
}
