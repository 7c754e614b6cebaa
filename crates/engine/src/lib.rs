//! Everything that moves a batch, from the producer's input to a sealed pass in ClickHouse.
//!
//! The modules are layers, and each imports only those above it (`tests/layers.rs` checks this):
//!
//! - [`model`]: data without I/O. Beside it, what every layer needs: [`error`], [`stop`], `retry`,
//!   [`failpoint`], [`telemetry`], [`Environment`].
//! - [`nats`] and [`clickhouse`]: every request to the servers, each with a time limit.
//! - [`fleet`]: what each process reports of itself.
//! - [`compute`]: the pool of processes that runs the user's function.
//! - [`work`] and [`sink`]: the stages between the ids stream and the table.
//! - [`seal`]: the proof that a pass is complete, and its repair.
//! - [`produce`]: from the user's input to the ids stream.
//! - [`control`]: what an operator does to a run.
//! - [`observe`]: what an operator reads about a run.
//!
//! ARCHITECTURE.md follows one batch through them.

pub mod clickhouse;
pub mod compute;
pub mod control;
mod environment;
pub mod error;
pub mod failpoint;
pub mod fleet;
pub mod model;
pub mod nats;
pub mod observe;
pub mod produce;
pub(crate) mod retry;
pub mod seal;
pub mod session;
#[cfg(test)]
mod simulation;
pub mod sink;
pub mod stop;
pub mod telemetry;
pub mod work;

pub use clickhouse::store::{Store, StoreAddress};
pub use environment::Environment;
pub use error::Error;
pub use nats::broker::{Broker, NatsAddress, StreamLimits};
pub use session::Session;
pub use stop::Stop;
pub use telemetry::metrics::Metrics;
