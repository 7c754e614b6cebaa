//! From a user's input to batches in the ids stream: read, sampled, cut, published.
//!
//! Promises: what is published is what was surveyed, each batch once. A producer that goes on with a run has what is lost repaired,
//! so this room stands above [`seal`](crate::seal).

mod batch_size;
pub mod input;
pub mod open_run;
pub mod publish;
pub mod sample;
