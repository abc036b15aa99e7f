//! Medians, their spread, and ratios, as Markdown.

use std::fmt::Write as _;

use super::Load;
use super::contender::{Contender, Row, Setting};

/// A column: what it is called and where it stands in a row.
type Column = (&'static str, fn(&Row) -> f64);

const COLUMNS: [Column; 10] = [
    ("fault mean us", |row| row.latency.mean),
    ("p50 us", |row| row.latency.p50),
    ("p99 us", |row| row.latency.p99),
    ("max us", |row| row.latency.max),
    ("last page ms", |row| row.last_page_ms),
    ("blackout ms", |row| row.blackout_ms),
    ("source CPU s/GiB", |row| row.source_cpu_s_per_gib),
    ("destination CPU s/GiB", |row| row.destination_cpu_s_per_gib),
    ("source peak MiB", |row| row.source_peak_mib),
    ("destination peak MiB", |row| row.destination_peak_mib),
];

/// The middle of `values` (the lower one of two), the least and the largest.
fn spread(mut values: Vec<f64>) -> Option<(f64, f64, f64)> {
    // Of a run that was cut not everything is known.
    values.retain(|value| !value.is_nan());
    values.sort_by(f64::total_cmp);
    let middle = values.len().checked_sub(1)? / 2;
    Some((values[middle], values[0], values[values.len() - 1]))
}

fn number(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// The tables of what was measured so far.
pub(super) fn markdown(rows: &[Row], setting: &Setting) -> String {
    let mut out = format!("# vs-criu: ours and CRIU {} in one run\n", setting.criu_version);
    let mut sizes: Vec<usize> = rows.iter().map(|row| row.mib).collect();
    sizes.dedup();
    // Writing to a String cannot fail.
    for mib in sizes {
        for load in Load::ALL {
            let of = |contender: Contender| {
                rows.iter()
                    .filter(|row| row.mib == mib && row.load == load && row.contender == contender)
                    .collect::<Vec<_>>()
            };
            let (ours, criu) = (of(Contender::Ours), of(Contender::Criu));
            if ours.is_empty() && criu.is_empty() {
                continue;
            }
            let runs = ours.len().min(criu.len());
            let _ = writeln!(out, "\n## {mib} MiB, {}, {runs} runs each\n", load.name());
            let _ =
                writeln!(out, "| median (least - largest) | ours | criu | ours / criu |\n|---|---|---|---|");
            for (name, value) in COLUMNS {
                let side = |rows: &[&Row]| spread(rows.iter().map(|row| value(row)).collect());
                let shown = |side: Option<(f64, f64, f64)>| {
                    side.map_or_else(String::new, |(middle, least, most)| {
                        format!("{} ({} - {})", number(middle), number(least), number(most))
                    })
                };
                let (a, b) = (side(&ours), side(&criu));
                if a.is_some_and(|a| a.2 == 0.0) && b.is_some_and(|b| b.2 == 0.0) {
                    continue;
                }
                let ratio = match (a, b) {
                    (Some(a), Some(b)) if b.0 > 0.0 => format!("{:.2}", a.0 / b.0),
                    _ => String::new(),
                };
                let _ = writeln!(out, "| {name} | {} | {} | {ratio} |", shown(a), shown(b));
            }
            let cut = criu.iter().filter(|row| row.cut).count();
            if cut > 0 {
                let _ = writeln!(
                    out,
                    "\n{cut} of CRIU's runs were cut before their last page, which counts as that moment; their \
                     processor time is left out."
                );
            }
            let own = spread(ours.iter().filter_map(|row| row.own_share_ms).collect());
            if let Some((middle, least, most)) = own {
                let _ = writeln!(
                    out,
                    "\nOur own share of the blackout (less CRIU's dump and restore): {} ms ({} - {}).",
                    number(middle),
                    number(least),
                    number(most)
                );
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_ends() {
        assert_eq!(spread(vec![3.0, 1.0, 2.0]), Some((2.0, 1.0, 3.0)));
        assert_eq!(spread(vec![4.0, 1.0]), Some((1.0, 1.0, 4.0)));
        assert_eq!(spread(vec![]), None);
    }
}
