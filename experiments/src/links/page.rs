//! What the results show: a table per figure, by condition and kind of link, and how they grow with the delay.

use std::fmt::Write as _;

use crate::page::{cell, find, latencies, medians, ratio, show};
use crate::plot::{Axis, Chart, Mark, Scale};
use crate::results::{Folder, Group, Spread};

/// The page of a results folder.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let groups = folder.table.groups();
    let mut kinds: Vec<&str> = Vec::new();
    for group in &groups {
        if !kinds.contains(&group.value("link")) {
            kinds.push(group.value("link"));
        }
    }
    let mut text = String::from("# links: faults and push by kind of link and condition\n");
    for (title, column, about) in FIGURES {
        let _ = write!(text, "\n## {title}\n\n{about}\n\n"); // into a String
        text += &by_condition(&groups, &kinds, column);
    }
    text += &over_delay(folder, &groups, &kinds, "p99_us", "99th percentile of fault latency in us")?;
    text += &over_delay(folder, &groups, &kinds, "push_mib_s", "push in MiB/s")?;
    text += &latencies(
        folder,
        "without-delay",
        |group| group.value("delay_ms") == "0",
        |group| format!("{} over {}", group.value("link"), group.value("wire")),
    )?;
    text += "\n## All figures\n\n";
    text += &medians(&folder.table, &[]);
    Ok(text)
}

const FIGURES: [(&str, &str, &str); 4] = [
    (
        "Fault latency, median",
        "p50_us",
        "In us, as the application sees it, with the push at full rate; in brackets in round trips, where \
         there is a delay.",
    ),
    (
        "Fault latency, 99th percentile",
        "p99_us",
        "In us; in brackets in round trips, where there is a delay.",
    ),
    ("Push", "push_mib_s", "In MiB/s; in brackets the ratio to tcp."),
    (
        "Drain",
        "drain_ms",
        "From the resume to the last page, in ms; nothing where it was not waited for to the end.",
    ),
];

/// A line per condition, a column per kind.
fn by_condition(groups: &[Group<'_>], kinds: &[&str], column: &str) -> String {
    let mut text = format!("| condition | round trip us | {} |\n|---|---|", kinds.join(" | "));
    text += &"---|".repeat(kinds.len());
    text.push('\n');
    let mut seen: Vec<&[String]> = Vec::new();
    for group in groups {
        // All of the case but its first column, the kind of link.
        let condition = &group.case[1..];
        if seen.contains(&condition) {
            continue;
        }
        seen.push(condition);
        let of = |kind: &str| {
            let case = [
                ("link", kind),
                ("wire", group.value("wire")),
                ("delay_ms", group.value("delay_ms")),
                ("loss_percent", group.value("loss_percent")),
            ];
            find(groups, &case)
        };
        let _ = write!(text, "| {} | {} |", named(group), cell(middle(group.spread("round_trip_us")))); // into a String
        for kind in kinds {
            let Some(there) = of(kind) else {
                text += " |";
                continue;
            };
            let value = middle(there.spread(column));
            // Without delay the round trip is one of wake-ups: what a fault is compared with says more about them.
            let is_delayed = group.value("delay_ms") != "0";
            let beside = match column {
                "p50_us" | "p99_us" if !is_delayed => None,
                "p50_us" => middle(there.spread("p50_round_trips")),
                "p99_us" => middle(there.spread("p99_round_trips")),
                _ if *kind == "tcp" => None,
                _ => ratio(there.spread(column), of("tcp").and_then(|tcp| tcp.spread(column))),
            };
            let beside = beside.map_or_else(String::new, |value| format!(" ({value:.2})"));
            let _ = write!(text, " {}{beside} |", cell(value)); // into a String
        }
        text.push('\n');
    }
    text
}

fn named(group: &Group<'_>) -> String {
    let (delay, loss) = (group.value("delay_ms"), group.value("loss_percent"));
    if delay == "0" { group.value("wire").to_owned() } else { format!("delay {delay} ms, loss {loss} %") }
}

fn middle(spread: Option<Spread>) -> Option<f64> {
    spread.map(|spread| spread.middle)
}

/// A chart of the emulated conditions: a line per kind and loss.
fn over_delay(
    folder: &Folder,
    groups: &[Group<'_>],
    kinds: &[&str],
    column: &str,
    label: &str,
) -> anyhow::Result<String> {
    let x = Axis::new("delay added to each way in ms", Scale::Log);
    let mut chart = Chart::new(format!("{label} by delay, loss and link"), x, Axis::new(label, Scale::Log));
    let mut losses: Vec<&str> = groups.iter().map(|group| group.value("loss_percent")).collect();
    losses.sort_unstable();
    losses.dedup();
    for kind in kinds {
        for loss in &losses {
            let of =
                |group: &&Group<'_>| group.value("link") == *kind && group.value("loss_percent") == *loss;
            let point = |group: &Group<'_>| {
                Some((group.value("delay_ms").parse().ok()?, group.spread(column)?.middle))
            };
            let mut points: Vec<(f64, f64)> = groups.iter().filter(of).filter_map(point).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let colour = chart.series.len();
            chart.add(format!("{kind}, loss {loss} %"), colour, Mark::LineAndDots, points);
        }
    }
    show(folder, &format!("{column}-by-delay"), &chart)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Results, Row};

    #[test]
    fn a_condition_is_a_line_and_a_kind_a_column() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::create(dir.path(), "links", &[]).unwrap();
        for (kind, wire, delay, p50, push) in [
            ("tcp", "veth", "0", 30.0, 1000.0),
            ("quic", "veth", "0", 60.0, 500.0),
            ("tcp", "emulated 1 Gbit/s", "10", 20_000.0, 100.0),
        ] {
            let case = vec![
                ("link", kind.to_owned()),
                ("wire", wire.to_owned()),
                ("delay_ms", delay.to_owned()),
                ("loss_percent", "0.5".to_owned()),
            ];
            let mut row = Row::new(case, 1);
            for (column, value) in [
                ("round_trip_us", 20.0),
                ("p50_us", p50),
                ("p99_us", p50 * 3.0),
                ("p50_round_trips", p50 / 20.0),
                ("p99_round_trips", p50 / 10.0),
                ("push_mib_s", push),
            ] {
                row.push(column, value);
            }
            row.push("drain_ms", None);
            results.add(&row).unwrap();
        }
        let text = page(&Folder::open(dir.path()).unwrap()).unwrap();
        assert!(text.contains("| veth | 20.0 | 30.0 | 60.0 |"), "{text}");
        assert!(text.contains("| delay 10 ms, loss 0.5 % | 20.0 | 20000 (1000.00) | |"), "{text}");
        assert!(text.contains("| veth | 20.0 | 1000 | 500 (0.50) |"), "{text}");
        assert!(
            dir.path().join("plots/p99_us-by-delay.svg").exists() || text.contains("p99-us-by-delay.svg")
        );
    }
}
