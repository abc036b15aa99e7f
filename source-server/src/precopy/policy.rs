//! When to stop copying and freeze. Pure.
//!
//! ```text
//! scan ── decide ──┬─ Copy ───────────▶ copy what it reports, next round
//!                  ├─ CopyAndFreeze ──▶ copy it; what is written meanwhile stays behind
//!                  └─ Freeze ─────────▶ all of it stays behind: copying it again would not make it less
//! ```

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use crate::limits;

/// How many rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounds {
    /// None: pure post-copy.
    #[default]
    Off,
    /// So many.
    Exactly(NonZeroU32),
    /// As many as are worth it.
    Auto,
}

impl FromStr for Rounds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let number = text.parse().ok().filter(|number| *number <= limits::PRECOPY_ROUNDS_MAX);
        let number = number.ok_or_else(|| {
            format!("{text:?} is none of: a number up to {}, auto", limits::PRECOPY_ROUNDS_MAX)
        })?;
        Ok(NonZeroU32::new(number).map_or(Self::Off, Self::Exactly))
    }
}

/// What to do with what a scan has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Copy it, and scan again.
    Copy,
    /// Copy it, and freeze.
    CopyAndFreeze(Why),
    /// Freeze.
    Freeze(Why),
}

/// Why this round is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// That many were asked for.
    Asked,
    /// What is left goes over the link in a moment.
    Little,
    /// The tree writes as fast as pages are sent.
    Outpaced,
    /// As much was written as in the round before.
    NoProgress,
    /// There were enough rounds.
    Rounds,
    /// It has taken long enough.
    Time,
}

impl Decision {
    /// Why it is the last round, if it is.
    #[must_use]
    pub const fn last(self) -> Option<Why> {
        match self {
            Self::Copy => None,
            Self::CopyAndFreeze(why) | Self::Freeze(why) => Some(why),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asked => "as asked for",
            Self::Little => "little is left",
            Self::Outpaced => "pages are written as fast as they are sent",
            Self::NoProgress => "the round before brought no progress",
            Self::Rounds => "enough rounds",
            Self::Time => "enough time",
        })
    }
}

/// Decides, round by round.
#[derive(Debug)]
pub struct Policy {
    rounds: Rounds,
    number: u32,
    /// Pages that the scan before found.
    written_before: u64,
    /// From that scan to this one.
    round_took: Duration,
    /// Pages per second that were sent, in the best round so far.
    rate: f64,
}

impl Policy {
    /// A policy before the first round.
    #[must_use]
    pub const fn new(rounds: Rounds) -> Self {
        Self { rounds, number: 0, written_before: 0, round_took: Duration::ZERO, rate: 0.0 }
    }

    /// What to do in the next round, whose scan has found `written` pages; `elapsed` since the first one began.
    pub fn decide(&mut self, written: u64, elapsed: Duration) -> Decision {
        self.number += 1;
        let before = std::mem::replace(&mut self.written_before, written);
        match self.rounds {
            Rounds::Off => Decision::Freeze(Why::Asked),
            Rounds::Exactly(rounds) if self.number >= rounds.get() => Decision::CopyAndFreeze(Why::Asked),
            Rounds::Exactly(_) => Decision::Copy,
            // All memory: how fast it goes is not known before.
            Rounds::Auto if self.number == 1 => Decision::Copy,
            Rounds::Auto => self.weigh(written, before, elapsed),
        }
    }

    #[allow(clippy::cast_precision_loss)] // counts of pages, far below 2^53
    fn weigh(&self, written: u64, before: u64, elapsed: Duration) -> Decision {
        let pages = written as f64;
        if pages <= self.rate * limits::PRECOPY_LITTLE.as_secs_f64() {
            return Decision::CopyAndFreeze(Why::Little);
        }
        // Per second of the round, a page counts once however often it is written.
        if pages >= self.rate * self.round_took.as_secs_f64() {
            return Decision::Freeze(Why::Outpaced);
        }
        // The first round found all memory, and is no measure.
        if self.number > 2 && pages > before as f64 * limits::PRECOPY_PROGRESS {
            return Decision::Freeze(Why::NoProgress);
        }
        if elapsed > limits::PRECOPY_TIME_MAX {
            return Decision::Freeze(Why::Time);
        }
        if self.number >= limits::PRECOPY_AUTO_ROUNDS {
            return Decision::CopyAndFreeze(Why::Rounds);
        }
        Decision::Copy
    }

