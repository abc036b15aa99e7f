//! The connections of a move, all dialled before anything is frozen.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use host::criu::Criu;
use host::waiting;
use protocol::bitmap::Bitmap;
use protocol::link::{ControlChannel, ControlError, LinkError, Stream};
use protocol::wire::control::{Clean, Control, ImageChunk};
use protocol::wire::hello::{Hello, HelloError, Refusal, Role};
use protocol::wire::limits::{CLEAN_PIECE_MAX, IMAGE_CHUNK_MAX, VERSION_OF_LZ4};
use protocol::wire::settled_map::Assembly;
use protocol::wire::switchover::source::{Action, Event, Switchover};

use super::redial::{Failure, Redial};
use super::{MoveError, Mover};
use crate::lanes::LaneCounts;
use crate::limits;
use crate::precopy::most_pages;
use crate::precopy::policy::Rounds;
use crate::preflight;
use crate::process::ProcessTree;

/// The lanes of a session, each a connection. There is one of each kind at least, but in a session that was not connected
/// yet.
#[derive(Default)]
pub(super) struct LaneStreams {
    pub(super) faults: Vec<Stream>,
    pub(super) pushes: Vec<Stream>,
}

impl LaneStreams {
    /// Dials all of them at once: on a long link each takes several round trips.
    fn dial(
        counts: LaneCounts,
        dial: impl Fn(Role, u8, u8) -> Result<Stream, LinkError> + Sync,
    ) -> Result<Self, LinkError> {
        let dial = &dial;
        std::thread::scope(|scope| {
            let all = |role, lanes| {
                let dialling = (0..lanes).map(|lane| scope.spawn(move || dial(role, lane, lanes)));
                dialling.collect::<Vec<_>>()
            };
            let dialling = [all(Role::Fault, counts.fault), all(Role::Push, counts.push)];
            let [faults, pushes] = dialling.map(|lanes| {
                let lanes = lanes.into_iter().map(|lane| lane.join().unwrap_or_else(|_| Err(panicked())));
                lanes.collect::<Result<Vec<_>, _>>()
            });
            Ok(Self { faults: faults?, pushes: pushes? })
        })
    }

    /// Ends all of them.
    pub(super) fn shutdown(&self) {
        self.faults.iter().chain(&self.pushes).for_each(Stream::shutdown);
    }
}

/// The connections of a move.
pub(super) struct Session {
    pub(super) control: ControlChannel,
    pub(super) lanes: LaneStreams,
    /// Most pages of pre-copy that the destination has agreed to keep.
    pub(super) precopy_pages: u64,
    /// Whether the destination understands compressed pages.
    pub(super) takes_lz4: bool,
    /// How long the control connection took to be made.
    first_dial: Duration,
    /// How often the connections were made anew; 0 is never used again.
    attempt: u16,
}

impl Session {
    /// Offers the tree to the destination and, accepted, opens the lanes.
    pub(super) fn open(mover: &mut Mover, tree: &ProcessTree, criu: &Criu) -> Result<Self, MoveError> {
        mover.count_lanes(tree.pids().len());
        let (id, secret) = (mover.id, mover.secret);
        let hello = |role| Hello::new(role, id, secret);
        let broken = |error: ControlError| {
            let remedy = "look at the destination's output, then try again";
            MoveError::problem(format!("the destination did not answer the offer: {error}"), remedy)
        };
        let began = Instant::now();
        let (control, version) = Stream::dial_versioned(&mover.config.to, &hello(Role::Control))?;
        let takes_lz4 = version >= VERSION_OF_LZ4;
        let control = ControlChannel::new(control).map_err(|e| broken(e.into()))?;
        let first_dial = began.elapsed();
        let mut offer = preflight::offer(tree, criu, &mover.config.criu_options);
        if mover.config.precopy_rounds != Rounds::Off {
            offer.precopy_pages = most_pages(offer.memory_bytes);
        }
        let precopy_pages = offer.precopy_pages;
        let bytes = control.send(&Control::Offer(offer)).map_err(broken)?;
        mover.recorder.report().bytes.control += bytes;
        let deadline = Some(Instant::now() + limits::VERDICT_TIMEOUT);
        let (answered, [interrupted]) = waiting::link_or(&control, [mover.interrupt.as_fd()], deadline)
            .map_err(|error| broken(error.into()))?;
        if interrupted {
            return Err(MoveError::RolledBack("interrupted".into()));
        }
        if !answered {
            return Err(MoveError::problem(
                format!("the destination was silent for {:?}", limits::VERDICT_TIMEOUT),
                "look at the destination's output",
            ));
        }
        match control.receive().map_err(broken)? {
            Control::Verdict(problems) if problems.is_empty() => {}
            Control::Verdict(mut problems) => {
                for problem in &mut problems {
                    problem.what.insert_str(0, "destination: ");
                }
                return Err(MoveError::Preflight(problems));
            }
            other => return Err(broken(other.out_of_order("a verdict"))),
        }
        let lanes = LaneStreams::dial(mover.lanes, |role, lane, lanes| {
            Stream::dial(&mover.config.to, &hello(role).of_lane(lane, lanes))
        })?;
        Ok(Self { control, lanes, precopy_pages, takes_lz4, first_dial, attempt: 0 })
    }

