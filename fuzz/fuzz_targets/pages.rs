#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(
    init: tests::fuzz::measure_with(|run| allocation_counter::measure(run).bytes_max),
    |input: &[u8]| -> Corpus {
        if tests::fuzz::run_of_group("pages", input) { Corpus::Keep } else { Corpus::Reject }
    }
);
