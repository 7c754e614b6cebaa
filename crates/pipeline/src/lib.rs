//! What a pipeline's author imports, and the wire formats that all of Millstream shares.
//!
//! A pipeline is a type that implements [`Pipeline`]: a name, an id type, a row type with its ClickHouse
//! columns, and one function from an id to a row. This crate does no I/O and starts no threads, so a plain
//! `#[test]` can test the function. [`check`] compares the row type with the columns without computing
//! anything.
//!
//! | module | what it owns |
//! |---|---|
//! | [`pipeline`], [`limits`] | the trait, the three outcomes of an id; what an id may take |
//! | [`id`], [`block`] | id types; how a batch's ids are packed into bytes |
//! | [`envelope`] | the messages of both streams, byte for byte |
//! | [`schema`] | the columns: their types, their text form; the row type against them |
//! | [`columns`], [`native`] | rows as columns by name; the blocks that ClickHouse ingests |
//! | [`frame`] | ClickHouse's compressed frames |
//! | [`child`] | what a worker and a child process that computes say to each other |
//! | [`names`] | the only place that spells subjects, streams, consumers, keys; the grammar of names |

pub mod block;
pub mod child;
pub mod columns;
pub mod envelope;
pub mod frame;
pub mod id;
pub mod limits;
pub mod names;
pub mod native;
pub mod pipeline;
pub mod schema;

pub use id::{Id, MAX_STRING_ID, shortened};
pub use limits::Limits;
pub use pipeline::{Failure, Outcome, Pipeline};
pub use schema::{SchemaFault, Spec, check};

/// The most ids in a batch: a batch is inserted whole, and one INSERT is atomic only as one block, which we
/// limit to 500,000 rows (ClickHouse's own default is 1,048,449).
pub const MAX_BATCH_IDS: u32 = 500_000;
