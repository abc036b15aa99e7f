//! Before the freeze: the rounds of pre-copy, and behind it which of their pages are clean.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::mailbox::{Mailbox, mailbox};
use host::waiting;
use protocol::bitmap::Bitmap;
use protocol::link::Stream;
use protocol::units::pages_to_bytes;
use protocol::wire::control::{Control, Dumped};
use protocol::wire::precopy::Round;

use super::{BroughtUp, Session};
use crate::cache::{CleanPages, Milestone, PageCache, PrecopyError, PrecopyLane, PrecopyProgress};
use crate::limits;

/// What is installed before the tasks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Prefill {
    /// Nothing is waited for.
    #[default]
    None,
    /// What was written while it was copied.
    Hot,
    /// Everything that is clean.
    All,
}

/// What came before the freeze, and which of it is clean.
#[derive(Debug)]
pub(super) struct Precopied {
    pub(super) cache: PageCache,
    pub(super) clean: Bitmap,
}

type Received = Result<(Stream, PageCache, Round), PrecopyError>;

/// The thread that receives; dropped, it ends, and what it kept is freed.
struct Receiving {
    lane: Stream,
    received: Mailbox<Received>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It may wait for the rest of a frame.
            self.lane.shutdown();
            let _ = thread.join();
        }
    }
}

impl Session {
    /// Receives rounds until the source says that the freeze is next; the push lane comes back for what follows it.
    pub(super) fn precopy(&mut self, most: u64, push: Stream) -> Result<(Stream, PageCache), String> {
        self.recorder.phase("precopy");
        let progress = Arc::new(PrecopyProgress::default());
        let result = self.receive_rounds(most, push, &progress);
        self.recorder.report().bytes.precopy = progress.bytes.load(Ordering::Relaxed);
        let (push, cache, last) = result?;
        tracing::info!(rounds = last.number, pages = cache.pages(), "kept");
        // Answered here: the source freezes then, and what it says on the control connection is in order.
        let answered = push.send_all(&last.encode(), false);
        answered.map_err(|error| PrecopyError::from(error).to_string())?;
        Ok((push, cache))
    }

    fn receive_rounds(
        &mut self,
        most: u64,
        push: Stream,
        progress: &Arc<PrecopyProgress>,
    ) -> Result<(Stream, PageCache, Round), String> {
        let failed = |error: std::io::Error| format!("cannot receive pre-copy: {error}");
        let lane = push.try_clone().map_err(failed)?;
        let (post, received) = mailbox().map_err(failed)?;
        let receiver = PrecopyLane::new(push, most, progress.clone());
        let thread = std::thread::Builder::new().name("precopy".into());
        let thread = thread.spawn(move || post.send(receiver.run())).map_err(failed)?;
        let mut receiving = Receiving { lane, received, thread: Some(thread) };
        loop {
            let deadline = Instant::now() + self.progress.interval();
            let fds = [receiving.received.as_fd(), self.interrupt.as_fd()];
            match waiting::link_or(&self.control, fds, Some(deadline)).map_err(failed)? {
                (_, [_, true]) => return Err("interrupted at the destination".into()),
                (true, _) => {
                    let message = self.next_message(None)?;
                    return Err(message.out_of_order("the end of pre-copy").to_string());
                }
                (_, [true, _]) => {
                    if let Some(result) = receiving.received.empty().pop() {
                        if let Some(thread) = receiving.thread.take() {
                            let _ = thread.join();
                        }
                        return result.map_err(|error| self.reason_of(&error));
                    }
                }
                _ => {}
            }
            self.progress.show(|| {
                let [rounds, kept, bytes] = [&progress.rounds, &progress.kept, &progress.bytes]
                    .map(|count| count.load(Ordering::Relaxed));
                let kept = pages_to_bytes(kept) >> 20;
                format!("pre-copy: round {}, {kept} MiB kept, {} MiB received", rounds + 1, bytes >> 20)
            });
        }
    }

    /// A source that gives up closes the lane, and says why on the control connection.
    fn reason_of(&self, error: &PrecopyError) -> String {
        let lost = matches!(error, PrecopyError::Closed | PrecopyError::Io(_));
        if lost && waiting::link_within(&self.control, limits::REASON_PATIENCE).unwrap_or(false) {
            if let Ok(Control::Abort(reason)) = self.control.receive() {
                return format!("the source called it off: {reason}");
            }
        }
        error.to_string()
    }

    /// Takes the pieces that say which pages are clean, if there are any.
    pub(super) fn receive_clean(
        &mut self,
        dumped: &Dumped,
        cache: Option<PageCache>,
    ) -> Result<Option<Precopied>, String> {
        let Some(cache) = cache else {
            let none = dumped.clean_pages == 0;
            let reason = "the source counts clean pages, and there was no pre-copy";
            return if none { Ok(None) } else { Err(reason.into()) };
        };
        let mut clean = CleanPages::announced(dumped).map_err(|error| error.to_string())?;
        while clean.is_missing() {
            match self.next_message(None)? {
                Control::Clean(piece) => clean.take(&piece).map_err(|error| error.to_string())?,
                other => return Err(other.out_of_order("clean pages").to_string()),
            }
        }
        Ok(Some(Precopied { cache, clean: clean.into_bits() }))
    }

    /// Begins to install what is clean, and waits as long as the operator allows.
    pub(super) fn prefill(&self, brought_up: &BroughtUp) -> Result<(), String> {
        let Some(installing) = brought_up.begin_installing() else { return Ok(()) };
        if self.config.prefill == Prefill::None {
            return Ok(());
        }
        let (begun, before) = (Instant::now(), brought_up.tree.kept_pages());
        let deadline = begun + Duration::from_millis(self.config.prefill_ms);
        let mut enough = false;
        while !enough {
            let fds = [installing.milestones.as_fd(), self.interrupt.as_fd()];
            let ready = waiting::link_or(&self.control, fds, Some(deadline));
            match ready.map_err(|error| error.to_string())? {
                (_, [_, true]) => return Err("interrupted at the destination".into()),
                (true, _) => return Err(self.next_message(None)?.out_of_order("nothing").to_string()),
                (_, [true, _]) => {
                    for milestone in installing.milestones.empty() {
                        match milestone {
                            Milestone::Hot => enough |= self.config.prefill == Prefill::Hot,
                            Milestone::All => enough = true,
                            Milestone::Broken(error) => return Err(format!("cannot install: {error}")),
                        }
                    }
                }
                _ => enough = true,
            }
        }
        let left = brought_up.tree.kept_pages();
        tracing::info!(pages = before - left, left, ms = begun.elapsed().as_millis(), "prefilled");
        Ok(())
    }
}
