//! Hostile input: a target for every decoder and for the bookkeeping of pages, a corpus, and mutations of it.
//!
//! ```text
//!   fuzz/corpus/TARGET/*  ──▶ target(bytes)   as it is, and mutated from a seed
//!        ▲                       │ no panic, no memory above its bound, what is encoded again is the same
//!   seeds: made by our encoders  ▼
//!   found: by coverage       fuzz/artifacts/*     what failed
//! ```
//!
//! The targets run in two places: the test `hostile_input` replays the corpus and a fixed number of mutations, and the
//! package in `fuzz/` gives them to libFuzzer, a program for each group (`scripts/fuzz`). What fails is put into the corpus
//! and stays there.

pub mod corpus;
pub mod criu;
pub mod images;
pub mod mutation;
pub mod page_cache;
pub mod page_space;
pub mod seeds;
pub mod source;
pub mod streams;
pub mod wire;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

/// Something that takes hostile input.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// Takes any bytes; panics if something is wrong with what was made of them.
    pub run: fn(&[u8]),
    /// Mutations that the test-suite tries: fewer where each touches files or sockets.
    pub mutations: u64,
}

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run, mutations: 4000 }
}

const fn slow_target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run, mutations: 400 }
}

/// Targets that libFuzzer tries in one program, led by the coverage of them all: the first byte of an input is the place of
/// its target in the group, so that new ones come last.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Its name, and that of its program.
    pub name: &'static str,
    /// Its targets.
    pub targets: &'static [Target],
}

/// All targets. Those that touch files and sockets take longest, and have a group of their own.
pub const GROUPS: &[Group] = &[
    Group {
        name: "messages",
        targets: &[
            target("hello", wire::fuzz_hello),
            target("frames", wire::fuzz_frames),
            target("acknowledgement", wire::fuzz_acknowledgement),
            target("control", wire::fuzz_control),
            target("precopy", wire::fuzz_precopy),
            target("page_server", criu::fuzz_page_server),
            target("handover", criu::fuzz_handover),
            target("criu_version", criu::fuzz_criu_version),
            target("tls_records", protocol::link::tls::fuzzing::fuzz_tls_records),
        ],
    },
    Group {
        name: "images",
        targets: &[
            target("inventory", images::fuzz_inventory),
            target("pstree", images::fuzz_pstree),
            target("core", images::fuzz_core),
            target("mm", images::fuzz_mm),
            target("pagemap", images::fuzz_pagemap),
            target("stats", images::fuzz_stats),
        ],
    },
    Group {
        name: "streams",
        targets: &[
            slow_target("checkpoint", images::fuzz_checkpoint),
            slow_target("fault_lane", streams::fuzz_fault_lane),
            slow_target("page_server_answers", streams::fuzz_page_server_answers),
        ],
    },
    Group {
        name: "pages",
        targets: &[
            target("page_cache", page_cache::fuzz_page_cache),
            target("page_space", page_space::fuzz_page_space),
            target("prefetch", page_space::fuzz_prefetch),
            target("in_flight", page_space::fuzz_in_flight),
            target("ledger", source::fuzz_ledger),
            target("push_order", source::fuzz_push_order),
            target("bitmap", source::fuzz_bitmap),
        ],
    },
];

/// All targets, of every group.
pub fn targets() -> impl Iterator<Item = Target> {
    GROUPS.iter().flat_map(|group| group.targets).copied()
}

/// The target of this name.
#[must_use]
pub fn find(name: &str) -> Option<Target> {
    targets().find(|target| target.name == name)
}

impl Group {
    /// The group of this name.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        GROUPS.iter().find(|group| group.name == name).copied()
    }

    /// The target that an input of the group is for, and what it is to take.
    #[must_use]
    pub fn split(self, input: &[u8]) -> Option<(Target, &[u8])> {
        let (place, data) = input.split_first()?;
        Some((*self.targets.get(usize::from(*place))?, data))
    }
}

/// What a program of libFuzzer does with an input of the group `name`; false if it is for no target.
///
/// # Panics
/// If there is no such group, and as the target does.
#[must_use]
pub fn run_of_group(name: &str, input: &[u8]) -> bool {
    let group = Group::find(name).expect("a group");
    group.split(input).map(|(target, data)| (target.run)(data)).is_some()
}

/// Runs a closure and gives the most bytes that were allocated at once meanwhile.
pub type Gauge = fn(&mut dyn FnMut()) -> u64;

static GAUGE: OnceLock<Gauge> = OnceLock::new();

/// Has the targets check what decoding allocates. Without it they check everything else.
pub fn measure_with(gauge: Gauge) {
    let _ = GAUGE.set(gauge);
}

/// Memory of a decode that does not depend on its input: an error with its text, a vector of a few elements.
const SMALL: usize = 4096;

/// Decodes `bytes` bytes, which may take `per_byte` bytes of memory for each.
///
/// # Panics
/// If it takes more.
pub fn bounded<T>(bytes: usize, per_byte: usize, decode: impl FnOnce() -> T) -> T {
    let Some(gauge) = GAUGE.get() else { return decode() };
    let (mut decode, mut decoded) = (Some(decode), None);
    let peak = gauge(&mut || decoded = decode.take().map(|decode| decode()));
    let bound = SMALL + per_byte * bytes;
    assert!(
        usize::try_from(peak).is_ok_and(|peak| peak <= bound),
        "decoding {bytes} bytes took {peak} bytes of memory, more than {bound}"
    );
    decoded.expect("a gauge runs what it is given")
}

/// Gives `data` to a target; what it panicked with, if it did.
///
/// # Errors
/// The text of the panic.
pub fn examine(target: Target, data: &[u8]) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| (target.run)(data))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
}

/// Tries the mutations with the numbers `seeds` of what is in the corpus of `target`.
///
/// # Errors
/// What failed, where its input is now, and how to try it again.
///
/// # Panics
/// If the corpus cannot be read, or the input not be kept.
pub fn try_mutations(target: Target, seeds: impl IntoIterator<Item = u64>) -> Result<(), String> {
    let corpus: Vec<Vec<u8>> = corpus::of(target.name).into_iter().map(|(_, data)| data).collect();
    for seed in seeds {
        let data = mutation::mutated(&corpus, seed);
        if let Err(panic) = examine(target, &data) {
            let kept = corpus::keep_failure(target.name, seed, &data);
            return Err(format!(
                "{}, seed {seed}: {panic}\nits input is {}; again: cargo run --release -p tests --bin fuzz -- {} {}",
                target.name,
                kept.display(),
                target.name,
                kept.display()
            ));
        }
    }
    Ok(())
}
