//! What must hold for bytes from outside, whatever they are: one function for each kind, called by libFuzzer
//! (`fuzz_targets/`, see the README) with inputs that it makes up, and by `cargo test` with those that are kept in
//! `corpus/`.
//!
//! | target | bytes | from |
//! |---|---|---|
//! | [`ids`] | a message of the ids stream | whoever may publish in NATS |
//! | [`rows`] | a message of the rows stream | whoever may publish in NATS |
//! | [`frames`] | ClickHouse's compressed frames | clients of the local engine |
//! | [`child`] | what a child process writes to its stdout | functions in any language |
//! | [`schema`] | a schema's text form | rows of other builds, tables |
//! | [`columns`] | rows as columns, in postcard | pool processes, whose functions may write anywhere |
//! | [`http`] | a request to the local engine | whoever has an account on this machine |
//!
//! Each promises more than that nothing panics: what is read is within its bounds and written again it is read as the
//! same, the memory taken is bounded by the input's length, and how a stream is cut into pieces changes nothing.

mod child;
mod columns;
mod frames;
mod heap;
mod http;
mod messages;
mod schema;

pub use child::child;
pub use columns::columns;
pub use frames::frames;
pub use http::http;
pub use messages::{ids, rows};
pub use schema::schema;

/// A property that must hold for every input; panics where it does not.
pub type Target = fn(&[u8]);

/// Every target under the name of its corpus.
pub const TARGETS: [(&str, Target); 7] = [
    ("ids", ids),
    ("rows", rows),
    ("frames", frames),
    ("child", child),
    ("schema", schema),
    ("columns", columns),
    ("http", http),
];
