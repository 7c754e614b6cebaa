//! libFuzzer around [`fuzz::columns`].
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::columns(input));
