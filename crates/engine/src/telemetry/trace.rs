//! The trace of a batch on its way from the producer through a worker to a sink.
//!
//! The trace context travels in a header of the batch's messages, in W3C's format
//! (<https://www.w3.org/TR/trace-context/#traceparent-header>), so that other tools can read it. There is no
//! exporter here: spans and logs name the trace.

use std::fmt;
use std::hash::{BuildHasher, RandomState};

use async_nats::HeaderMap;

/// The name of the header.
pub const HEADER: &str = "traceparent";

/// The version number that the specification forbids.
const NO_VERSION: u8 = 0xff;
/// The flag for a trace whose spans may be recorded.
const SAMPLED: u8 = 1;
/// The number of characters of the header in version 00.
const LENGTH: usize = 55;

/// A place in a trace: the trace, and the span that sends a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    trace: u128,
    span: u64,
    flags: u8,
}

impl TraceContext {
    /// Begins a new trace, and returns its first span.
    pub fn begin() -> Self {
        let trace = u128::from(random()) << 64 | u128::from(random());
        Self { trace, span: random(), flags: SAMPLED }
    }

    /// Another span of the same trace.
    pub fn next(self) -> Self {
        Self { span: random(), ..self }
    }

    /// The trace context in a message's headers; `None` if the header is missing or cannot be parsed.
    pub fn of(headers: Option<&HeaderMap>) -> Option<Self> {
        Self::parse(headers?.get(HEADER)?.as_str())
    }

    /// The trace id in hexadecimal, as logs show it.
    pub fn trace_id(self) -> impl fmt::Display {
        TraceId(self.trace)
    }

    /// Parses the header's value. Later versions may have more after the parts of version 00.
    fn parse(text: &str) -> Option<Self> {
        let (known, more) = text.split_at_checked(LENGTH)?;
        let parts: Vec<&str> = known.split('-').collect();
        let [version, trace, span, flags] = parts[..] else { return None };
        if [version.len(), trace.len(), span.len(), flags.len()] != [2, 32, 16, 2] {
            return None;
        }
        let is_hex = |text: &&str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !parts.iter().all(is_hex) {
            return None;
        }
        let version = u8::from_str_radix(version, 16).ok()?;
        let is_sound = match version {
            0 => more.is_empty(),
            version => version != NO_VERSION && (more.is_empty() || more.starts_with('-')),
        };
        let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| is_sound && *trace != 0)?;
        let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
        Some(Self { trace, span, flags: u8::from_str_radix(flags, 16).ok()? })
    }
}

impl fmt::Display for TraceContext {
    /// Writes the header's value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trace, span, flags } = self;
        write!(f, "00-{trace:032x}-{span:016x}-{flags:02x}")
    }
}

struct TraceId(u128);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A random number that is not 0. The system seeds `RandomState`, which differs at each call: enough for ids
/// that must be unique.
fn random() -> u64 {
    RandomState::new().hash_one(0u8).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_as_it_was_written() {
        let begun = TraceContext::begin();
        let written = begun.to_string();
        assert_eq!(written.len(), LENGTH);
        assert_eq!(TraceContext::parse(&written), Some(begun));
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, written);
        assert_eq!(TraceContext::of(Some(&headers)), Some(begun));
        assert_eq!((TraceContext::of(None), TraceContext::of(Some(&HeaderMap::new()))), (None, None));
    }

    #[test]
    fn the_next_span_is_of_the_same_trace() {
        let begun = TraceContext::begin();
        let next = begun.next();
        assert_eq!(next.trace_id().to_string(), begun.trace_id().to_string());
        assert_eq!(next.trace_id().to_string().len(), 32);
        assert_ne!(next.span, begun.span);
        assert_ne!(TraceContext::begin().trace, begun.trace);
    }

    /// The specification's own example, and headers that it forbids.
    #[test]
    fn what_is_no_trace_context_is_none() {
        let sound = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(TraceContext::parse(sound).map(|read| read.to_string()).as_deref(), Some(sound));
        let later = sound.replacen("00", "cc", 1);
        assert!(
            TraceContext::parse(&later).is_some() && TraceContext::parse(&format!("{later}-what")).is_some()
        );
        for unsound in [
            "",
            "00",
            &sound[..LENGTH - 1],
            &format!("{sound}-00"),
            &format!("{later}0"),
            &sound.replacen("00", "ff", 1),
            &sound.to_uppercase(),
            &sound.replacen('-', "0", 1),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "ü0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0ü",
        ] {
            assert_eq!(TraceContext::parse(unsound), None, "{unsound}");
        }
    }
}
