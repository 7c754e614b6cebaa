//! libFuzzer around [`fuzz::schema`].
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::schema(input));
