//! What a stream looked like, and the page that shows it.

use std::fmt::Write as _;

use super::Arrival;
use crate::page::{medians, show};
use crate::plot::{Axis, Chart, Mark, Scale};
use crate::results::Folder;
use crate::timeline::{Bins, first_lasting, longest_gap};

const BIN_NS: u64 = 10_000_000;
/// Bins of a second, and the bins in a row that say whether the stream is back.
const BINS_PER_SECOND: usize = 100;
const LASTING_BINS: usize = 10;
/// The part of the rate before at which the stream counts as back.
const BACK: f64 = 0.9;

/// What the client saw, counted from the first byte after the gap.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Seen {
    /// The middle of the bins before the gap.
    pub(super) steady_mbit_s: f64,
    /// The longest time without a byte.
    pub(super) gap_ms: f64,
    /// Mean over the first second after the gap.
    pub(super) first_second_mbit_s: f64,
    /// From the end of the gap until the rate is back.
    pub(super) back_ms: Option<f64>,
    /// When each bin begins, and the bytes in it.
    bins: Vec<(f64, usize)>,
}

impl Seen {
    pub(super) fn of(arrivals: &[Arrival]) -> Option<Self> {
        let moments: Vec<u64> = arrivals.iter().map(|arrival| arrival.at_ns).collect();
        let (from, to) = longest_gap(&moments)?;
        let bins = Bins { origin_ns: to, width_ns: BIN_NS };
        let cut = bins.cut(arrivals, |arrival| arrival.at_ns);
        let bytes: Vec<(i64, usize)> = cut
            .iter()
            .map(|(bin, in_bin)| (*bin, in_bin.iter().map(|arrival| arrival.bytes).sum()))
            .collect();
        let gap_bin = bins.of(from);
        // The first bin and the one in which the gap begins are not whole.
        let mut before: Vec<usize> =
            bytes.iter().skip(1).filter(|bin| bin.0 < gap_bin).map(|bin| bin.1).collect();
        before.sort_unstable();
        let steady = mbit_s(*before.get(before.len() / 2)?);
        let after: Vec<f64> = bytes.iter().filter(|bin| bin.0 >= 0).map(|bin| mbit_s(bin.1)).collect();
        let first = &after[..after.len().min(BINS_PER_SECOND)];
        #[expect(clippy::cast_precision_loss, reason = "times and counts far below 2^53")]
        Some(Self {
            steady_mbit_s: steady,
            gap_ms: (to - from) as f64 / 1e6,
            first_second_mbit_s: first.iter().sum::<f64>() / first.len().max(1) as f64,
            back_ms: first_lasting(&after, LASTING_BINS, |rate| rate >= steady * BACK)
                .map(|bin| bins.start_ms(bin as i64)),
            bins: bytes.into_iter().map(|(bin, bytes)| (bins.start_ms(bin), bytes)).collect(),
        })
    }

    pub(super) fn csv(&self) -> String {
        let mut text = String::from("t_ms,bytes\n");
        for (t_ms, bytes) in &self.bins {
            let _ = writeln!(text, "{t_ms},{bytes}"); // into a String
        }
        text
    }
}

#[expect(clippy::cast_precision_loss, reason = "bytes of a bin")]
fn mbit_s(bytes: usize) -> f64 {
    bytes as f64 * 8.0 / 1e6 / (BIN_NS as f64 / 1e9)
}

/// The page of a results folder.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from("# tcp-stream: a bulk stream through a move of its server\n\n");
    text += &medians(&folder.table, &[]);
    text += "\n`gap_ms` is the longest time in which the client received no byte, `back_ms` the time from the end of the gap \
        until four in five of ten bins of 10 ms are at 90 % of the rate before. Every byte was checked.\n";
    for group in folder.table.groups() {
        let title = format!("bytes received, client's link of {} Mbit/s", group.value("rate_mbit"));
        let x = Axis::new("ms since the first byte after the gap", Scale::Linear);
        let mut chart = Chart::new(title, x, Axis::new("Mbit/s per bin of 10 ms", Scale::Linear));
        for (colour, row) in group.rows.iter().enumerate() {
            let points = folder.timeline(row).map(|csv| points(&csv)).unwrap_or_default();
            chart.add(format!("run {}", row.run), colour, Mark::Thin, points);
        }
        text += &show(folder, &format!("stream-{}", group.value("rate_mbit")), &chart)?;
    }
    Ok(text)
}

/// The rates of a timeline.
fn points(csv: &str) -> Vec<(f64, f64)> {
    let point = |line: &str| {
        let (t_ms, bytes) = line.split_once(',')?;
        Some((t_ms.parse().ok()?, mbit_s(bytes.parse().ok()?)))
    };
    csv.lines().skip(1).filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_with_a_gap_is_described() {
        // 10 000 bytes per ms are 80 Mbit/s; a gap from 500 to 620 ms; half the rate for 50 ms behind it.
        let arrival = |ms: u64| Arrival { at_ns: 1_000_000 * (1000 + ms), bytes: 10_000 };
        let slow = (620..670).filter(|ms| ms % 2 == 0);
        let arrivals: Vec<Arrival> = (0..=500).chain(slow).chain(670..2000).map(arrival).collect();
        let seen = Seen::of(&arrivals).unwrap();
        assert!((seen.steady_mbit_s - 80.0).abs() < 0.1 && (seen.gap_ms - 120.0).abs() < 0.1, "{seen:?}");
        assert_eq!(seen.back_ms, Some(50.0));
        assert!((seen.first_second_mbit_s - 78.0).abs() < 0.5, "{}", seen.first_second_mbit_s);
        let csv = seen.csv();
        assert!(
            csv.contains("\n0,50000\n") && csv.contains("\n-50,0\n") && csv.contains("\n60,100000\n"),
            "{csv}"
        );
        assert_eq!(points(&csv).len(), csv.lines().count() - 1);
        assert_eq!(Seen::of(&arrivals[..1]), None);
    }
}
