//! Questions that were asked and not answered yet, by number.

use std::time::Instant;

use protocol::units::TaskAddr;

use crate::pages::{Origin, SpaceId};

/// Why a question was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A thread waits.
    Demand,
    /// A thread will need it soon.
    Prefetch,
    /// Nobody pushes, so it is fetched some time.
    Background,
}

impl Purpose {
    /// How the pages of the answer count.
    #[must_use]
    pub const fn origin(self) -> Origin {
        match self {
            Self::Demand | Self::Prefetch => Origin::Demand,
            Self::Background => Origin::Push,
        }
    }
}

/// Who waits for an answer.
#[derive(Clone, Copy, Debug)]
pub struct Waiter {
    /// In which space.
    pub space: SpaceId,
    /// Where.
    pub at: TaskAddr,
}

/// A question.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Position of the family.
    pub family: usize,
    /// Index of the first page within the family.
    pub first: u64,
    /// Number of pages.
    pub pages: u64,
    /// What for.
    pub purpose: Purpose,
    /// Who waits, for a fault.
    pub waiter: Option<Waiter>,
    /// When the fault was read.
    pub at: Instant,
}

/// Questions by number. A number is a slot and how often it was used, so that a late or forged answer
/// never meets another question.
#[derive(Debug, Default)]
pub struct InFlight {
    slots: Vec<(u32, Option<Asked>)>,
    free: Vec<u32>,
    demands: u32,
}

impl InFlight {
    /// Takes a question in and numbers it.
    pub fn insert(&mut self, asked: Asked) -> u64 {
        self.demands += u32::from(asked.purpose == Purpose::Demand);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let (uses, place) = &mut self.slots[slot as usize];
        *uses = uses.wrapping_add(1);
        *place = Some(asked);
        u64::from(*uses) << 32 | u64::from(slot)
    }

    /// The question with this number, answered.
    pub fn remove(&mut self, id: u64) -> Option<Asked> {
        let slot = u32::try_from(id & u64::from(u32::MAX)).ok()?;
        let (uses, place) = self.slots.get_mut(slot as usize)?;
        if u64::from(*uses) != id >> 32 {
            return None;
        }
        let asked = place.take()?;
        self.free.push(slot);
        self.demands -= u32::from(asked.purpose == Purpose::Demand);
        Some(asked)
    }

    /// Every question that was not answered, with its number.
    pub fn open(&self) -> impl Iterator<Item = (u64, &Asked)> {
        (0_u64..).zip(&self.slots).filter_map(|(slot, (uses, asked))| {
            asked.as_ref().map(|asked| (u64::from(*uses) << 32 | slot, asked))
        })
    }

    /// Faults among them.
    #[must_use]
    pub const fn demands(&self) -> u32 {
        self.demands
    }

    /// Whether every question was answered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_good_once() {
        let asked = Asked {
            family: 0,
            first: 1,
            pages: 1,
            purpose: Purpose::Demand,
            waiter: None,
            at: Instant::now(),
        };
        let mut flight = InFlight::default();
        let first = flight.insert(asked);
        assert_eq!(flight.demands(), 1);
        assert!(flight.remove(first).is_some());
        assert!(flight.is_empty());
        let second = flight.insert(Asked { first: 2, ..asked });
        assert!(flight.remove(first).is_none(), "the slot was used again");
        assert!(flight.remove(99).is_none());
        assert_eq!(flight.open().map(|(id, asked)| (id, asked.first)).collect::<Vec<_>>(), [(second, 2)]);
        assert_eq!(flight.remove(second).unwrap().first, 2);
    }
}
