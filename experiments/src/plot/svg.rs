//! A chart drawn with `plotters`.

use anyhow::anyhow;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use super::{Axis, Chart, Mark, Scale, Series, span};

const SIZE: (u32, u32) = (960, 540);
const FONT: &str = "sans-serif";
/// Colours that people with any kind of colour vision tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(140, 120, 20),
];

pub(super) fn draw(chart: &Chart) -> anyhow::Result<String> {
    let mut text = String::new();
    let series: Vec<(&Series, Vec<(f64, f64)>)> = chart
        .series
        .iter()
        .map(|series| (series, chart.shown(series)))
        .filter(|series| !series.1.is_empty())
        .collect();
    let points = || series.iter().flat_map(|series| &series.1);
    let x = span(points().map(|point| point.0), chart.x.scale);
    let y = span(points().map(|point| point.1), chart.y.scale);
    let (x, y) = (x.0..x.1, y.0..y.1);
    match (chart.x.scale == Scale::Linear, chart.y.scale == Scale::Linear) {
        (true, true) => draw_over(&mut text, chart, &series, x, y),
        (true, false) => draw_over(&mut text, chart, &series, x, y.log_scale()),
        (false, true) => draw_over(&mut text, chart, &series, x.log_scale(), y),
        (false, false) => draw_over(&mut text, chart, &series, x.log_scale(), y.log_scale()),
    }
    .map_err(|error| anyhow!("{error}"))?;
    Ok(text)
}

type DrawError = Box<dyn std::error::Error>;

fn draw_over<X, Y>(
    text: &mut String,
    chart: &Chart,
    series: &[(&Series, Vec<(f64, f64)>)],
    x: X,
    y: Y,
) -> Result<(), DrawError>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut context = ChartBuilder::on(&root)
        .caption(&chart.title, (FONT, 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)?;
    context
        .configure_mesh()
        .x_desc(&chart.x.label)
        .y_desc(&chart.y.label)
        .axis_desc_style((FONT, 15))
        .label_style((FONT, 13))
        .light_line_style(RGBColor(240, 240, 240))
        .x_label_formatter(&|value| label(*value, &chart.x))
        .y_label_formatter(&|value| label(*value, &chart.y))
        .draw()?;
    let mut named: Vec<&str> = Vec::new();
    for (series, points) in series {
        let colour = COLOURS[series.colour % COLOURS.len()];
        let width = if series.mark == Mark::Thin { 1 } else { 2 };
        let drawn = if series.mark == Mark::Dots {
            context.draw_series(points.iter().map(|point| Circle::new(*point, 1, colour.filled())))?
        } else {
            context.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(width)))?
        };
        if !named.contains(&series.name.as_str()) {
            named.push(&series.name);
            drawn
                .label(&series.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(width)));
        }
        if series.mark == Mark::LineAndDots {
            context.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
        }
    }
    // Where there is least: what goes on over time is over at the end, distributions and growth begin low.
    let over_time = chart.x.scale == Scale::Linear;
    let corner = if over_time { SeriesLabelPosition::UpperRight } else { SeriesLabelPosition::UpperLeft };
    if named.iter().any(|name| !name.is_empty()) {
        context
            .configure_series_labels()
            .position(corner)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .label_font((FONT, 13))
            .draw()?;
    }
    root.present()?;
    Ok(())
}

/// The label of a tick. Between powers of ten there is room for some only.
fn label(value: f64, axis: &Axis) -> String {
    if axis.scale != Scale::Linear && !is_round(value) {
        return String::new();
    }
    match axis.scale {
        Scale::Percentile => {
            let percent = 100.0 * (1.0 - 1.0 / value);
            format!("{} %", plain(percent, 4))
        }
        Scale::Linear | Scale::Log => plain(value, 3),
    }
}

/// Whether it is 1, 2 or 5 times a power of ten.
fn is_round(value: f64) -> bool {
    let leading = value / 10_f64.powf((value.log10() + 1e-9).floor());
    [1.0, 2.0, 5.0].into_iter().any(|round| (leading - round).abs() < 1e-6)
}

/// As many decimals as it needs, and at most so many.
fn plain(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_drawn_and_named_once() {
        for (x, y) in [
            (Scale::Linear, Scale::Linear),
            (Scale::Linear, Scale::Log),
            (Scale::Log, Scale::Linear),
            (Scale::Percentile, Scale::Log),
        ] {
            let mut chart = Chart::new("A title", Axis::new("time ms", x), Axis::new("latency us", y));
            for run in 0..3 {
                chart.add("ours", 0, Mark::Thin, vec![(1.0, 2.0), (10.0, f64::from(run) + 3.0)]);
            }
            chart.add("theirs", 1, Mark::Dots, vec![(1.0, 20.0), (10.0, 30.0)]);
            let svg = chart.svg().unwrap();
            let count = |what: &str| svg.matches(what).count();
            assert_eq!((count("ours"), count("theirs"), count("A title")), (1, 1, 1), "{x:?} {y:?}");
            let colour = |index: usize| {
                let RGBColor(red, green, blue) = COLOURS[index];
                format!("#{red:02X}{green:02X}{blue:02X}")
            };
            assert_eq!(count(&colour(0)), 3 + 1, "three runs and the legend: {x:?} {y:?}");
            assert_eq!(count(&colour(1)), 2 + 1, "two dots and the legend: {x:?} {y:?}");
        }
    }

    #[test]
    fn an_empty_chart_is_still_one() {
        let chart = Chart::new("Nothing", Axis::new("x", Scale::Log), Axis::new("y", Scale::Linear));
        assert!(chart.svg().unwrap().contains("Nothing"));
    }

    #[test]
    fn ticks_are_labelled_for_people() {
        let percent = Axis::new("", Scale::Percentile);
        assert_eq!(label(1.0, &percent), "0 %");
        assert_eq!(label(100.0, &percent), "99 %");
        assert_eq!(label(10_000.0, &percent), "99.99 %");
        let plain = Axis::new("", Scale::Log);
        assert_eq!((label(1000.0, &plain), label(0.5, &plain)), ("1000".to_owned(), "0.5".to_owned()));
        assert_eq!((label(900.0, &plain), label(200.0, &plain)), (String::new(), "200".to_owned()));
        assert_eq!(label(2.0, &percent), "50 %");
    }
}
