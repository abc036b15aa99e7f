//! Charts as SVG.
//!
//! A [`Chart`] is data: series of points over two axes. What the experiments have in common is in [`latency`].

pub mod latency;
mod svg;

use std::path::Path;

use anyhow::Context;

/// How an axis is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Evenly, from 0 if nothing is below.
    Linear,
    /// By powers of ten; what is not above 0 is left out.
    Log,
    /// The value is 1 / (1 - quantile), by powers of ten, labelled 90 %, 99 % and so on.
    Percentile,
}

/// An axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// What it shows, and the unit.
    pub label: String,
    /// How it is scaled.
    pub scale: Scale,
}

impl Axis {
    /// An axis.
    pub fn new(label: impl Into<String>, scale: Scale) -> Self {
        Self { label: label.into(), scale }
    }
}

/// How the points of a series are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Joined.
    Line,
    /// Joined and thinner: one of several runs.
    Thin,
    /// Each by itself.
    Dots,
    /// Joined, with a mark on each point.
    LineAndDots,
}

/// A series of points.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend; of several series with one name the first is shown there.
    pub name: String,
    /// Which colour; series of one name should have the same.
    pub colour: usize,
    /// How it is drawn.
    pub mark: Mark,
    /// x and y.
    pub points: Vec<(f64, f64)>,
}

/// A chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// Over it.
    pub title: String,
    /// Below it.
    pub x: Axis,
    /// Beside it.
    pub y: Axis,
    /// What is drawn.
    pub series: Vec<Series>,
}

impl Chart {
    /// A chart without series yet.
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        Self { title: title.into(), x, y, series: Vec::new() }
    }

    /// Adds a series.
    pub fn add(&mut self, name: impl Into<String>, colour: usize, mark: Mark, points: Vec<(f64, f64)>) {
        self.series.push(Series { name: name.into(), colour, mark, points });
    }

    /// Whether nothing would be seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.series.iter().all(|series| self.shown(series).is_empty())
    }

    /// The chart as the text of an SVG file.
    ///
    /// # Errors
    /// If it cannot be drawn.
    pub fn svg(&self) -> anyhow::Result<String> {
        svg::draw(self).with_context(|| format!("drawing {:?}", self.title))
    }

    /// Writes it into a file, in a folder that is made if need be.
    ///
    /// # Errors
    /// If it cannot be drawn or written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("creating {folder:?}"))?;
        }
        std::fs::write(path, self.svg()?).with_context(|| format!("writing {path:?}"))
    }

    /// The points of a series that can be shown on these axes.
    fn shown(&self, series: &Series) -> Vec<(f64, f64)> {
        let fits =
            |value: f64, axis: &Axis| value.is_finite() && (axis.scale == Scale::Linear || value > 0.0);
        series.points.iter().copied().filter(|&(x, y)| fits(x, &self.x) && fits(y, &self.y)).collect()
    }
}

/// What an axis spans so that all `values` are on it; never empty.
fn span(values: impl Iterator<Item = f64>, scale: Scale) -> (f64, f64) {
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return (if scale == Scale::Linear { 0.0 } else { 1.0 }, 10.0);
    }
    match scale {
        Scale::Linear => {
            let low = low.min(0.0);
            let high = if high > low { high } else { low + 1.0 };
            (low, high + (high - low) * 0.03)
        }
        Scale::Percentile => (1.0, high.max(10.0) * 1.2),
        Scale::Log => {
            // At least a decade, cut at 1, 2 or 5 of one: whole decades would leave most of a chart empty.
            let (low, high) = (step_down(low), step_up(high));
            (low, high.max(low * 10.0))
        }
    }
}

fn step_down(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    [5.0, 2.0].into_iter().map(|step| step * decade).find(|step| *step <= value).unwrap_or(decade)
}

fn step_up(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|step| step * decade).find(|step| *step >= value).unwrap_or(decade * 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_on_the_axis() {
        let all = |values: &[f64], scale| {
            let (low, high) = span(values.iter().copied(), scale);
            assert!(
                low < high && values.iter().all(|&value| low <= value && value <= high),
                "{values:?} {scale:?}"
            );
            (low, high)
        };
        assert_eq!(all(&[3.0, 40.0], Scale::Log), (2.0, 50.0));
        assert_eq!(all(&[10.0], Scale::Log), (10.0, 100.0));
        assert_eq!(all(&[0.7, 6.0], Scale::Log), (0.5, 10.0));
        assert_eq!(all(&[5.0, 100.0], Scale::Linear).0, 0.0);
        assert!(all(&[-5.0, 100.0], Scale::Linear).0 <= -5.0);
        assert_eq!(all(&[0.0, 0.0], Scale::Linear).0, 0.0);
        assert_eq!(all(&[1.0, 10_000.0], Scale::Percentile).0, 1.0);
        all(&[], Scale::Linear);
        all(&[], Scale::Log);
    }

    #[test]
    fn what_no_axis_can_show_is_left_out() {
        let mut chart = Chart::new("t", Axis::new("x", Scale::Linear), Axis::new("y", Scale::Log));
        chart.add("a", 0, Mark::Line, vec![(0.0, 0.0), (1.0, f64::NAN), (2.0, -1.0)]);
        assert!(chart.is_empty());
        chart.add("b", 1, Mark::Line, vec![(0.0, 0.0), (1.0, 3.0)]);
        assert!(!chart.is_empty());
        assert_eq!(chart.shown(&chart.series[1]), [(1.0, 3.0)]);
    }
}
