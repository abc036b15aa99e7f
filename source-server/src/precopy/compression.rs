//! Whether pages are compressed before they are sent. Pure.
//!
//! What counts is the time until a batch is handed to the link, compressing included: on a slow link the sender waits for it, and
//! fewer bytes wait less. It depends on the link, the processor and the pages, and all three change; so both ways are tried
//! now and then, and the faster one is gone.

use std::str::FromStr;
use std::time::Duration;

use crate::limits;

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compress {
    /// Never.
    Off,
    /// Where it is faster.
    #[default]
    Auto,
    /// Whatever gets smaller by it.
    Lz4,
}

impl FromStr for Compress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "lz4" => Ok(Self::Lz4),
            other => Err(format!("{other:?} is none of: auto, off, lz4")),
        }
    }
}

/// Chooses, batch by batch.
#[derive(Debug)]
pub struct Choice {
    wanted: Compress,
    /// Nanoseconds for a byte of pages, as they are and compressed.
    plain: Option<f64>,
    lz4: Option<f64>,
    batches: u32,
}

impl Choice {
    /// Nothing is known of the link yet.
    #[must_use]
    pub const fn new(wanted: Compress) -> Self {
        Self { wanted, plain: None, lz4: None, batches: 0 }
    }

    /// Whether to compress the next batch.
    pub fn compresses(&mut self) -> bool {
        match self.wanted {
            Compress::Off => false,
            Compress::Lz4 => true,
            Compress::Auto => self.weigh(),
        }
    }

    fn weigh(&mut self) -> bool {
        // Until the link is found to be slower than any compression could be.
        let Some(plain) = self.plain.filter(|plain| *plain > limits::COMPRESS_ABOVE_NS_PER_BYTE) else {
            return false;
        };
        let Some(lz4) = self.lz4 else { return true };
        self.batches = self.batches.wrapping_add(1);
        let other = self.batches % limits::COMPRESS_TRY_OTHER == 0;
        (lz4 < plain) != other
    }

    /// A batch with so many bytes of pages was handed to the link.
    #[allow(clippy::cast_precision_loss)] // a batch
    pub fn sent(&mut self, compressed: bool, bytes: u64, took: Duration) {
        if bytes < limits::COMPRESS_MEASURED_BYTES {
            return;
        }
        let now = took.as_secs_f64() * 1e9 / bytes as f64;
        let known = if compressed { &mut self.lz4 } else { &mut self.plain };
        // A few batches fit into the buffers of a link without waiting, and one may wait long: none of them decides alone.
        *known = Some(known.map_or(now, |before| before + (now - before) / 4.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: u64 = 1 << 20;

    /// How many of 1000 batches are compressed, if a byte takes so many nanoseconds on the link and to compress,
    /// and gets smaller to this part. The link takes its first 4 MiB without waiting.
    #[allow(clippy::cast_precision_loss)]
    fn compressed(wanted: Compress, link: f64, effort: f64, part: f64) -> u32 {
        let mut choice = Choice::new(wanted);
        let (mut waiting, mut count) = (0.0_f64, 0);
        for _ in 0..1000 {
            let compress = choice.compresses();
            let (effort, part) = if compress { (effort, part) } else { (0.3, 1.0) };
            let bytes = BATCH as f64;
            // What is in the buffers goes out meanwhile.
            waiting = (waiting - effort * bytes / link).max(0.0) + bytes * part;
            let too_much = (waiting - 4.0 * bytes).max(0.0);
            waiting -= too_much;
            choice.sent(compress, BATCH, Duration::from_secs_f64((effort * bytes + too_much * link) * 1e-9));
            count += u32::from(compress);
        }
        count
    }

    #[test]
    fn slow_links_are_worth_it_and_fast_ones_are_not() {
        // 100 Mbit/s, 1 Gbit/s, 10 Gbit/s, loopback; pages that shrink to a third.
        assert!(compressed(Compress::Auto, 80.0, 2.5, 0.33) > 900);
        assert!(compressed(Compress::Auto, 8.0, 2.5, 0.33) > 700);
        assert_eq!(compressed(Compress::Auto, 0.8, 2.5, 0.33), 0);
        assert_eq!(compressed(Compress::Auto, 0.2, 2.5, 0.33), 0);
    }

    #[test]
    fn what_does_not_shrink_or_takes_too_long_is_left_as_it_is() {
        assert!(compressed(Compress::Auto, 80.0, 2.0, 1.0) < 100, "noise");
        assert!(compressed(Compress::Auto, 8.0, 20.0, 0.33) < 100, "a busy processor");
    }

    #[test]
    fn the_operator_has_the_last_word() {
        assert_eq!(compressed(Compress::Off, 80.0, 2.5, 0.33), 0);
        assert_eq!(compressed(Compress::Lz4, 0.2, 2.5, 0.33), 1000);
        assert_eq!("lz4".parse(), Ok(Compress::Lz4));
        assert!("gzip".parse::<Compress>().is_err());
    }
}
