//! The page of a results folder: `summary.md`, with the plots beside it, made from the raw data alone.
//!
//! Each scenario says what its results show ([`Scenario::page`](crate::scenario::Scenario)); what is above and below
//! that is the same for all.

mod floors;
mod plots;

use std::fmt::Write as _;
use std::path::Path;

use crate::results::{self, Folder, Group, Spread, Table, number};
use crate::scenario;

pub use floors::{Floors, against_floors};
pub use plots::{by_case, latencies, show, timelines};

/// Makes the page of a folder anew and returns its text.
///
/// # Errors
/// If the folder is no results folder, or cannot be written.
pub fn write(dir: &Path) -> anyhow::Result<String> {
    let folder = Folder::open(dir)?;
    let name = match folder.environment.get("scenario") {
        // Folders made before there was such a line: they were called after their scenario.
        "" => dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        name => name.to_owned(),
    };
    let text = match scenario::find(&name) {
        _ if folder.table.rows.is_empty() => format!("# {name}\n\nNothing was measured.\n"),
        Some(scenario) => (scenario.page)(&folder)?,
        None => standard(&folder)?,
    };
    let text = text + &failures(&folder) + &environment(&folder);
    std::fs::write(dir.join(results::SUMMARY), &text)?;
    Ok(text)
}

/// The page of any table: medians and their spread, a line per case, the latencies and the time lines.
///
/// # Errors
/// If the plots cannot be drawn.
pub fn standard(folder: &Folder) -> anyhow::Result<String> {
    let mut text = format!("# {}\n\n", folder.environment.get("scenario"));
    text += &medians(&folder.table, &[]);
    let named = |group: &Group<'_>| group.case.join(", ");
    text += &latencies(folder, "latency", |_| true, named)?;
    Ok(text + &timelines(folder, "time", |_| true, named)?)
}

/// A Markdown table of medians with least and most, a line per case. `columns` says which numbers; all if it is
/// empty. Columns without any number, and those where everything is zero, are left out.
#[must_use]
pub fn medians(table: &Table, columns: &[&str]) -> String {
    let groups = table.groups();
    let columns: Vec<&str> = if columns.is_empty() {
        table.number_columns.iter().map(String::as_str).collect()
    } else {
        columns.to_vec()
    };
    let is_told =
        |column: &&str| groups.iter().flat_map(|group| group.numbers(column)).any(|value| value != 0.0);
    let columns: Vec<&str> = columns.into_iter().filter(is_told).collect();
    let line =
        |cells: &mut dyn Iterator<Item = String>| format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
    let titles = table.case_columns.iter().map(String::as_str).chain(["runs"]).chain(columns.iter().copied());
    let mut text = line(&mut titles.clone().map(str::to_owned));
    text += &line(&mut titles.map(|_| "---".to_owned()));
    for group in &groups {
        let shown =
            |column: &&str| group.spread(column).map_or_else(String::new, |spread| spread.to_string());
        let cells = group.case.iter().cloned().chain([group.rows.len().to_string()]);
        text += &line(&mut cells.chain(columns.iter().map(shown)));
    }
    text + "\nMedians over the runs, with the least and the most.\n"
}

/// `a / b` of two medians, if both are there.
#[must_use]
pub fn ratio(a: Option<Spread>, b: Option<Spread>) -> Option<f64> {
    let (a, b) = (a?.middle, b?.middle);
    (b > 0.0).then(|| a / b)
}

/// A cell: a number, or nothing.
#[must_use]
pub fn cell(value: Option<f64>) -> String {
    value.map(number).unwrap_or_default()
}

/// The first group whose case has all of these values.
#[must_use]
pub fn find<'a>(groups: &'a [Group<'a>], case: &[(&str, &str)]) -> Option<&'a Group<'a>> {
    groups.iter().find(|group| case.iter().all(|(column, value)| group.value(column) == *value))
}

fn failures(folder: &Folder) -> String {
    let failures = folder.failures();
    if failures.is_empty() {
        return String::new();
    }
    format!("\n{} runs failed and were tried again; `{}` says why.\n", failures.len(), results::FAILURES)
}

fn environment(folder: &Folder) -> String {
    let mut text = String::from("\n## Environment\n\n| | |\n|---|---|\n");
    for (key, value) in folder.environment.lines() {
        let _ = writeln!(text, "| {key} | {value} |"); // into a String
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moving::timeline::{self, Bin};
    use crate::results::{Results, Row};
    use hdrhistogram::Histogram;

    #[test]
    fn a_page_is_made_from_the_folder_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::create(dir.path(), "something", &[]).unwrap();
        for run in 1..=3_u32 {
            let mut row = Row::new(vec![("pattern", "random".to_owned())], usize::try_from(run).unwrap());
            row.push("p50_us", f64::from(run) * 10.0);
            row.push("never", None);
            let mut histogram = Histogram::new(3).unwrap();
            histogram.record(u64::from(run) * 10_000).unwrap();
            results.histogram(&row.name(), &histogram).unwrap();
            let bins: Vec<Bin> =
                (1..4).map(|i| Bin { t_ms: f64::from(i), faults: 3, ..Bin::default() }).collect();
            results.timeline(&row.name(), &timeline::csv(&bins)).unwrap();
            results.add(&row).unwrap();
        }
        results.failure("x").unwrap();
        let text = write(dir.path()).unwrap();
        assert!(text.contains("| random | 3 | 20.0 (10.0 - 30.0) |"), "{text}");
        assert!(!text.contains("time-throughput"), "nobody looked at the memory: {text}");
        assert!(!text.contains("never") && text.contains("1 runs failed"), "{text}");
        for plot in ["latency-cdf", "latency-percentiles", "time-faults"] {
            assert!(text.contains(&format!("plots/{plot}.svg")), "{text}");
            assert!(dir.path().join("plots").join(plot).with_extension("svg").exists());
        }
    }

    #[test]
    fn a_folder_without_a_run_has_a_page_too() {
        let dir = tempfile::tempdir().unwrap();
        Results::create(dir.path(), "vs-criu", &[]).unwrap();
        assert!(write(dir.path()).unwrap().contains("Nothing was measured"));
    }

    #[test]
    fn ratios_need_both_sides() {
        let of = |value: f64| Spread::of(vec![value]);
        assert_eq!(ratio(of(3.0), of(2.0)), Some(1.5));
        assert_eq!((ratio(of(3.0), None), ratio(of(3.0), of(0.0))), (None, None));
        assert_eq!(cell(None), "");
    }
}