    /// The connections of a process that has ended, the `generation`th of its session: each begins with attempts of its
    /// own.
    pub(super) fn unconnected(generation: u16) -> io::Result<Self> {
        let control = ControlChannel::new(Stream::Unix(UnixStream::pair()?.0))?;
        let lanes = LaneStreams::default();
        let attempt = generation.wrapping_mul(limits::ATTEMPTS_OF_A_PROCESS);
        let (precopy_pages, first_dial) = (0, Duration::ZERO);
        Ok(Self { control, lanes, precopy_pages, takes_lz4: false, first_dial, attempt })
    }

    /// Ends every connection: the destination sees it, and whoever waits on one here wakes up.
    pub(super) fn shutdown(&self) {
        self.control.shutdown();
        self.lanes.shutdown();
    }

    /// The dialling after the connections were lost.
    pub(super) fn redial(&self, mover: &Mover) -> Redial {
        let noise = mover.id.0.first_chunk().map_or(1, |bytes| u64::from_le_bytes(*bytes));
        Redial::new(mover.config.give_up, self.first_dial, noise, Instant::now())
    }

    /// Makes the connections anew, and hears which of `pages` pages are settled at the destination.
    pub(super) fn resume(
        &mut self,
        mover: &Mover,
        limit: Duration,
        pages: u64,
    ) -> Result<Bitmap, NotResumed> {
        self.attempt = self.attempt.wrapping_add(1).max(1);
        let (to, attempt) = (&mover.config.to, self.attempt);
        let hello = |role| Hello { attempt, ..Hello::new(role, mover.id, mover.secret) };
        let (control, lanes) = std::thread::scope(|scope| {
            let control = scope.spawn(|| Stream::dial_within(to, &hello(Role::Control), limit));
            let lanes = LaneStreams::dial(mover.lanes, |role, lane, lanes| {
                Stream::dial_within(to, &hello(role).of_lane(lane, lanes), limit)
            });
            (control.join().unwrap_or_else(|_| Err(panicked())), lanes)
        });
        let (control, lanes) = (control?, lanes?);
        let control = ControlChannel::new(control).map_err(ControlError::from)?;
        let mut map = Assembly::new(pages);
        loop {
            if !waiting::link_within(&control, limits::MAP_TIMEOUT).map_err(ControlError::from)? {
                return Err(NotResumed::Control(io::Error::from(io::ErrorKind::TimedOut).into()));
            }
            match control.receive()? {
                Control::SettledMap(piece) => map.add(&piece).map_err(ControlError::from)?,
                Control::Resumed => break,
                other => return Err(other.out_of_order("a map of what is settled").into()),
            }
        }
        let map = map.finish().map_err(ControlError::from)?;
        (self.control, self.lanes) = (control, lanes);
        Ok(map)
    }

