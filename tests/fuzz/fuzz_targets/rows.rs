//! libFuzzer around [`fuzz::rows`].
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::rows(input));
