//! Plots that pages of several scenarios have, drawn into the folder, as Markdown that shows them.

use crate::moving::timeline;
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
/// they waited, and how the memory filled.
///
/// # Errors
/// If a file cannot be read or written.
pub fn timelines(
    folder: &Folder,
    name: &str,
    wanted: impl Fn(&Group<'_>) -> bool,
    named: impl Fn(&Group<'_>) -> String,
) -> anyhow::Result<String> {
    let time = || Axis::new("time since the resume in ms", Scale::Linear);
    let mut faults =
        Chart::new(format!("{name}: faults per ms"), time(), Axis::new("faults per ms", Scale::Linear));
    let mut waits =
        Chart::new(format!("{name}: longest wait"), time(), Axis::new("latency in us", Scale::Log));
    let mut memory = Chart::new(
        format!("{name}: pages by origin"),
        time(),
        Axis::new("pages in thousands", Scale::Linear),
    );
    for (colour, group) in folder.table.groups().iter().filter(|group| wanted(group)).enumerate() {
        let Some(text) = group.rows.first().and_then(|row| folder.timeline(row)) else { continue };
        let bins = timeline::parse(&text)?;
        let case = named(group);
        let width = bins.first().map_or(1.0, |bin| bin.t_ms);
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
        let thousands = |count: u64| count as f64 / 1000.0;
        let rate = bins.iter().map(|bin| (bin.t_ms, thousands(bin.faults) * 1000.0 / width)).collect();
        faults.add(&case, colour, Mark::Line, rate);
        let longest = bins.iter().filter_map(|bin| Some((bin.t_ms, bin.max_us?))).collect();
        waits.add(&case, colour, Mark::Line, longest);
        let present = bins.iter().filter_map(|bin| Some((bin.t_ms, thousands(bin.present?)))).collect();
        memory.add(format!("{case}: all"), colour, Mark::Line, present);
        let by_fault = bins.iter().scan(0, |sum, bin| {
            *sum += bin.faults;
            Some((bin.t_ms, thousands(*sum)))
        });
        memory.add(format!("{case}: by a fault"), colour, Mark::Thin, by_fault.collect());
    }
    let mut text = show(folder, &format!("{name}-faults"), &faults)?;
    text += &show(folder, &format!("{name}-waits"), &waits)?;
    Ok(text + &show(folder, &format!("{name}-pages"), &memory)?)
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
