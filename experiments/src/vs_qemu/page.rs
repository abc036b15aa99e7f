//! The page of the results.

use std::fmt::Write as _;

use crate::page::{cell, find, latencies, medians, ratio};
use crate::results::Folder;

const COLUMNS: [(&str, &str); 6] = [
    ("fault mean us", "mean_us"),
    ("p50 us", "p50_us"),
    ("p99 us", "p99_us"),
    ("max us", "max_us"),
    ("last page ms", "drain_ms"),
    ("blackout ms", "blackout_ms"),
];

/// The page of a results folder.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = format!("# vs-qemu: ours and QEMU {} in one run\n", folder.environment.get("qemu"));
    let groups = folder.table.groups();
    for qemu in groups.iter().filter(|group| group.value("mover") == "qemu") {
        let (mib, background) = (qemu.value("mib"), qemu.value("background"));
        let ours = find(&groups, &[("mover", "ours"), ("mib", mib), ("background", background)]);
        let title = format!("{mib} MiB, background {background}");
        let _ = write!(
            text,
            "\n## {title}\n\n| median (least - most) | ours | qemu | ours / qemu |\n|---|---|---|---|\n"
        ); // into a String
        for (name, column) in COLUMNS {
            let (a, b) = (ours.and_then(|ours| ours.spread(column)), qemu.spread(column));
            let shown =
                |side: Option<crate::results::Spread>| side.map_or_else(String::new, |side| side.to_string());
            let _ = writeln!(text, "| {name} | {} | {} | {} |", shown(a), shown(b), cell(ratio(a, b)));
        }
        text += &latencies(
            folder,
            &title,
            |group| (group.value("mib"), group.value("background")) == (mib, background),
            |group| group.value("mover").to_owned(),
        )?;
    }
    text += "\nQEMU's faults are reads of at least 30 us: less is what a guest's first access to a page that is there \
        costs in a virtual machine. Ours are reads of at least 3 us, so that QEMU's mean and median do not count what \
        ours do.\n\n## All figures\n\n";
    Ok(text + &medians(&folder.table, &[]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Results, Row};

    #[test]
    fn both_stand_side_by_side_with_their_ratio() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::create(dir.path(), "vs-qemu", &[("qemu", "9.9".to_owned())]).unwrap();
        for (mover, mean) in [("ours", 30.0), ("qemu", 300.0)] {
            let case = [("mover", mover), ("mib", "64"), ("background", "unlimited")];
            let mut row = Row::new(case.map(|(column, value)| (column, value.to_owned())).to_vec(), 1);
            row.push("mean_us", mean);
            results.add(&row).unwrap();
        }
        let text = page(&Folder::open(dir.path()).unwrap()).unwrap();
        assert!(
            text.contains("QEMU 9.9") && text.contains("| fault mean us | 30.0 | 300 | 0.100 |"),
            "{text}"
        );
    }
}
