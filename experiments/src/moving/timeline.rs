//! What happened when in a run, counted from the resume.
//!
//! ```text
//! t_ms        end of the bin
//! accesses    begun in it
//! faults      those among them that waited for their page
//! mean_us     how long they waited, if there were any
//! max_us
//! present     anonymous pages that were there, at the last look in the bin: those that came by faults and those
//!             that came unasked
//! ```

use std::fmt::Write as _;

use anyhow::{Context, ensure};

use super::FAULT_FLOOR_NS;
use crate::touch::Samples;

/// The first line of the file.
const HEADER: &str = "t_ms,accesses,faults,mean_us,max_us,present";
/// Bins at most, so that a file is small whatever the time it covers.
const BINS_MAX: u64 = 500;
/// Nanoseconds of the shortest bin: that of the looks at the memory.
const BIN_NS_MIN: u64 = 5_000_000;

/// One bin.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bin {
    /// Its end.
    pub t_ms: f64,
    /// Accesses begun in it.
    pub accesses: u64,
    /// Those that waited.
    pub faults: u64,
    /// How long, on average.
    pub mean_us: Option<f64>,
    /// How long at most.
    pub max_us: Option<f64>,
    /// Pages that were there.
    pub present: Option<u64>,
}

/// The time line of a run, up to `until_ns` after the resume.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "times and counts far below 2^53")]
pub fn bins(samples: &Samples, until_ns: u64) -> Vec<Bin> {
    let width = bin_width(until_ns);
    let count = until_ns.div_ceil(width);
    let mut bins: Vec<Bin> =
        (1..=count).map(|i| Bin { t_ms: (i * width) as f64 / 1e6, ..Bin::default() }).collect();
    let at = |ns: u64| usize::try_from(ns / width).unwrap_or(usize::MAX);
    let mut waited_ns = vec![(0_u64, 0_u64); bins.len()];
    let started = samples.started_ns.saturating_sub(samples.gap_to_ns);
    for sample in &samples.samples {
        let at = at(started + sample.t_ns);
        let (Some(bin), Some(waited)) = (bins.get_mut(at), waited_ns.get_mut(at)) else { continue };
        bin.accesses += 1;
        if sample.latency_ns >= FAULT_FLOOR_NS {
            bin.faults += 1;
            *waited = (waited.0 + sample.latency_ns, waited.1.max(sample.latency_ns));
        }
    }
    for (bin, (sum, max)) in bins.iter_mut().zip(waited_ns) {
        if bin.faults > 0 {
            bin.mean_us = Some(sum as f64 / bin.faults as f64 / 1000.0);
            bin.max_us = Some(max as f64 / 1000.0);
        }
    }
    for presence in &samples.presences {
        let Some(since) = presence.wall_ns.checked_sub(samples.gap_to_ns) else { continue };
        if let Some(bin) = bins.get_mut(at(since)) {
            bin.present = Some(presence.pages);
        }
    }
    bins
}

/// 1, 2 or 5 times a power of ten, so that there are not too many bins.
fn bin_width(until_ns: u64) -> u64 {
    let mut width = BIN_NS_MIN;
    while until_ns.div_ceil(width) > BINS_MAX {
        let leading = width.to_string().starts_with('2');
        width = if leading { width / 2 * 5 } else { width * 2 };
    }
    width
}

/// The file.
#[must_use]
pub fn csv(bins: &[Bin]) -> String {
    let mut text = format!("{HEADER}\n");
    let number = |value: Option<f64>| value.map(|value| format!("{value:.1}")).unwrap_or_default();
    for Bin { t_ms, accesses, faults, mean_us, max_us, present } in bins {
        let present = present.map(|pages| pages.to_string()).unwrap_or_default();
        // Into a String.
        let _ =
            writeln!(text, "{t_ms},{accesses},{faults},{},{},{present}", number(*mean_us), number(*max_us));
    }
    text
}

/// Reads a file.
///
/// # Errors
/// If it is not one.
pub fn parse(text: &str) -> anyhow::Result<Vec<Bin>> {
    let mut lines = text.lines();
    ensure!(lines.next() == Some(HEADER), "it is no time line");
    lines.map(|line| bin(line).with_context(|| format!("{line:?} is no bin"))).collect()
}

fn bin(line: &str) -> Option<Bin> {
    let mut fields = line.split(',');
    let mut next = || fields.next();
    let (t_ms, accesses, faults) = (next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?);
    let (mean, max, present) = (next()?, next()?, next()?);
    Some(Bin {
        t_ms,
        accesses,
        faults,
        mean_us: mean.parse().ok(),
        max_us: max.parse().ok(),
        present: present.parse().ok(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::touch::{Plan, Presence, Sample, State};

    #[test]
    fn everything_is_in_the_bin_in_which_it_began() {
        let sample = |t_ns, latency_ns| Sample { t_ns, latency_ns, page: 0, wrong: false };
        let samples = Samples {
            state: State::Done,
            plan: Plan { pages: 4, interval_ns: 0, threads: 1 },
            started_ns: 1_001_000_000,
            ended_ns: 0,
            gap_ns: 0,
            gap_from_ns: 0,
            gap_to_ns: 1_000_000_000,
            samples: vec![
                sample(0, 10_000),
                sample(3_000_000, 30_000),
                sample(4_000_000, 500),
                sample(90_000_000, 1),
            ],
            presences: vec![
                Presence { wall_ns: 900_000_000, pages: 1 },
                Presence { wall_ns: 1_006_000_000, pages: 2 },
                Presence { wall_ns: 1_009_000_000, pages: 3 },
            ],
        };
        let bins = bins(&samples, 18_000_000);
        assert_eq!(bins.len(), 4);
        assert_eq!((bins[0].accesses, bins[0].faults, bins[0].present), (2, 2, None));
        assert_eq!((bins[0].mean_us, bins[0].max_us), (Some(20.0), Some(30.0)));
        assert_eq!((bins[1].accesses, bins[1].faults, bins[1].present), (1, 0, Some(3)));
        assert_eq!((bins[3].t_ms, bins[3].accesses), (20.0, 0));
        assert_eq!(parse(&csv(&bins)).unwrap(), bins);
        assert!(parse("t,u\n").is_err() && parse(&format!("{HEADER}\n1,2\n")).is_err());
    }

    #[test]
    fn a_long_time_has_wider_bins_and_not_more() {
        assert_eq!(bin_width(1_000_000), BIN_NS_MIN);
        for seconds in [1, 3, 8, 60, 3600] {
            let ns = seconds * 1_000_000_000;
            let width = bin_width(ns);
            assert!(ns.div_ceil(width) <= BINS_MAX, "{seconds} s in bins of {width} ns");
            let leading: String = width.to_string().trim_end_matches('0').to_owned();
            assert!(["1", "2", "5"].contains(&leading.as_str()), "{width}");
        }
    }
}
