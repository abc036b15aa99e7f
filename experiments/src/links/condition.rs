//! What a link runs over.

use std::fmt;
use std::time::Duration;

use crate::emulator::Model;
use crate::lab::{Rate, Wire};

/// The rate of the emulated links, which one of these machines forwards with time to spare.
const EMULATED_MBIT: u32 = 1000;
const DELAYS_US: [u32; 4] = [100, 1000, 10_000, 50_000];
/// In thousandths.
const LOSSES: [u32; 4] = [0, 1, 5, 10];

/// One condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Within one host.
    Loopback,
    /// Two hosts on a switch that is as fast as the processors.
    Switch,
    /// A switch with a token bucket.
    Shaped {
        /// Its rate.
        mbit: u32,
    },
    /// A link of 1 Gbit/s with a queue of 1 MiB, emulated.
    Emulated {
        /// Added to each way.
        delay_us: u32,
        /// Packets lost, in thousandths.
        loss: u32,
    },
}

impl Condition {
    pub(super) fn all() -> Vec<Self> {
        let mut all =
            vec![Self::Loopback, Self::Switch, Self::Shaped { mbit: 10_000 }, Self::Shaped { mbit: 1000 }];
        for delay_us in DELAYS_US {
            all.extend(LOSSES.map(|loss| Self::Emulated { delay_us, loss }));
        }
        all
    }

    /// The one that a short run shows: everything of the emulator is in it.
    pub(super) const SMOKE: Self = Self::Emulated { delay_us: 1000, loss: 1 };

    /// What the hosts are joined by.
    pub(super) fn wire(self, seed: u64) -> Wire {
        match self {
            Self::Loopback | Self::Switch => Wire::Switch,
            Self::Shaped { mbit } => Wire::Shaped(Rate { mbit }),
            Self::Emulated { delay_us, loss } => Wire::Emulated(Model {
                delay: Duration::from_micros(delay_us.into()),
                loss: f64::from(loss) / 1000.0,
                rate_bit: Some(u64::from(EMULATED_MBIT) * 1_000_000),
                seed,
                ..Model::default()
            }),
        }
    }

    /// Its name in tables: what joins the hosts.
    pub(super) fn wire_name(self) -> String {
        match self {
            Self::Loopback => "loopback".to_owned(),
            Self::Switch => "veth".to_owned(),
            Self::Shaped { mbit } => format!("veth {} Gbit/s", mbit / 1000),
            Self::Emulated { .. } => format!("emulated {} Gbit/s", EMULATED_MBIT / 1000),
        }
    }

    /// Added to each way, in milliseconds.
    pub(super) fn delay_ms(self) -> f64 {
        match self {
            Self::Emulated { delay_us, .. } => f64::from(delay_us) / 1000.0,
            _ => 0.0,
        }
    }

    /// Packets lost, in percent.
    pub(super) fn loss_percent(self) -> f64 {
        match self {
            Self::Emulated { loss, .. } => f64::from(loss) / 10.0,
            _ => 0.0,
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.wire_name())?;
        if matches!(self, Self::Emulated { .. }) {
            write!(f, " delay={}ms loss={}%", self.delay_ms(), self.loss_percent())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_have_names_of_their_own() {
        let all = Condition::all();
        let mut names: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), 20);
        names.dedup();
        assert_eq!(names.len(), all.len());
        assert!(names.contains(&"emulated 1 Gbit/s delay=0.1ms loss=0.5%".to_owned()), "{names:?}");
        assert!(all.contains(&Condition::SMOKE));
        let Wire::Emulated(model) = Condition::SMOKE.wire(3) else { panic!("not emulated") };
        assert_eq!((model.delay, model.seed), (Duration::from_millis(1), 3));
        assert!((model.loss - 0.001).abs() < 1e-9);
    }
}
