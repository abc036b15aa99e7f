//! What each side decides on the way over the switchover: two small machines, pure, that the programs ask.
//!
//! ```text
//!   source                                              destination
//!   Preparing ──────────── images, Dumped ───────────▶  Restoring
//!       │     ◀──────────────── Prepared ────────────       │ held at the barrier: restored, nothing has run
//!   Checking: do the tasks stand still?                 Prepared
//!       ║ ════════════════════ Commit ══════════════▶       ║
//!   Committed                                           Committed: the barrier is lifted
//!       │     ◀──────────────── Running ─────────────       │
//!   Pushing   ──── pages ──▶    ◀── acknowledgements    Running
//!       │     ◀──────────────── Complete ────────────   Settled, Completed
//!   Release   ───────────────── Released ───────────▶   Release
//! ```
//!
//! Above the double line every failure ends with the source's tasks running and nothing left at the destination.
//! Below it a lost connection is a pause: the source makes new ones, the destination says what is settled, and both
//! go on where they were (`Paused`); everything else there, and a pause that lasts too long, ends with both sides
//! holding what they have. A shell reports an [event](source::Event) and does what the [action](source::Action)
//! says: it neither resumes, kills, runs nor frees a task by a decision of its own. That no order of messages,
//! losses and crashes makes two copies run, or loses a page, is checked by `protocol/tests/switchover`, which
//! explores these very functions.

pub mod destination;
pub mod source;
