//! libFuzzer around [`fuzz::ids`].
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::ids(input));
