//! Hostile input for every decoder and for the bookkeeping of pages: the corpus, and a fixed number of mutations of it.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use tests::fuzz::{bounded, corpus, examine, find, measure_with, seeds, targets, try_mutations};

fn gauge() {
    measure_with(|run| allocation_counter::measure(run).bytes_max);
}

#[test]
fn the_corpus_is_taken() {
    gauge();
    for target in targets() {
        for (name, data) in corpus::of(target.name) {
            if let Err(panic) = examine(target, &data) {
                panic!(
                    "{}: {panic}\nagain: cargo run --release -p tests --bin fuzz -- {} fuzz/corpus/{}/{name}",
                    target.name, target.name, target.name
                );
            }
        }
    }
}

/// One after the other: a target that fails says so itself, and the machine has other tests to run.
#[test]
fn mutations_are_taken() {
    gauge();
    for target in targets() {
        if let Err(failure) = try_mutations(target, 0..target.mutations) {
            panic!("{failure}");
        }
    }
}

#[test]
fn the_corpus_has_what_the_encoders_make_now() {
    for seed in seeds::all() {
        let kept = corpus::of(seed.target).into_iter().find(|(name, _)| *name == seed.name);
        let same = kept.is_some_and(|(_, data)| data == seed.data);
        assert!(same, "{}/{} is another one: cargo run -p tests --bin fuzz -- seed", seed.target, seed.name);
    }
}

#[test]
fn every_folder_of_the_corpus_is_a_targets() {
    let folder = corpus::folder_of("");
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(find(&name).is_some(), "{name} is no target");
    }
}

#[test]
fn memory_above_the_bound_is_found() {
    gauge();
    let memory = |bytes: usize| move || bounded(1000, 10, || drop(std::hint::black_box(vec![0_u8; bytes])));
    memory(10_000)();
    assert!(std::panic::catch_unwind(memory(20_000)).is_err());
}
