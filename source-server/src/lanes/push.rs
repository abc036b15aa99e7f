//! Unasked pages out, acknowledgements in: a thread for each direction of a push lane. Several lanes share one order
//! and one pace; each takes the next chunk when it has sent the one before.

use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use host::{privileges, waiting};
use protocol::link::Stream;
use protocol::units::pages_to_bytes;
use protocol::wire::codec::CodecError;
use protocol::wire::frame::{HEADER_LEN, Header, Kind, RUN_HEADER_LEN, decode_ack};
use protocol::wire::limits::DEAD_LINK_AFTER;

use super::aside::{Aside, CALLING_THREAD};
use super::order::Order;
use super::window::Window;
use super::{LaneError, Lanes};
use crate::ledger::index_of;
use crate::limits::{self, PUSH_FRAME_PAGES};
use crate::store::Scratch;

/// How fast the push may be; a demand is never held back by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As fast as the link and the destination take it.
    Unlimited,
    /// At most so many bytes per second.
    BytesPerSecond(u64),
    /// Nothing is pushed: pages go when they are asked for.
    Off,
}

impl FromStr for Pace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "unlimited" => return Ok(Self::Unlimited),
            "off" => return Ok(Self::Off),
            _ => {}
        }
        let (digits, factor) = match text.strip_suffix(['K', 'M', 'G']) {
            Some(digits) if text.ends_with('K') => (digits, 1 << 10),
            Some(digits) if text.ends_with('M') => (digits, 1 << 20),
            Some(digits) => (digits, 1 << 30),
            None => (text, 1),
        };
        match digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)) {
            Some(rate) if rate > 0 => Ok(Self::BytesPerSecond(rate)),
            _ => Err(format!("rate {text:?} is none of: bytes per second (with K, M or G), unlimited, off")),
        }
    }
}

/// What the push lanes of a session share.
#[derive(Debug)]
pub struct Pushing {
    order: Mutex<Order>,
    /// Who waits for the pace holds it: nobody else may send either.
    throttle: Mutex<Throttle>,
}

impl Pushing {
    /// Of everything that `lanes` holds.
    #[must_use]
    pub fn new(lanes: &Lanes, pace: Pace) -> Self {
        let order = Order::hot_first(lanes.ledger().chunks(), lanes.take_hot());
        Self { order: Mutex::new(order), throttle: Mutex::new(Throttle::new(pace)) }
    }

    fn next(&self, lanes: &Lanes) -> Option<u64> {
        // An order is whole between any two calls.
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order.next(lanes.take_wanted(), lanes.store.chunks_at_hand())
    }

