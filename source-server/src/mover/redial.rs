//! When the source dials again, and when it gives up. Pure: time is an argument.

use std::time::{Duration, Instant};

use crate::limits;

/// How long a lost destination is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// [`limits::GIVE_UP_AFTER`]; sooner if somebody there says that nobody listens.
    Default,
    /// So long, whatever is heard.
    After(Duration),
    /// As long as it takes.
    Never,
}

impl std::str::FromStr for GiveUp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "never" => Ok(Self::Never),
            _ => text
                .parse()
                .map(|seconds| Self::After(Duration::from_secs(seconds)))
                .map_err(|_| format!("{text:?} is neither a number of seconds nor never")),
        }
    }
}

/// What an attempt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// Nobody answered, or it broke again.
    Silent,
    /// The host is there, and nobody listens.
    Refused,
    /// Somebody listens who does not know the session.
    Unknown,
    /// Somebody listens who has rolled it back.
    RolledBack,
}

/// The dialling after a lost link.
#[derive(Debug)]
pub(super) struct Redial {
    give_up: GiveUp,
    began: Instant,
    /// The same answer since when.
    answer: (Failure, Instant),
    pause: Duration,
    patience: Duration,
    noise: u64,
}

impl Redial {
    /// Begins now. `first_dial` is how long a connection took to be made when all was well; `noise` differs from
    /// source to source.
    pub(super) fn new(give_up: GiveUp, first_dial: Duration, noise: u64, now: Instant) -> Self {
        let patience = (first_dial * limits::REDIAL_PATIENCE_FACTOR)
            .clamp(limits::REDIAL_PATIENCE_MIN, limits::REDIAL_PATIENCE_MAX);
        let answer = (Failure::Silent, now);
        Self { give_up, began: now, answer, pause: limits::REDIAL_PAUSE_MIN, patience, noise: noise | 1 }
    }

    /// How long an attempt may take: a packet that is lost while the link is still down shall not hold up the
    /// attempt that finds it up.
    pub(super) const fn patience(&self) -> Duration {
        self.patience
    }

    /// After a failed attempt: how long to wait before the next, or nothing if it is time to give up.
    pub(super) fn next(&mut self, failure: Failure, now: Instant) -> Option<Duration> {
        if failure != self.answer.0 {
            self.answer = (failure, now);
        }
        let silent = match self.give_up {
            GiveUp::Default => Some(limits::GIVE_UP_AFTER),
            GiveUp::After(limit) => Some(limit),
            GiveUp::Never => None,
        };
        let same = match (failure, self.give_up) {
            (Failure::Silent, _) | (_, GiveUp::Never) | (Failure::Refused, GiveUp::After(_)) => None,
            (Failure::Refused, GiveUp::Default) => Some(limits::NOBODY_LISTENS_PATIENCE),
            // Who has rolled back is not dialled again.
            (Failure::Unknown | Failure::RolledBack, _) => Some(limits::UNKNOWN_SESSION_PATIENCE),
        };
        let passed = |limit: Option<Duration>, since: Instant| {
            limit.is_some_and(|limit| now.saturating_duration_since(since) >= limit)
        };
        if passed(silent, self.began) || passed(same, self.answer.1) {
            return None;
        }
        let pause = self.pause;
        self.pause = (self.pause * 2).min(limits::REDIAL_PAUSE_MAX);
        // Xorshift: sources that lost the same link do not dial in step.
        self.noise ^= self.noise << 13;
        self.noise ^= self.noise >> 7;
        self.noise ^= self.noise << 17;
        let permille = u32::try_from(self.noise % 500).unwrap_or(0);
        Some(pause * (500 + permille) / 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn redial(give_up: GiveUp, now: Instant) -> Redial {
        Redial::new(give_up, Duration::from_millis(2), 42, now)
    }

    /// How long it goes on if every attempt fails like that.
    fn lasts(give_up: GiveUp, failure: Failure) -> Option<Duration> {
        let began = Instant::now();
        let (mut redial, mut now) = (redial(give_up, began), began);
        while let Some(pause) = redial.next(failure, now) {
            assert!(pause <= limits::REDIAL_PAUSE_MAX && pause >= limits::REDIAL_PAUSE_MIN / 2);
            now += pause + Duration::from_millis(10);
            if now - began > 1000 * SECOND {
                return None;
            }
        }
        Some(now - began)
    }

    #[test]
    fn gives_up_in_time() {
        let about = |limit: Duration, lasted: Option<Duration>| {
            let lasted = lasted.unwrap();
            assert!(lasted >= limit && lasted < limit + SECOND, "{lasted:?} for {limit:?}");
        };
        about(limits::GIVE_UP_AFTER, lasts(GiveUp::Default, Failure::Silent));
        about(limits::NOBODY_LISTENS_PATIENCE, lasts(GiveUp::Default, Failure::Refused));
        about(limits::UNKNOWN_SESSION_PATIENCE, lasts(GiveUp::Default, Failure::Unknown));
        about(90 * SECOND, lasts(GiveUp::After(90 * SECOND), Failure::Refused));
        about(2 * SECOND, lasts(GiveUp::After(2 * SECOND), Failure::Unknown));
        for failure in [Failure::Silent, Failure::Refused, Failure::Unknown] {
            assert_eq!(lasts(GiveUp::Never, failure), None);
        }
        assert_eq!(lasts(GiveUp::After(Duration::ZERO), Failure::Silent), Some(Duration::ZERO));
    }

    #[test]
    fn another_answer_begins_its_own_patience() {
        let began = Instant::now();
        let mut redial = redial(GiveUp::Default, began);
        assert!(redial.next(Failure::Unknown, began).is_some());
        assert!(redial.next(Failure::Silent, began + 2 * SECOND).is_some());
        let later = began + limits::UNKNOWN_SESSION_PATIENCE;
        assert!(redial.next(Failure::Unknown, later).is_some());
        assert!(redial.next(Failure::Unknown, later + limits::UNKNOWN_SESSION_PATIENCE).is_none());
    }

    #[test]
    fn an_attempt_gets_what_the_link_needs() {
        let now = Instant::now();
        let patience = |first| Redial::new(GiveUp::Default, first, 1, now).patience();
        assert_eq!(patience(Duration::ZERO), limits::REDIAL_PATIENCE_MIN);
        assert_eq!(patience(SECOND / 2), SECOND / 2 * limits::REDIAL_PATIENCE_FACTOR);
        assert_eq!(patience(60 * SECOND), limits::REDIAL_PATIENCE_MAX);
    }

    #[test]
    fn words() {
        assert_eq!("never".parse(), Ok(GiveUp::Never));
        assert_eq!("0".parse(), Ok(GiveUp::After(Duration::ZERO)));
        assert!("soon".parse::<GiveUp>().is_err() && "-1".parse::<GiveUp>().is_err());
    }
}
