#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::streams::fuzz_page_server_answers(data));
