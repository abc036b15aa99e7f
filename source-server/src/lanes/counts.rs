//! How many lanes a session has.

use std::str::FromStr;

use protocol::wire::limits::LANES_MAX;
use serde::{Deserialize, Serialize};

use crate::limits;

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaneCount {
    /// What the processors of this host have a use for.
    #[default]
    Auto,
    /// So many, from 1 to [`LANES_MAX`].
    Exactly(u8),
}

impl FromStr for LaneCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "auto" => Ok(Self::Auto),
            Ok(count @ 1..=LANES_MAX) => Ok(Self::Exactly(count)),
            _ => Err(format!("{text:?} is neither a number from 1 to {LANES_MAX} nor auto")),
        }
    }
}

impl LaneCount {
    fn or(self, auto: usize) -> u8 {
        match self {
            Self::Auto => u8::try_from(auto.clamp(1, limits::LANES_BY_DEFAULT)).unwrap_or(1),
            Self::Exactly(count) => count,
        }
    }
}

/// How many lanes of each kind a session has, 1 to [`LANES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneCounts {
    /// Fault lanes.
    pub fault: u8,
    /// Push lanes.
    pub push: u8,
}

impl LaneCounts {
    /// For a host with so many `processors` and a tree of so many `threads`. A lane wants processors of its own at both ends, and
    /// the process has the first claim on them; more than one fault lane serves only many threads.
    #[must_use]
    pub fn choose(fault: LaneCount, push: LaneCount, processors: usize, threads: usize) -> Self {
        let by_processors = processors / limits::PROCESSORS_PER_LANE;
        let by_threads = threads / limits::THREADS_PER_FAULT_LANE;
        Self { fault: fault.or(by_processors.min(by_threads)), push: push.or(by_processors) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_there_is_a_use_for() {
        let auto = |processors, threads| {
            let counts = LaneCounts::choose(LaneCount::Auto, LaneCount::Auto, processors, threads);
            (counts.fault, counts.push)
        };
        assert_eq!(auto(2, 100), (1, 1));
        assert_eq!(auto(16, 1), (1, 2));
        assert_eq!(auto(16, 100), (2, 2));
        assert_eq!(auto(500, 9), (2, 4));
        let asked = LaneCounts::choose(LaneCount::Exactly(3), LaneCount::Exactly(8), 2, 1);
        assert_eq!((asked.fault, asked.push), (3, 8));
    }

    #[test]
    fn words() {
        assert_eq!("auto".parse(), Ok(LaneCount::Auto));
        assert_eq!("8".parse(), Ok(LaneCount::Exactly(8)));
        for bad in ["0", "9", "-1", "two", ""] {
            assert!(bad.parse::<LaneCount>().is_err(), "{bad}");
        }
    }
}
