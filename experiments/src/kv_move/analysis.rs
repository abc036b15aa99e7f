//! What the clients saw: before the move, around it, and when it was over for them. Pure.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use crate::kv::Timed;
use crate::report::Latency;
use crate::timeline::{Bins, first_lasting};

const BIN_NS: u64 = 50_000_000;
const SECOND_NS: u64 = 1_000_000_000;
/// Requests of the beginning that do not count: the clients start one after the other.
const WARM_UP_NS: u64 = 300_000_000;
/// Bins in a row that say whether the clients are back to normal, and what is normal.
const LASTING_BINS: usize = 5;
const NORMAL: f64 = 1.2;

/// What the clients saw, counted from the first reply after the stall.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Before the move was started.
    pub(super) before: Latency,
    /// Requests per second then.
    pub(super) before_requests_s: f64,
    /// Requests sent within a second from the first reply after the stall.
    pub(super) first_second: Latency,
    /// Those sent later.
    pub(super) after: Latency,
    /// The longest request.
    pub(super) stall_ms: f64,
    /// Until the 99th percentile is at most 1.2 times what it was.
    pub(super) back_ms: Option<f64>,
    bins: Vec<(f64, Latency)>,
}

impl Seen {
    /// `times` rise; `move_ns` is when the move was started.
    pub(super) fn of(times: &[Timed], move_ns: u64) -> Option<Self> {
        let first_ns = times.first()?.at_ns + WARM_UP_NS;
        let stall = times.iter().max_by_key(|timed| timed.took_ns)?;
        let resume_ns = resumed(times, stall);
        let bins = Bins { origin_ns: resume_ns, width_ns: BIN_NS };
        let latencies: Vec<(i64, Latency)> =
            bins.cut(times, |timed| timed.at_ns).into_iter().map(|(bin, of)| (bin, latency(of))).collect();
        let between = |from: u64, to: u64| {
            let from = times.partition_point(|timed| timed.at_ns < from);
            let to = times.partition_point(|timed| timed.at_ns < to);
            latency(times.get(from..to).unwrap_or_default())
        };
        let before = between(first_ns, move_ns);
        if before.count == 0 {
            return None;
        }
        let (first_bin, move_bin) = (bins.of(first_ns), bins.of(move_ns));
        let p99 = |wanted: &dyn Fn(i64) -> bool| -> Vec<f64> {
            latencies.iter().filter(|(bin, of)| wanted(*bin) && of.count > 0).map(|(_, of)| of.p99).collect()
        };
        // What is normal for a bin is compared with bins: the 99th percentile of few requests is another one.
        let mut normal = p99(&|bin| bin > first_bin && bin < move_bin);
        normal.sort_by(f64::total_cmp);
        let normal = normal.get(normal.len() / 2).copied().unwrap_or(before.p99);
        let back = first_lasting(&p99(&|bin| bin >= 0), LASTING_BINS, |p99| p99 <= normal * NORMAL);
        #[expect(clippy::cast_precision_loss, reason = "times below 104 days")]
        Some(Self {
            before,
            before_requests_s: before.count as f64 / ((move_ns - first_ns) as f64 / 1e9),
            first_second: between(resume_ns, resume_ns + SECOND_NS),
            after: between(resume_ns + SECOND_NS, u64::MAX),
            stall_ms: stall.took_ns as f64 / 1e6,
            back_ms: back.map(|bin| bins.start_ms(bin as i64)),
            bins: latencies.into_iter().map(|(bin, of)| (bins.start_ms(bin), of)).collect(),
        })
    }

    pub(super) fn csv(&self) -> String {
        let mut text = String::from("t_ms,requests,p50_us,p99_us,max_us\n");
        for (t_ms, Latency { count, p50, p99, max, .. }) in &self.bins {
            let _ = writeln!(text, "{t_ms},{count},{p50:.1},{p99:.1},{max:.1}"); // into a String
        }
        text
    }
}

/// The first reply to one of the requests that were open in the middle of the longest one.
fn resumed(times: &[Timed], stall: &Timed) -> u64 {
    let middle = stall.at_ns + stall.took_ns / 2;
    let ended = |timed: &Timed| timed.at_ns + timed.took_ns;
    let open = times.iter().filter(|timed| timed.at_ns <= middle && ended(timed) >= middle);
    open.map(ended).min().unwrap_or_else(|| ended(stall))
}

fn latency(times: &[Timed]) -> Latency {
    let Ok(mut histogram) = Histogram::<u64>::new(3) else { return Latency::default() };
    for timed in times {
        // It grows to hold whatever comes.
        let _ = histogram.record(timed.took_ns);
    }
    Latency::of_ns(&histogram)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Two clients that send every millisecond: 100 us each, a stall from 2000 ms that the first client sees end at
    /// 2150 and the second at 2160, 1 ms each until 2400, then as before.
    fn times() -> Vec<Timed> {
        let mut times = Vec::new();
        for resumed in [2150, 2160] {
            for ms in (0..=2000).chain(resumed..4000) {
                let took_ns = match ms {
                    2000 => (resumed - 2000) * MS,
                    2001..2400 => MS,
                    _ => MS / 10,
                };
                times.push(Timed { at_ns: ms * MS + 7, took_ns });
            }
        }
        times.sort_unstable_by_key(|timed| timed.at_ns);
        times
    }

    #[test]
    fn a_stall_and_its_aftermath_are_described() {
        let seen = Seen::of(&times(), 1900 * MS).unwrap();
        assert!((seen.stall_ms - 160.0).abs() < 0.01, "{seen:?}");
        assert!((seen.before_requests_s - 2000.0).abs() < 2.0, "{}", seen.before_requests_s);
        assert!((seen.before.p99 - 100.0).abs() < 1.0 && seen.before.count == 2 * 1600, "{:?}", seen.before);
        assert!((seen.first_second.p99 - 1000.0).abs() < 5.0, "{:?}", seen.first_second);
        assert!((seen.after.max - 100.0).abs() < 1.0, "{:?}", seen.after);
        assert_eq!(seen.back_ms, Some(250.0));
        let csv = seen.csv();
        assert!(csv.contains("\n0,90,1000"), "two clients, the second one 10 ms later: {csv}");
        assert!(csv.lines().any(|line| line.starts_with("-150,") && line.contains("160")), "{csv}");
    }

    #[test]
    fn without_requests_before_the_move_there_is_nothing_to_compare_with() {
        assert!(Seen::of(&times(), 0).is_none());
        assert!(Seen::of(&[], 0).is_none());
    }
}
