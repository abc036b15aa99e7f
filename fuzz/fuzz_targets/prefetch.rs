#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::page_space::fuzz_prefetch(data));
