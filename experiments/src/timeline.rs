//! What happened when, cut into bins of equal width around a moment. Pure.

/// Bins of some width; the moment `origin_ns` begins bin 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bins {
    /// The moment that counts as 0, in nanoseconds of any clock.
    pub origin_ns: u64,
    /// Width of a bin.
    pub width_ns: u64,
}

impl Bins {
    /// The bin of a moment of the same clock; below 0 before the origin.
    #[must_use]
    pub fn of(self, at_ns: u64) -> i64 {
        let apart = i128::from(at_ns) - i128::from(self.origin_ns);
        i64::try_from(apart.div_euclid(i128::from(self.width_ns.max(1)))).unwrap_or(i64::MAX)
    }

    /// When a bin begins, in milliseconds from the origin.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "experiments of less than 104 days")]
    pub fn start_ms(self, bin: i64) -> f64 {
        bin as f64 * self.width_ns as f64 / 1e6
    }

    /// `items`, which rise in time, by bin: every bin from the first to the last that has any, also empty ones.
    pub fn cut<T>(self, items: &[T], at_ns: impl Fn(&T) -> u64) -> Vec<(i64, &[T])> {
        let (Some(first), Some(last)) = (items.first(), items.last()) else { return Vec::new() };
        let mut rest = items;
        let mut cut = Vec::new();
        for bin in self.of(at_ns(first))..=self.of(at_ns(last)) {
            let count = rest.partition_point(|item| self.of(at_ns(item)) <= bin);
            let (in_bin, behind) = rest.split_at(count);
            cut.push((bin, in_bin));
            rest = behind;
        }
        cut
    }
}

/// The longest time between two of some rising moments: when it began and when it ended.
#[must_use]
pub fn longest_gap(moments: &[u64]) -> Option<(u64, u64)> {
    moments.windows(2).map(|pair| (pair[0], pair[1])).max_by_key(|(from, to)| to.saturating_sub(*from))
}

/// The first good value from which on at least four in five of `run` values in a row are good: one good value by chance
/// is no recovery, and neither is one bad value a relapse.
#[must_use]
pub fn first_lasting(values: &[f64], run: usize, is_good: impl Fn(f64) -> bool) -> Option<usize> {
    values.windows(run.max(1)).position(|window| {
        let good = window.iter().filter(|value| is_good(**value)).count();
        is_good(window[0]) && good * 5 >= window.len() * 4
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_in_the_bin_of_its_time_and_empty_bins_are_there() {
        let bins = Bins { origin_ns: 1000, width_ns: 10 };
        assert_eq!([999, 1000, 1009, 1010, 980].map(|at| bins.of(at)), [-1, 0, 0, 1, -2]);
        let cut = bins.cut(&[985, 999, 1000, 1003, 1031], |at| *at);
        let expected: [(i64, &[u64]); 6] =
            [(-2, &[985]), (-1, &[999]), (0, &[1000, 1003]), (1, &[]), (2, &[]), (3, &[1031])];
        assert_eq!(cut, expected);
        assert!(bins.cut(&[], |at: &u64| *at).is_empty());
        assert!((Bins { origin_ns: 0, width_ns: 10_000_000 }.start_ms(-3) + 30.0).abs() < 1e-9);
    }

    #[test]
    fn the_longest_gap_is_found() {
        assert_eq!(longest_gap(&[1, 2, 10, 12]), Some((2, 10)));
        assert_eq!((longest_gap(&[1]), longest_gap(&[])), (None, None));
    }

    #[test]
    fn a_lucky_value_is_no_recovery_and_an_unlucky_one_no_relapse() {
        let values = [9.0, 1.0, 9.0, 9.0, 1.0, 1.0, 8.0, 1.0, 1.0];
        assert_eq!(first_lasting(&values, 5, |value| value <= 2.0), Some(4));
        assert_eq!(first_lasting(&values, 5, |value| value <= 0.5), None);
        assert_eq!(first_lasting(&[], 5, |_| true), None);
    }
}
