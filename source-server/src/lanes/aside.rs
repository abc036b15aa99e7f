//! What can wait stays off the processor that serves faults.

use host::placement::Processors;

use super::Lanes;

/// The thread that calls [`Aside::follow`], among those that it moves.
pub(crate) const CALLING_THREAD: i32 = 0;

/// Keeps threads off the processor that serves faults, as long as it does.
pub(crate) struct Aside {
    allowed: Option<Processors>,
    avoided: Option<usize>,
}

impl Aside {
    /// For threads that may run wherever the calling one may.
    pub(crate) fn new() -> Self {
        Self { allowed: Processors::allowed().ok(), avoided: None }
    }

    /// Moves these threads when faults are served elsewhere than before.
    pub(crate) fn follow(&mut self, lanes: &Lanes, threads: impl IntoIterator<Item = i32>) {
        let busy = lanes.busy_processor();
        let Some(allowed) = self.allowed.filter(|_| busy != self.avoided) else { return };
        self.avoided = busy;
        let mut processors = Processors::none();
        busy.into_iter().for_each(|cpu| processors.add(cpu));
        for thread in threads {
            // If it is refused, the thread runs wherever it did.
            let _ = allowed.without(processors).keep(thread);
        }
    }
}
