//! The seal: proof that a pass is complete, and the moment when readers see it.
//!
//! Every sink process drives passes that are done to their seal; a compare-and-set on the pass's record lets one of them say
//! so. The proof needs ClickHouse and the run's record alone: what NATS believes only decides when it is worth trying. A pass
//! that has come to rest and is not complete is repaired here, as `verify --repair` does it.
//!
//! `step.rs` decides, without I/O; `drive.rs` takes the steps of several passes at once, `take.rs` and `tidy.rs` on real
//! servers; `house.rs` keeps room in the stream beside them.

pub(crate) mod copied;
mod drive;
pub(crate) mod gone;
mod house;
mod proof;
mod sealer;
mod show;
pub(crate) mod step;
mod take;
mod tidy;
pub mod verify;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use millstream::Id;
use tokio::sync::{mpsc, watch};

use crate::error::Error;
use crate::nats::pass_watch;
use crate::session::Session;
use crate::sink::SinkState;
use crate::stop::Stop;
use drive::{Changes, Drive};
pub use proof::Proof;
use sealer::Sealer;

/// How long tasks beside the passes may take to end.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);
/// Changes of runs that are remembered while steps are chosen.
const RUNS_AT_ONCE: usize = 1024;

/// Seals passes as they complete, until taking stops. The sink that has the same `state` is told when a pass's workers are done,
/// so that its last rows do not wait for more, and tells when they have landed; what keeps passes from their seal is noted there.
///
/// # Errors
/// When the bucket cannot be read at the start; afterwards failures are waited out.
pub async fn seal_passes<I: Id>(session: Session, state: Arc<SinkState>, stop: &Stop) -> Result<(), Error> {
    let open = pass_watch::follow_to_seal(&session.records, stop).await?;
    let sealer = Sealer { session, state };
    let (told, standings) = watch::channel(HashMap::new());
    let (named, runs) = mpsc::channel(RUNS_AT_ONCE);
    stop.spawn(house::make_room(sealer.clone(), stop.clone()));
    stop.spawn(house::sweep(sealer.clone(), stop.clone()));
    stop.spawn(house::survey(sealer.clone(), open.clone(), told, stop.clone()));
    stop.spawn(house::watch_runs(sealer.clone(), named, stop.clone()));
    Drive::<I>::new(&sealer).run(Changes { open, standings, runs }, stop).await;
    stop.finished(LEAVE_WITHIN).await;
    Ok(())
}
