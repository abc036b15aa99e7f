#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::streams::fuzz_fault_lane(data));
