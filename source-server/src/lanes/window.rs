//! How much of the push may be on its way.
//!
//! An answer to a fault waits on the link behind everything that the push has put there before, so the push keeps
//! no more on its way than the link needs: what fits on it, and a queue of [`limits::PUSH_QUEUE`]. The kernel holds
//! to it by the size of the send buffer, which counts what is unsent as well as what is not acknowledged.

use std::os::fd::AsFd;
use std::time::Duration;

use kernel::tcp::Path;
use nix::sys::socket::{setsockopt, sockopt};
use protocol::link::Stream;

use crate::limits;

/// How many measurements the rate is the highest of: one may fall into a pause of the receiver.
const RATES: usize = 8;

/// The window of a push lane over TCP.
#[derive(Debug, Default)]
pub(super) struct Window {
    rates: [u64; RATES],
    next: usize,
    set: usize,
}

impl Window {
    /// Follows what the kernel has measured, in a microsecond. Where it measures nothing, or the link is long,
    /// nothing happens.
    pub(super) fn follow(&mut self, lane: &Stream) {
        let Ok(Some(path)) = kernel::tcp::path(lane.as_fd()) else { return };
        if path.delivery_rate == 0 || path.min_rtt > limits::PUSH_WINDOW_ROUND_TRIP {
            return;
        }
        let wanted = self.wanted(path);
        // Not for every tremor.
        if wanted.abs_diff(self.set) > self.set / 8 {
            self.set = wanted;
            // The kernel doubles what it is told, for its own overhead; pages travel without any.
            let half = wanted / 2;
            if setsockopt(lane, sockopt::SndBufForce, &half).is_err() {
                let _ = setsockopt(lane, sockopt::SndBuf, &half);
            }
        }
    }

    fn wanted(&mut self, path: Path) -> usize {
        self.rates[self.next % RATES] = path.delivery_rate;
        self.next += 1;
        let rate = self.rates.iter().copied().max().unwrap_or(0);
        let time = path.min_rtt + path.min_rtt / 4 + limits::PUSH_QUEUE;
        let bytes = u128::from(rate) * time.as_nanos() / Duration::from_secs(1).as_nanos();
        usize::try_from(bytes).unwrap_or(usize::MAX).clamp(limits::PUSH_WINDOW_MIN, limits::PUSH_WINDOW_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(window: &mut Window, mbit: u64, rtt_us: u64) -> usize {
        window.wanted(Path { min_rtt: Duration::from_micros(rtt_us), delivery_rate: mbit * 125_000 })
    }

    #[test]
    fn holds_what_fits_on_the_link_and_a_short_queue() {
        let queue = |mbit: u64| usize::try_from(mbit * 125_000 / 2000).unwrap();
        let gigabit = wanted(&mut Window::default(), 1000, 200);
        assert_eq!(gigabit, limits::PUSH_WINDOW_MIN.max(31_250 + queue(1000)));
        assert_eq!(wanted(&mut Window::default(), 10_000, 1000), 1_562_500 + queue(10_000));
        assert_eq!(wanted(&mut Window::default(), 1, 100), limits::PUSH_WINDOW_MIN);
        assert_eq!(wanted(&mut Window::default(), 100_000, 200_000), limits::PUSH_WINDOW_MAX);
    }

    #[test]
    fn a_pause_of_the_receiver_does_not_shut_it() {
        let mut window = Window::default();
        let before = wanted(&mut window, 10_000, 1000);
        assert_eq!(wanted(&mut window, 10, 1000), before);
        for _ in 0..RATES {
            wanted(&mut window, 10, 1000);
        }
        assert!(wanted(&mut window, 10, 1000) < before);
    }
}
