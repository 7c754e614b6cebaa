//! libFuzzer around [`fuzz::child`].
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::child(input));