    fn throttle(&self) -> MutexGuard<'_, Throttle> {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pushes every page that nobody has sent yet, chunk by chunk, once, going on from where the last fault was.
///
/// # Errors
/// [`LaneError`].
pub fn push(lanes: &Lanes, lane: &Stream, pushing: &Pushing) -> Result<(), LaneError> {
    if pushing.throttle().pace == Pace::Off {
        return Ok(());
    }
    let_others_pass();
    let mut scratch = Scratch::new(lanes.store.chunk_pages()).map_err(LaneError::io("push"))?;
    privileges::renounce_but_buffers();
    let mut window = Window::default();
    let mut runs = Vec::new();
    let mut id = 0;
    let mut aside = Aside::new();
    while let Some(chunk) = pushing.next(lanes) {
        if lanes.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        aside.follow(lanes, lane.pump_thread().into_iter().chain([CALLING_THREAD]));
        while lanes.faults_served.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        lanes.ledger().take_unsent(&lanes.map, chunk, PUSH_FRAME_PAGES, &mut runs);
        if runs.is_empty() {
            continue;
        }
        let pages: u64 = runs.iter().map(|run| run.what.run.pages).sum();
        let bytes = pages_to_bytes(pages) + (runs.len() * RUN_HEADER_LEN) as u64;
        // Before they are sent: the move may be over, and reported, as soon as the last of them has arrived.
        lanes.push_bytes.fetch_add(bytes, Ordering::Relaxed);
        if !lanes.store.send(&mut scratch, &runs, id, lane)? {
            lanes.push_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        id += runs.len() as u64;
        pushing.throttle().spent(bytes, &lanes.stop);
        window.follow(lane);
    }
    Ok(())
}

/// The threads of the push take the processor from nobody, least of all from each other while one holds what a fault waits for.
fn let_others_pass() {
    if let Err(error) = kernel::sched::set_batch(limits::SLICE_NS) {
        tracing::debug!("no policy of its own for the push: {error}");
    }
}

/// Holds a sender to its pace.
#[derive(Debug)]
pub(crate) struct Throttle {
    pace: Pace,
    began: Instant,
    sent: u64,
}

impl Throttle {
    /// Nothing sent yet.
    pub(crate) fn new(pace: Pace) -> Self {
        Self { pace, began: Instant::now(), sent: 0 }
    }

    /// Begins anew: what was not sent in time is not made up for.
    pub(crate) fn restart(&mut self) {
        *self = Self::new(self.pace);
    }

    /// Waits until this many more bytes are due, or `stop` is set.
    pub(crate) fn spent(&mut self, bytes: u64, stop: &std::sync::atomic::AtomicBool) {
        const NAP: Duration = Duration::from_millis(50);
        let Pace::BytesPerSecond(rate) = self.pace else { return };
        self.sent += bytes;
        #[allow(clippy::cast_precision_loss)] // a rate need not be exact
        let due = Duration::from_secs_f64(self.sent as f64 / rate as f64);
        while !stop.load(Ordering::Relaxed) {
            match due.checked_sub(self.began.elapsed()) {
                // Naps are short so that a stop is noticed.
                Some(early) if !early.is_zero() => std::thread::sleep(early.min(NAP)),
                _ => return,
            }
        }
    }
}

/// Takes acknowledgements in and frees complete chunks until every page is acknowledged.
///
/// # Errors
/// [`LaneError`].
pub fn acknowledgements(lanes: &Lanes, lane: &Stream) -> Result<(), LaneError> {
    let_others_pass();
    privileges::renounce();
    let broken = LaneError::io("push");
    let mut head = [0; HEADER_LEN];
    let mut body = Vec::new();
    let mut aside = Aside::new();
    while lanes.ledger().missing() > 0 {
        while !waiting::link_within(lane, limits::LANE_LOOK_INTERVAL).map_err(&broken)? {
            // A busy destination may take any time to read; one whose kernel is silent is gone.
            if kernel::tcp::unheard_for(lane.as_fd()).is_ok_and(|age| age > Some(DEAD_LINK_AFTER)) {
                return Err(broken(std::io::ErrorKind::TimedOut.into()));
            }
        }
        lane.receive_all(&mut head).map_err(&broken)?;
        aside.follow(lanes, [CALLING_THREAD]);
        let header = Header::decode(&head)?;
        if header.kind != Kind::Ack {
            let error = CodecError::Meaning { field: "frame kind on this lane", value: header.kind as u64 };
            return Err(error.into());
        }
        body.resize(header.body_len, 0);
        lane.receive_all(&mut body).map_err(&broken)?;
        take_acknowledgement(lanes, &body)?;
    }
    Ok(())
}

/// Takes the body of an acknowledgement in, and frees the chunks that it completes.
///
/// # Errors
/// [`LaneError::Malformed`], [`LaneError::NotLazy`].
pub fn take_acknowledgement(lanes: &Lanes, body: &[u8]) -> Result<(), LaneError> {
    for what in decode_ack(body)? {
        let first = index_of(&lanes.map, &what)?;
        let complete = lanes.ledger().acknowledge(first, what.run.pages);
        complete.into_iter().for_each(|chunk| lanes.store.free(chunk));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paces() {
        assert_eq!("unlimited".parse(), Ok(Pace::Unlimited));
        assert_eq!("off".parse(), Ok(Pace::Off));
        assert_eq!("1000".parse(), Ok(Pace::BytesPerSecond(1000)));
        assert_eq!("64M".parse(), Ok(Pace::BytesPerSecond(64 << 20)));
        for bad in ["", "0", "fast", "-1", "99999999999999999999", "18446744073709551615G"] {
            assert!(bad.parse::<Pace>().is_err(), "{bad}");
        }
    }
}
