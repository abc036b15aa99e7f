#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::source::fuzz_push_order(data));
