//! Medians, their spread, and ratios, as Markdown.

use std::fmt::Write as _;

use super::Load;
use crate::page::{self, against_floors, cell, find, latencies};
use crate::results::{Folder, Group};

/// The rows of a table: what they are called and the column they come from.
const ROWS: [(&str, &str); 10] = [
    ("fault mean us", "mean_us"),
    ("p50 us", "p50_us"),
    ("p99 us", "p99_us"),
    ("max us", "max_us"),
    ("last page ms", "last_page_ms"),
    ("blackout ms", "blackout_ms"),
    ("source CPU s/GiB", "source_cpu_s_per_gib"),
    ("destination CPU s/GiB", "destination_cpu_s_per_gib"),
    ("source peak MiB", "source_peak_mib"),
    ("destination peak MiB", "destination_peak_mib"),
];

/// A table per size and load of what was measured so far, and the latencies.
pub(super) fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = format!("# vs-criu: ours and CRIU {} in one run\n", folder.environment.get("criu"));
    let groups = folder.table.groups();
    let mut sizes: Vec<&str> = groups.iter().map(|group| group.value("mib")).collect();
    sizes.sort_by_key(|size| size.parse::<usize>().unwrap_or(0));
    sizes.dedup();
    for mib in sizes {
        for load in Load::ALL.map(Load::name) {
            let of = |contender| find(&groups, &[("contender", contender), ("mib", mib), ("load", load)]);
            let (ours, criu) = (of("ours"), of("criu"));
            if ours.is_none() && criu.is_none() {
                continue;
            }
            text += &table(&format!("{mib} MiB, {load}"), ours, criu);
            let this = |group: &Group<'_>| group.value("mib") == mib && group.value("load") == load;
            text += &latencies(folder, &format!("{mib} MiB {load}"), this, |group| {
                group.value("contender").to_owned()
            })?;
        }
    }
    Ok(text + &against_floors(folder)?)
}

fn table(title: &str, ours: Option<&Group<'_>>, criu: Option<&Group<'_>>) -> String {
    let runs = |group: Option<&Group<'_>>| group.map_or(0, |group| group.rows.len());
    let mut text = format!("\n## {title}, {} runs each\n\n", runs(ours).min(runs(criu)));
    text += "| median (least - largest) | ours | criu | ours / criu |\n|---|---|---|---|\n";
    for (name, column) in ROWS {
        let [a, b] = [ours, criu].map(|group| group.and_then(|group| group.spread(column)));
        if a.is_none_or(|a| a.most == 0.0) && b.is_none_or(|b| b.most == 0.0) {
            continue;
        }
        let [shown_a, shown_b] =
            [a, b].map(|spread| spread.map(|spread| spread.to_string()).unwrap_or_default());
        let _ = writeln!(text, "| {name} | {shown_a} | {shown_b} | {} |", cell(page::ratio(a, b))); // into a String
    }
    let cut = criu.map_or(0, |criu| criu.numbers("cut").into_iter().filter(|cut| *cut > 0.0).count());
    if cut > 0 {
        let _ = writeln!(
            text,
            "\n{cut} of CRIU's runs were cut before their last page, which counts as that moment; their processor \
             time is left out."
        );
    }
    if let Some(own) = ours.and_then(|ours| ours.spread("own_share_ms")) {
        let _ = writeln!(text, "\nOur own share of the blackout (less CRIU's dump and restore): {own} ms.");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Results, Row};

    #[test]
    fn both_stand_side_by_side_with_their_ratio() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::create(dir.path(), "vs-criu", &[("criu", "4.2".to_owned())]).unwrap();
        for (contender, last_page) in [("ours", 400.0), ("criu", 8000.0)] {
            let names = ["contender", "mib", "load"].into_iter();
            let case = names.zip([contender, "512", "idle"].map(str::to_owned)).collect();
            let mut row = Row::new(case, 1);
            row.push("mean_us", None);
            row.push("last_page_ms", last_page);
            row.push("own_share_ms", (contender == "ours").then_some(12.0));
            results.add(&row).unwrap();
        }
        let text = page(&Folder::open(dir.path()).unwrap()).unwrap();
        assert!(text.contains("CRIU 4.2") && text.contains("## 512 MiB, idle, 1 runs each"), "{text}");
        assert!(text.contains("| last page ms | 400 | 8000 | 0.050 |"), "{text}");
        assert!(text.contains("12.0 ms") && !text.contains("fault mean"), "{text}");
    }
}
