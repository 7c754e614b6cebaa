//! Data that all rooms share, and how it is parsed and printed. This room contacts no server.

pub mod address;
pub mod build;
pub mod counts;
pub mod host;
pub mod id_digest;
pub mod input_fault;
pub mod moment;
pub mod record;
pub mod rows;
pub mod seal_step;
pub mod selection;
pub mod times;
