//! The seal: the proof that a pass is complete, and the moment when readers see it.
//!
//! Every sink process works on the seal of each finished pass; a compare-and-set on the pass's record lets only
//! one mark it sealed. The proof needs only ClickHouse and the run's record. The state in NATS only decides
//! when a proof is worth trying. An idle but incomplete pass is repaired here, as `verify --repair` does it.
//!
//! `step.rs` decides, without I/O. `drive.rs` runs the steps of several passes at once, with `take.rs` and
//! `tidy.rs` on real servers. `house.rs` purges acked rows and stale records beside them.

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

/// How long the tasks beside the passes may take to end.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);
/// The most run changes that wait while steps are chosen.
const RUNS_AT_ONCE: usize = 1024;

/// Seals passes as they complete, until taking stops. Shares `state` with the sink of this process. Through it
/// the sealer makes the sink insert the last rows of a pass at once, and the sink reports inserted rows to the
/// sealer. The reasons that keep passes from their seal are recorded there too.
///
/// # Errors
/// When the bucket cannot be read at the start; later failures are retried.
pub async fn seal_passes<I: Id>(session: Session, state: Arc<SinkState>, stop: &Stop) -> Result<(), Error> {
    let open = pass_watch::follow_to_seal(&session.records, stop).await?;
    let sealer = Sealer { session, state };
    let (report, standings) = watch::channel(HashMap::new());
    let (named, runs) = mpsc::channel(RUNS_AT_ONCE);
    stop.spawn(house::make_room(sealer.clone(), stop.clone()));
    stop.spawn(house::sweep(sealer.clone(), stop.clone()));
    stop.spawn(house::survey(sealer.clone(), open.clone(), report, stop.clone()));
    stop.spawn(house::watch_runs(sealer.clone(), named, stop.clone()));
    Drive::<I>::new(&sealer).run(Changes { open, standings, runs }, stop).await;
    stop.finished(LEAVE_WITHIN).await;
    Ok(())
}
