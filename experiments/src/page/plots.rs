//! Plots that pages of several scenarios have, drawn into the folder, as Markdown that shows them.

use crate::moving::timeline::{self, Bin};
use crate::plot::{Axis, Chart, Mark, Scale, latency};
use crate::results::{Folder, Group, PLOTS, Percentiles};

/// The latencies of the cases that `wanted` accepts, as CDF and by percentile, a line per run. `named` says what a
/// case is called; the files are called after `name`.
///
/// # Errors
/// If a file cannot be read or written.
pub fn latencies(
    folder: &Folder,
    name: &str,
    wanted: impl Fn(&Group<'_>) -> bool,
    named: impl Fn(&Group<'_>) -> String,
) -> anyhow::Result<String> {
    let mut of: Vec<(String, Percentiles)> = Vec::new();
    for group in folder.table.groups().iter().filter(|group| wanted(group)) {
        for row in &group.rows {
            if let Some(percentiles) = folder.percentiles(row)? {
                of.push((named(group), percentiles));
            }
        }
    }
    if of.is_empty() {
        return Ok(String::new());
    }
    let of: Vec<_> = of.iter().map(|(name, percentiles)| (name.as_str(), percentiles)).collect();
    let cdf = show(folder, &format!("{name}-cdf"), &latency::cdf(&format!("{name}: distribution"), &of))?;
    let chart = latency::percentiles(&format!("{name}: by percentile"), &of);
    Ok(cdf + &show(folder, &format!("{name}-percentiles"), &chart)?)
}

/// What happened when, counted from the resume, in the first run of each case that `wanted` accepts: faults, how long
/// they waited, how the memory filled and how fast.
///
/// # Errors
/// If a file cannot be read or written.
pub fn timelines(
    folder: &Folder,
    name: &str,
    wanted: impl Fn(&Group<'_>) -> bool,
    named: impl Fn(&Group<'_>) -> String,
) -> anyhow::Result<String> {
    let chart = |what: &str, label: &str, scale: Scale| {
        let time = Axis::new("time since the resume in ms", Scale::Linear);
        Chart::new(format!("{name}: {what}"), time, Axis::new(label, scale))
    };
    let mut faults = chart("faults", "faults per ms", Scale::Linear);
    let mut waits = chart("longest wait", "latency in us", Scale::Log);
    let mut pages = chart("pages by origin", "pages in thousands", Scale::Linear);
    let mut throughput = chart("throughput", "GiB per s that arrived", Scale::Linear);
    for (colour, group) in folder.table.groups().iter().filter(|group| wanted(group)).enumerate() {
        let Some(text) = group.rows.first().and_then(|row| folder.timeline(row)) else { continue };
        let bins = timeline::parse(&text)?;
        let case = named(group);
        let width_ms = bins.first().map_or(1.0, |bin| bin.t_ms);
        faults.add(&case, colour, Mark::Line, over_time(&bins, |bin| Some(float(bin.faults) / width_ms)));
        waits.add(&case, colour, Mark::Line, over_time(&bins, |bin| bin.max_us));
        let present = over_time(&bins, |bin| Some(float(bin.present?) / 1000.0));
        pages.add(format!("{case}: all"), colour, Mark::Line, present);
        let mut sum = 0;
        let by_fault = over_time(&bins, |bin| {
            sum += bin.faults;
            Some(float(sum) / 1000.0)
        });
        pages.add(format!("{case}: by a fault"), colour, Mark::Thin, by_fault);
        throughput.add(&case, colour, Mark::Line, rates(&bins));
    }
    let mut text = String::new();
    for (what, chart) in [("faults", faults), ("waits", waits), ("pages", pages), ("throughput", throughput)]
    {
        text += &show(folder, &format!("{name}-{what}"), &chart)?;
    }
    Ok(text)
}

/// A value of each bin, where there is one.
fn over_time(bins: &[Bin], mut value: impl FnMut(&Bin) -> Option<f64>) -> Vec<(f64, f64)> {
    bins.iter().filter_map(|bin| Some((bin.t_ms, value(bin)?))).collect()
}

/// How fast the memory filled, from one look at it to the next, in GiB/s.
fn rates(bins: &[Bin]) -> Vec<(f64, f64)> {
    let gib = |pages: f64| pages * 4096.0 / f64::from(1 << 30);
    let looks = over_time(bins, |bin| bin.present.map(float));
    looks
        .windows(2)
        .map(|two| (two[1].0, gib(two[1].1 - two[0].1) / (two[1].0 - two[0].0) * 1000.0))
        .collect()
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Medians of columns over a number that the case says, a line per column and name.
///
/// # Errors
/// If the file cannot be written.
pub fn by_case(
    folder: &Folder,
    name: &str,
    title: &str,
    (x, y): (Axis, Axis),
    at: impl Fn(&Group<'_>) -> Option<f64>,
    lines: &[(&str, &str)],
) -> anyhow::Result<String> {
    let mut chart = Chart::new(title, x, y);
    let groups = folder.table.groups();
    for (colour, (column, label)) in lines.iter().enumerate() {
        let point = |group: &Group<'_>| Some((at(group)?, group.spread(column)?.middle));
        let mut points: Vec<(f64, f64)> = groups.iter().filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.add(*label, colour, Mark::LineAndDots, points);
    }
    show(folder, name, &chart)
}

/// Writes a chart into the folder; the Markdown that shows it, or nothing if it is empty.
///
/// # Errors
/// If the file cannot be written.
pub fn show(folder: &Folder, name: &str, chart: &Chart) -> anyhow::Result<String> {
    if chart.is_empty() {
        return Ok(String::new());
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() || ".-".contains(c) { c } else { '-' };
    let file: String = format!("{name}.svg").chars().map(plain).collect();
    chart.write(&folder.dir.join(PLOTS).join(&file))?;
    Ok(format!("\n![{}]({PLOTS}/{file})\n", chart.title))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_goes_from_one_look_to_the_next() {
        let bin = |t_ms, present| Bin { t_ms, present, ..Bin::default() };
        let mib = 256;
        let bins = [bin(5.0, Some(0)), bin(10.0, None), bin(15.0, Some(10 * mib)), bin(20.0, Some(15 * mib))];
        // 10 MiB in 10 ms, then 5 MiB in 5 ms.
        let gib_per_s = 1000.0 / 1024.0;
        for ((t_ms, rate), expected_ms) in rates(&bins).into_iter().zip([15.0_f64, 20.0]) {
            assert!(
                (rate - gib_per_s).abs() < 1e-9 && t_ms.total_cmp(&expected_ms).is_eq(),
                "{rate} at {t_ms}"
            );
        }
        assert_eq!(rates(&bins).len(), 2);
        assert!(rates(&bins[..1]).is_empty());
    }
}
