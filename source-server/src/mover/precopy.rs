//! Pre-copy as a phase of a move: its thread, and who may end it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use host::mailbox::{Mailbox, Post, mailbox};
use host::progress::mib;
use host::waiting;
use protocol::units::pages_to_bytes;
use protocol::wire::control::Control;

use super::Mover;
use super::session::{Next, Session};
use crate::limits;
use crate::precopy::compression::Compress;
use crate::precopy::rounds::{Plan, RoundsError, Shared, Status};
use crate::precopy::{Copied, rounds};
use crate::process::ProcessTree;
use crate::track::choice::choose;

/// Copies the tree's memory ahead. On an error the tree is as it was.
pub(super) fn run(mover: &mut Mover, tree: &ProcessTree, session: &Session) -> Result<Copied, String> {
    let (tracker, _) = choose();
    let plan = Plan {
        root: mover.config.pid,
        rounds: mover.config.precopy_rounds,
        pace: mover.config.precopy_pace,
        most_pages: session.precopy_pages,
        compress: match session.takes_lz4 {
            true => mover.config.compress,
            false => Compress::Off,
        },
    };
    // One thread copies.
    let lane = session.lanes.pushes.first().ok_or("there is no push lane")?;
    let shared = Arc::new(Shared::default());
    let (post, ended) = mailbox().map_err(|error| format!("cannot make a mailbox: {error}"))?;
    let result = std::thread::scope(|scope| {
        let copying = std::thread::Builder::new().name("precopy".into()).spawn_scoped(scope, || {
            // Rings however the rounds end.
            let _bell = Bell(post);
            rounds::run(&plan, tracker, tree, lane, &shared)
        });
        let copying = copying.map_err(|error| format!("cannot start a thread: {error}"))?;
        let stopped = wait(mover, session, &ended, &shared);
        if stopped.is_err() {
            shared.stop.store(true, Ordering::Relaxed);
            lane.shutdown();
        }
        let copied = copying.join().map_err(|_| "the copying thread panicked".to_owned())?;
        match (stopped, copied) {
            (Err(reason), _) => Err(reason),
            (Ok(()), Ok(copied)) => Ok(copied),
            (Ok(()), Err(error @ RoundsError::Lane(_))) => Err(reason_of(session, &error)),
            (Ok(()), Err(error)) => Err(error.to_string()),
        }
    });
    mover.recorder.report().bytes.precopy = shared.status().bytes;
    result
}

/// Waits until the rounds are over, one way or the other; an error is a reason to end them.
fn wait(mover: &mut Mover, session: &Session, ended: &Mailbox<()>, shared: &Shared) -> Result<(), String> {
    loop {
        match session.next([ended.as_fd(), mover.interrupt.as_fd()], mover.progress.interval()) {
            Ok(Next::Other(0)) => return Ok(()),
            Ok(Next::Other(_)) => return Err("interrupted".into()),
            Ok(Next::Message(Control::Abort(reason))) => return Err(format!("destination: {reason}")),
            Ok(Next::Message(other)) => return Err(other.out_of_order("the end of pre-copy").to_string()),
            Ok(Next::TimedOut) => {}
            Err(error) => return Err(session.lost(&error)),
        }
        mover.progress.show(|| in_words(&shared.status()));
    }
}

fn in_words(status: &Status) -> String {
    let bytes = |pages| mib(pages_to_bytes(pages));
    format!(
        "pre-copy: round {}, {} of {} sent, {}/s",
        status.round,
        bytes(status.sent),
        bytes(status.written),
        mib(status.rate())
    )
}

/// The destination says on the control connection why it has closed the lane.
fn reason_of(session: &Session, error: &RoundsError) -> String {
    if let Ok(true) = waiting::link_within(&session.control, limits::REASON_PATIENCE) {
        if let Ok(Control::Abort(reason)) = session.control.receive() {
            return format!("destination: {reason}");
        }
    }
    error.to_string()
}

/// Rings when it is dropped.
struct Bell(Post<()>);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.send(());
    }
}
