//! Plots that pages of several scenarios have, drawn into the folder, as Markdown that shows them.

use crate::plot::{Axis, Chart, Mark, latency};
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
