#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| protocol::link::tls::fuzzing::fuzz_tls_records(data));
