//! Charts of latency distributions.

use super::{Axis, Chart, Mark, Scale};
use crate::results::Percentiles;

/// A distribution to draw: the name of its case, and the latencies of one of its runs.
pub type Named<'a> = (&'a str, &'a Percentiles);

/// The part of all samples that took no longer, by latency.
#[must_use]
pub fn cdf(title: &str, of: &[Named<'_>]) -> Chart {
    let x = Axis::new("latency in us", Scale::Log);
    let mut chart = Chart::new(title, x, Axis::new("% of faults that took no longer", Scale::Linear));
    add_all(&mut chart, of, |us, quantile| (us, quantile * 100.0));
    chart
}

/// Latency by percentile: the tail takes as much room as the rest.
#[must_use]
pub fn percentiles(title: &str, of: &[Named<'_>]) -> Chart {
    let x = Axis::new("percentile", Scale::Percentile);
    let mut chart = Chart::new(title, x, Axis::new("latency in us", Scale::Log));
    // The last step is at 100 %, which this axis does not reach.
    add_all(&mut chart, of, |us, quantile| (1.0 / (1.0 - quantile), us));
    chart
}

fn add_all(chart: &mut Chart, of: &[Named<'_>], point: impl Fn(f64, f64) -> (f64, f64)) {
    let mut names: Vec<&str> = Vec::new();
    for (name, percentiles) in of {
        let colour = names.iter().position(|known| known == name).unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        });
        let points = percentiles.steps.iter().map(|step| point(step.us, step.quantile)).collect();
        chart.add(*name, colour, Mark::Thin, points);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::Histogram;

    #[test]
    fn runs_of_a_case_share_its_colour() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        (1..1000).for_each(|us| histogram.record(us * 1000).unwrap());
        let steps = Percentiles::of_ns(&histogram);
        let of = [("a", &steps), ("b", &steps), ("a", &steps)];
        for chart in [cdf("t", &of), percentiles("t", &of)] {
            let colours: Vec<usize> = chart.series.iter().map(|series| series.colour).collect();
            assert_eq!(colours, [0, 1, 0]);
            assert!(!chart.is_empty());
        }
        let at_99 = percentiles("t", &of[..1]);
        let shown = at_99.shown(&at_99.series[0]);
        assert!(shown.iter().all(|point| point.0.is_finite()) && shown.len() > 20);
    }
}
