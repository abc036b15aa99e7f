//! The page of the results.

use crate::page::{medians, show};
use crate::plot::{Axis, Chart, Mark, Scale};
use crate::results::Folder;

/// The page of a results folder.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from("# kv: what the clients of a redis see of its move\n\n");
    text += &medians(&folder.table, &[]);
    text += "\n`p99_ratio` is the 99th percentile of requests sent in the first second after the first reply behind the \
        stall, over that before the move. `stall_ms` is the longest request. `back_ms` is when the 99th percentile \
        of bins of 50 ms is back to 1.2 times what it was, for four in five bins in a row.\n";
    for group in folder.table.groups() {
        let precopy = group.value("precopy");
        // Folders made before there was such a column name a size.
        let (size, file) = match group.value("keys") {
            "" => (format!("{} MiB", group.value("mib")), format!("{}-mib", group.value("mib"))),
            keys => (format!("{keys} keys"), format!("{keys}-keys")),
        };
        let title = format!("requests to a redis of {size}, pre-copy {precopy}, run 1");
        let x = Axis::new("ms since the first reply after the stall", Scale::Linear);
        let mut chart = Chart::new(title, x, Axis::new("latency in us, per bin of 50 ms", Scale::Log));
        let Some(csv) = group.rows.first().and_then(|row| folder.timeline(row)) else { continue };
        for (colour, name) in ["max", "99 %", "median"].into_iter().enumerate() {
            chart.add(name, colour, Mark::Line, points(&csv, 4 - colour));
        }
        text += &show(folder, &format!("latency-{file}-precopy-{precopy}"), &chart)?;
        let title = format!("99th percentile, redis of {size}, pre-copy {precopy}, all runs");
        let x = Axis::new("ms since the first reply after the stall", Scale::Linear);
        let mut chart =
            Chart::new(title, x, Axis::new("99th percentile in us, per bin of 50 ms", Scale::Log));
        for (colour, row) in group.rows.iter().enumerate() {
            let csv = folder.timeline(row).unwrap_or_default();
            chart.add(format!("run {}", row.run), colour, Mark::Thin, points(&csv, 3));
        }
        text += &show(folder, &format!("p99-{file}-precopy-{precopy}"), &chart)?;
    }
    Ok(text)
}

/// Time and one column of a timeline.
fn points(csv: &str, column: usize) -> Vec<(f64, f64)> {
    let point = |line: &str| {
        let values: Vec<&str> = line.split(',').collect();
        Some((values.first()?.parse().ok()?, values.get(column)?.parse().ok()?))
    };
    csv.lines().skip(1).filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_timeline_are_found() {
        let csv = "t_ms,requests,p50_us,p99_us,max_us\n-50,10,1,2,3\n0,9,4,5,6\n";
        assert_eq!(points(csv, 4), [(-50.0, 3.0), (0.0, 6.0)]);
        assert_eq!(points(csv, 3), [(-50.0, 2.0), (0.0, 5.0)]);
    }
}
