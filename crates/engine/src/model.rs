//! What all rooms speak of: data, and how it is read and shown. Asks no server.

pub mod address;
pub mod build;
pub mod counts;
pub mod host;
pub mod id_digest;
pub mod input_fault;
pub mod moment;
pub mod record;
pub mod rows;
pub mod selection;
pub mod times;