    /// Sends every image file; returns their number and the bytes sent.
    pub(super) fn ship(&self, images: &Path) -> Result<(u32, u64), ControlError> {
        let (mut count, mut sent) = (0, 0);
        let mut buffer = vec![0; IMAGE_CHUNK_MAX];
        for entry in fs::read_dir(images)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut file = File::open(entry.path())?;
            let size = file.metadata()?.len();
            let mut offset = 0;
            loop {
                let got = file.read(&mut buffer)?;
                let data = buffer[..got].to_vec();
                let chunk = ImageChunk { name: name.clone(), size, offset, data };
                sent += self.control.send(&Control::Image(chunk))?;
                offset += got as u64;
                if offset >= size {
                    break;
                }
            }
            count += 1;
        }
        Ok((count, sent))
    }

    /// Says which lazy pages the destination has already; returns the bytes sent.
    pub(super) fn tell_clean(&self, clean: &Bitmap) -> Result<u64, ControlError> {
        let (mut first, mut sent) = (0, 0);
        while first < clean.len() {
            let bits = clean.bytes_from(first, CLEAN_PIECE_MAX);
            let pages = bits.len() as u64 * 8;
            sent += self.control.send(&Control::Clean(Clean { first, bits }))?;
            first += pages;
        }
        Ok(sent)
    }

    /// Why nothing can be sent any more: the destination's own reason, if it gave one before it closed.
    pub(super) fn lost(&self, error: &ControlError) -> String {
        while let Ok(true) = waiting::link_within(&self.control, Duration::ZERO) {
            match self.control.receive() {
                Ok(Control::Abort(reason)) => return format!("destination: {reason}"),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        format!("lost the destination: {error}")
    }

    /// Calls the move off and waits until the destination is clean. Returns what is left to say.
    pub(super) fn call_off(&self, reason: &str, switchover: &mut Switchover) -> Option<&'static str> {
        // One that has given up by itself does not listen any more; its word that it is clean is here then.
        let _ = self.control.send(&Control::Abort(reason.to_owned()));
        let deadline = Instant::now() + limits::ROLLED_BACK_TIMEOUT;
        loop {
            let (event, why) = match waiting::link_or(&self.control, [], Some(deadline)) {
                Ok((true, [])) => match self.control.receive() {
                    Ok(message) => (Event::from(&message), "no answer"),
                    Err(_) => (Event::Broken, "connection lost"),
                },
                _ => (Event::Broken, "no answer"),
            };
            // Anything else was under way before it heard of it.
            if switchover.step(event) != Action::Wait {
                return (event != Event::RolledBack).then_some(why);
            }
        }
    }

    /// Waits for the destination's next message, until `limit` has passed or one of `others` is readable.
    pub(super) fn next(&self, others: [BorrowedFd<'_>; 2], limit: Duration) -> Result<Next, ControlError> {
        let deadline = Some(Instant::now() + limit);
        let (message, [first, second]) = waiting::link_or(&self.control, others, deadline)?;
        Ok(match (first, second, message) {
            (true, _, _) => Next::Other(0),
            (_, true, _) => Next::Other(1),
            (_, _, true) => Next::Message(self.control.receive()?),
            _ => Next::TimedOut,
        })
    }
}

/// Why the connections could not be made anew.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotResumed {
    /// One could not be made.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The control connection broke again, or what it said is no map.
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl NotResumed {
    /// Why, in words.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Link(LinkError::Hello { source: HelloError::Refused(refusal), .. }) => refusal.to_string(),
            other => other.to_string(),
        }
    }

    /// What it says about the destination.
    pub(super) fn answer(&self) -> Failure {
        match self {
            Self::Link(LinkError::Hello { source: HelloError::Refused(Refusal::Session), .. }) => {
                Failure::Unknown
            }
            Self::Link(LinkError::Hello { source: HelloError::Refused(Refusal::RolledBack), .. }) => {
                Failure::RolledBack
            }
            Self::Link(LinkError::Io { source, .. }) if source.kind() == io::ErrorKind::ConnectionRefused => {
                Failure::Refused
            }
            _ => Failure::Silent,
        }
    }
}

fn panicked() -> LinkError {
    let source = io::Error::other("a thread panicked");
    LinkError::Io { doing: "connect to", endpoint: "the destination".into(), source }
}

/// What came first.
#[allow(clippy::large_enum_variant, reason = "one at a time, and taken apart at once")]
pub(super) enum Next {
    /// A message.
    Message(Control),
    /// One of the other descriptors.
    Other(usize),
    /// Nothing.
    TimedOut,
}
