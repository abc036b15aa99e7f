#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::page_cache::fuzz_page_cache(data));
