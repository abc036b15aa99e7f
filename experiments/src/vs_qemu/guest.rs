//! The only program of the guest, run by its kernel as the first process: fills its memory, waits, then reads every
//! page once in random order and measures each read, as the fault-latency workload does for a process.
//!
//! Its console is a serial line: what it says there begins with a mark, as the kernel may say something too.
//!
//! ```text
//! @@ READY pages=..
//!          <- a line: start
//! @@ H value_ns count          per recorded latency
//! @@ DONE reads=.. wrong=..
//! ```

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::atomic::Ordering::SeqCst;

use anyhow::ensure;
use hdrhistogram::Histogram;
use kernel::arena::Region;

use crate::clock::monotonic_ns;
use crate::random::Permutation;
use crate::stamp::page::{self, Part, Place};

/// Before every line that is meant for the experiment.
pub const MARK: &str = "@@ ";
/// Digits of a recorded latency: few, as every value is a line on a slow console.
pub(super) const DIGITS: u8 = 2;
const FIRST: Place = Place { process: 0, part: Part::Writers, page: 0 };
const GENERATION: u32 = 1;
const SEED: u64 = 0x71_65_6d_75;

/// What the guest is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Memory to fill and read
    #[arg(long)]
    pub mib: usize,
}

/// Runs in the guest and does not return: without its first process the guest would stop at once.
///
/// # Errors
/// If it cannot be set up.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.mib > 0, "--mib of 1 or more");
    let pages = options.mib << 8;
    let region = Region::anonymous(pages)?;
    for number in 0..pages {
        page::write_full(region.page(number), FIRST.offset(number), GENERATION, 0);
    }
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    writeln!(output, "{MARK}READY pages={pages}")?;
    input.read_line(&mut String::new())?;
    let mut histogram = Histogram::<u64>::new(DIGITS)?;
    let order = Permutation::new(u64::try_from(pages)?, SEED);
    let mut wrong = 0_u64;
    for index in 0..u64::try_from(pages)? {
        let number = usize::try_from(order.at(index))?;
        let words = region.page(number);
        let begun = monotonic_ns();
        std::hint::black_box(words[0].load(SeqCst));
        let ended = monotonic_ns();
        histogram.record(ended.saturating_sub(begun))?;
        wrong += u64::from(page::verify(words, FIRST.offset(number), GENERATION).is_some());
    }
    for step in histogram.iter_recorded() {
        writeln!(output, "{MARK}H {} {}", step.value_iterated_to(), step.count_at_value())?;
    }
    writeln!(output, "{MARK}DONE reads={pages} wrong={wrong}")?;
    output.flush()?;
    loop {
        std::thread::park(); // the experiment ends the machine
    }
}
