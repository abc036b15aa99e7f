//! Latencies by percentile, in the text form that HdrHistogram's own tools read and write (`.hgrm`).
//!
//! ```text
//!        Value     Percentile TotalCount 1/(1-Percentile)
//!       22.911 0.500000000000       4711           2.00
//! ...
//! #[Mean    =       24.101, StdDeviation   =        6.210]
//! #[Max     =      812.543, Total count    =         9422]
//! ```
//!
//! Values are in microseconds.

use std::fmt;
use std::path::Path;

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;

/// Steps per halving of the distance to 100 %: enough to draw a smooth line.
const TICKS: u32 = 10;

/// One line of the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Percentile {
    /// Microseconds.
    pub us: f64,
    /// The part of all samples that is not above, 0 to 1.
    pub quantile: f64,
    /// That part as a number of samples.
    pub count: u64,
}

/// A distribution.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// Rising.
    pub steps: Vec<Percentile>,
    mean_us: f64,
    deviation_us: f64,
}

impl Percentiles {
    /// Those of a histogram of nanoseconds.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "times below 104 days")]
    pub fn of_ns(histogram: &Histogram<u64>) -> Self {
        let mut count = 0;
        let steps = histogram.iter_quantiles(TICKS).map(|step| {
            count += step.count_since_last_iteration();
            Percentile {
                us: step.value_iterated_to() as f64 / 1000.0,
                quantile: step.quantile_iterated_to(),
                count,
            }
        });
        Self {
            steps: steps.collect(),
            mean_us: histogram.mean() / 1000.0,
            deviation_us: histogram.stdev() / 1000.0,
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// If it is not one.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {path:?}"))?;
        Self::parse(&text).with_context(|| format!("understanding {path:?}"))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut steps = Vec::new();
        let (mut mean_us, mut deviation_us) = (0.0, 0.0);
        for line in text.lines().skip(1).filter(|line| !line.trim().is_empty()) {
            if let Some(remark) = line.strip_prefix("#[") {
                let field = |name: &str| {
                    let (_, after) = remark.split_once(name)?;
                    after.trim_start_matches([' ', '=']).split([',', ']']).next()?.trim().parse().ok()
                };
                mean_us = field("Mean").unwrap_or(mean_us);
                deviation_us = field("StdDeviation").unwrap_or(deviation_us);
                continue;
            }
            let mut words = line.split_whitespace();
            let mut next = || words.next().with_context(|| format!("{line:?} is too short"));
            steps.push(Percentile {
                us: next()?.parse().with_context(|| format!("the value of {line:?}"))?,
                quantile: next()?.parse().with_context(|| format!("the percentile of {line:?}"))?,
                count: next()?.parse().with_context(|| format!("the count of {line:?}"))?,
            });
        }
        ensure!(
            steps.is_sorted_by(|a, b| a.us <= b.us && a.quantile <= b.quantile),
            "percentiles do not rise"
        );
        Ok(Self { steps, mean_us, deviation_us })
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>12} {:>14} {:>10} {:>14}\n",
            "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
        )?;
        for Percentile { us, quantile, count } in &self.steps {
            let rest = 1.0 - quantile;
            if rest > 0.0 {
                writeln!(f, "{us:>12.3} {quantile:>14.12} {count:>10} {:>14.2}", 1.0 / rest)?;
            } else {
                writeln!(f, "{us:>12.3} {quantile:>14.12} {count:>10}")?;
            }
        }
        let (max, count) = self.steps.last().map_or((0.0, 0), |last| (last.us, last.count));
        writeln!(f, "#[Mean    = {:>12.3}, StdDeviation   = {:>12.3}]", self.mean_us, self.deviation_us)?;
        writeln!(f, "#[Max     = {max:>12.3}, Total count    = {count:>12}]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        for us in 1..=10_000 {
            histogram.record(us * 1000).unwrap();
        }
        let written = Percentiles::of_ns(&histogram);
        let read = Percentiles::parse(&written.to_string()).unwrap();
        assert_eq!(read.steps.len(), written.steps.len());
        assert_eq!(read.to_string(), written.to_string());
        let last = read.steps.last().unwrap();
        assert!(last.count == 10_000 && (last.us - 10_000.0).abs() < 10.0, "{last:?}");
        assert!((read.mean_us - 5000.5).abs() < 5.0, "{}", read.mean_us);
        let median = read.steps.iter().find(|step| step.quantile >= 0.5).unwrap();
        assert!((median.us - 5000.0).abs() < 10.0, "{median:?}");
    }

    #[test]
    fn what_is_no_distribution_is_refused() {
        for bad in ["head\n1\n", "head\n2 0.5 1\n1 0.6 2\n", "head\nx 0.5 1\n"] {
            assert!(Percentiles::parse(bad).is_err(), "{bad:?}");
        }
    }
}
