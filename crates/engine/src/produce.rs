//! From a user's input to batches in the ids stream: reading, sampling, cutting, publishing.
//!
//! Promises: the published ids are the surveyed ones, and each batch is stored once. A producer that resumes a run
//! repairs lost data, so this room may import [`seal`](crate::seal).

mod batch_size;
pub mod input;
pub mod open_run;
pub mod publish;
pub mod sample;
