//! The local stack: a private nats-server and a private ClickHouse under one data directory, for a run that names no
//! servers of its own.
//!
//! [`open`] takes the data directory, finds both servers ([`find_nats_server`], [`find_clickhouse`]), fetching pinned
//! copies once, starts them on loopback ports, and keeps them up until [`Stack::stop`]. Where another process holds
//! the directory, the stack attaches to its servers or says who is in the way.
//!
//! No server outlives its owner, not even one that is killed: each hangs on a pipe that its owner holds. For that, a
//! binary that opens a stack calls [`child_main`] first thing.
//!
//! | module | what it owns |
//! |---|---|
//! | `data` | the data directory: layout, lock, who may use it |
//! | `find`, `fetch` | binaries on PATH; pinned copies in the cache |
//! | `nats`, `clickhouse` | configurations and command lines |
//! | `program`, `keep` | one child: start, readiness, stop; restarts |
//! | `guard`, `leftover` | servers end with their owner; those that did not are stopped |
//! | `child` | what a pipeline's binary does as a child of the stack: guards a server, or serves the engine (`chdb_http`) |
//! | `stack` | all of it together |
//!
//! Deliberately missing: passwords. Everything listens on loopback only; every account of this machine reaches it.

mod child;
mod clickhouse;
mod data;
mod disk;
mod error;
mod event;
mod fetch;
mod find;
mod guard;
mod keep;
mod leftover;
mod nats;
mod net;
mod program;
mod stack;

pub use child::child_main;
pub use data::{Holder, Owner};
pub use disk::free;
pub use error::{Error, Tail};
pub use event::{Event, Progress, Server};
pub use find::{ClickHouse, find_clickhouse, find_nats_server};
pub use stack::{Options, Stack, is_held, is_there, open};
