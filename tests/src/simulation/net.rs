//! The way between the hosts, and the destination's door.

use super::chance::{Chance, Us};
use super::wire::Connections;

/// What an attempt to dial comes to, if to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nobody answers, or not yet.
    Silent,
    /// Nobody listens.
    Refused,
    /// Who listens does not know the session.
    Unknown,
    /// Who listens has rolled it back.
    RolledBack,
}

/// Who answers at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// A session that cannot be resumed yet.
    NotYet,
    /// A session that can.
    Open,
    /// A daemon without this session.
    Unknown,
    /// A daemon that has rolled it back.
    RolledBack,
    /// Nobody.
    Closed,
}

/// The way between the hosts.
#[derive(Debug)]
pub struct Net {
    /// No connection can be made before.
    pub down_until: Us,
    /// Who answers.
    pub door: Door,
    /// The destination's ends of connections that it has not taken yet.
    pub waiting: Option<Connections>,
}

impl Net {
    /// A way that is open, and a session that begins.
    #[must_use]
    pub const fn new() -> Self {
        Self { down_until: 0, door: Door::NotYet, waiting: None }
    }

    /// Makes the three connections of an attempt.
    ///
    /// # Errors
    /// What the source hears instead.
    pub fn dial(&mut self, chance: &Chance) -> Result<Connections, Answer> {
        if chance.now() < self.down_until {
            return Err(Answer::Silent);
        }
        match self.door {
            Door::NotYet => Err(Answer::Silent),
            Door::Closed => Err(Answer::Refused),
            Door::Unknown => Err(Answer::Unknown),
            Door::RolledBack => Err(Answer::RolledBack),
            Door::Open => {
                let (here, there) = Connections::make(chance);
                // One of an attempt before is dropped.
                if let Some(before) = self.waiting.replace(there) {
                    before.shutdown();
                }
                Ok(here)
            }
        }
    }
}

impl Default for Net {
    fn default() -> Self {
        Self::new()
    }
}
