//! Everything that moves a batch, from the producer's input to a sealed pass in ClickHouse.
//!
//! Read in this order, the modules are the path of one batch:
//!
//! 1. [`sample`] times the function and chooses a size; [`source`] cuts the user's ids into batches; [`publish`] writes them to the ids stream, first writer wins.
//! 2. [`consume`] takes permits, then pulls no more than they cover; [`delivery`] is what it gets: a payload with its
//!    acker and permit, ended exactly once.
//! 3. [`work`] decodes it, has [`compute`] grind the ids on the rayon pool, publishes the rows (`batch`; in `parts`, where they
//!    are more than one message may carry, or are done long before the others), and only then acks.
//! 4. [`sink`] gathers rows of one pass, inserts, asks ClickHouse what landed, and acks just that.
//! 5. [`seal`] proves a pass complete and makes readers see it; [`verify`] is the same proof told batch by batch, with
//!    repair.
//!
//! Beside the path: [`follow`] publishes ids that are not there yet, and `pace` minds the size of their batches; [`aside`]
//! keeps what is no batch of ours; [`replay`] makes further passes, [`rebuild`] inserts rows once more, [`forget`] removes
//! what nobody needs; [`build`] says which program this is; [`broker`] speaks to NATS and [`store`] to ClickHouse, with every setting and every timeout;
//! [`tables`] spells all SQL; [`records`] keeps runs and passes in the key-value bucket, [`board`] follows them, [`steer`]
//! changes them; `share` and `rate` say whose turn it is, `able` and `outlier`
//! whether this host should draw at all, [`max_dead`] whether a run should go on. [`load`] counts where time goes, [`hosts`] tells it, [`status`]
//! reads it all back, [`verdict`] judges it; [`tune`] measures this machine; [`moment`] is how people say when; [`stop`]
//! is how everything ends.

mod able;
pub mod aside;
mod batch;
pub mod board;
pub mod broker;
pub mod build;
pub mod compute;
pub mod consume;
pub mod delivery;
mod environment;
pub mod error;
pub mod failpoint;
pub mod follow;
pub mod forget;
pub mod hosts;
pub mod load;
pub mod max_dead;
pub mod moment;
mod outlier;
mod pace;
pub mod parts;
pub mod publish;
mod rate;
pub mod rebuild;
pub mod records;
pub mod replay;
pub mod retry;
pub mod sample;
pub mod seal;
mod share;
#[cfg(test)]
mod simulation;
pub mod sink;
pub mod source;
pub mod status;
pub mod steer;
pub mod stop;
pub mod store;
pub mod tables;
pub mod tune;
pub mod verdict;
pub mod verify;
pub mod work;

pub use able::prove;
pub use broker::{Broker, NatsAddress, StreamLimits};
pub use environment::Environment;
pub use error::Error;
pub use stop::Stop;
pub use store::{Store, StoreAddress};