    /// The round is over: `sent` pages were copied, and it took so long from its scan on.
    #[allow(clippy::cast_precision_loss)] // as above
    pub fn copied(&mut self, sent: u64, took: Duration) {
        self.round_took = took;
        self.rate = self.rate.max(sent as f64 / took.as_secs_f64().max(1e-6));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goes through rounds of (pages found, milliseconds that the round takes) up to the last.
    fn run(rounds: Rounds, found: &[(u64, u64)]) -> (u32, Decision) {
        let mut policy = Policy::new(rounds);
        let mut elapsed = Duration::ZERO;
        for (number, &(written, ms)) in (1..).zip(found) {
            let decision = policy.decide(written, elapsed);
            if decision.last().is_some() {
                return (number, decision);
            }
            let took = Duration::from_millis(ms);
            elapsed += took;
            policy.copied(written, took);
        }
        panic!("no end after {found:?}")
    }

    #[test]
    fn as_many_as_asked_for() {
        let some = [(1000, 100); 9];
        for rounds in 1..5 {
            let asked = Rounds::Exactly(NonZeroU32::new(rounds).unwrap());
            assert_eq!(run(asked, &some), (rounds, Decision::CopyAndFreeze(Why::Asked)));
        }
        assert_eq!(run(Rounds::Off, &some), (1, Decision::Freeze(Why::Asked)));
    }

    #[test]
    fn stops_when_little_is_left() {
        // 100 pages per millisecond: a moment is 3000 pages.
        let found = [(100_000, 1000), (20_000, 200), (2000, 20)];
        assert_eq!(run(Rounds::Auto, &found), (3, Decision::CopyAndFreeze(Why::Little)));
        assert_eq!(run(Rounds::Auto, &[(100_000, 1000), (0, 1)]), (2, Decision::CopyAndFreeze(Why::Little)));
        assert_eq!(run(Rounds::Auto, &[(0, 1), (0, 1)]), (2, Decision::CopyAndFreeze(Why::Little)));
    }

    #[test]
    fn stops_when_it_is_outpaced() {
        assert_eq!(run(Rounds::Auto, &[(100_000, 1000), (100_000, 1)]), (2, Decision::Freeze(Why::Outpaced)));
        // Few pages, each time all of them.
        let found = [(100_000, 1000), (40_000, 400), (40_000, 400)];
        assert_eq!(run(Rounds::Auto, &found), (3, Decision::Freeze(Why::Outpaced)));
    }

    #[test]
    fn stops_when_nothing_is_won_or_it_goes_on_for_ever() {
        // Less than is sent, but not less than before.
        let found = [(100_000, 1000), (10_000, 200), (9900, 200)];
        assert_eq!(run(Rounds::Auto, &found), (3, Decision::Freeze(Why::NoProgress)));
        let mut slow = vec![(100_000, 1000)];
        slow.extend((1..10).map(|round| (90_000 - round * 9000, 1000)));
        let enough = (limits::PRECOPY_AUTO_ROUNDS, Decision::CopyAndFreeze(Why::Rounds));
        assert_eq!(run(Rounds::Auto, &slow), enough);
        let hour = 3_600_000;
        assert_eq!(run(Rounds::Auto, &[(100_000, hour), (50_000, hour)]), (2, Decision::Freeze(Why::Time)));
    }

    #[test]
    fn rounds_are_read() {
        assert_eq!("0".parse(), Ok(Rounds::Off));
        assert_eq!("auto".parse(), Ok(Rounds::Auto));
        assert_eq!("3".parse(), Ok(Rounds::Exactly(NonZeroU32::new(3).unwrap())));
        for bad in ["", "-1", "many", "1000000", "1.5"] {
            assert!(bad.parse::<Rounds>().is_err(), "{bad}");
        }
    }
}
