//! Where a worker's ids are computed, and what is done about ids that crash or overrun.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use millstream::schema::Schema;
use millstream::{Id, Limits};
use tokio::sync::OnceCell;

use super::alone::Alone;
use super::apart::{Apart, Ground, Suspect};
use super::process::Program;
use super::{BatchKey, Computed, Function, Pool};
use crate::error::Error;
use crate::load::Load;
use crate::work::WorkCounts;

/// Ids are computed alone once so many pools in a row that had them gave no sign any more.
const SILENT_POOLS: u32 = 2;

/// Which process computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// This one: for tests and for embedding. An id that crashes takes the whole process along, and limits of time and
    /// memory do not hold.
    Here,
    /// Child processes of this program, which is a pipeline's binary and answers in [`child_main`](super::child_main).
    Apart(PathBuf),
}

/// The cores of this host.
pub struct Cores<I> {
    kind: Kind<I>,
    schema: Arc<Schema>,
    load: Load,
}

enum Kind<I> {
    Here(Pool<I>, OnceCell<()>),
    Apart(Box<Processes<I>>),
}

struct Processes<I> {
    pool: Apart<I>,
    alone: Alone<I>,
    schema: Arc<Schema>,
    isolate: bool,
    load: Load,
}

impl<I: Id> Cores<I> {
    /// Takes `threads` cores. Processes are started when there is something to compute.
    ///
    /// # Errors
    /// [`Error::Pool`] when the system gives no threads.
    pub fn start(
        function: Function<I>,
        threads: usize,
        place: Place,
        limits: Limits,
        counts: Arc<WorkCounts>,
        load: Load,
    ) -> Result<Self, Error> {
        let schema = function.spec().schema.clone();
        let kind = match place {
            Place::Here => Kind::Here(Pool::start(function, threads)?, OnceCell::new()),
            Place::Apart(path) => {
                let (pipeline, start_within) = (function.spec().name, limits.start_within);
                let program = Program { path, pipeline, start_within };
                let (counted, pool_load) = (counts.clone(), load.clone());
                let got_going = Arc::<AtomicBool>::default();
                let going = got_going.clone();
                Kind::Apart(Box::new(Processes {
                    pool: Apart::new(
                        program.clone(),
                        schema.clone(),
                        threads,
                        limits,
                        counted,
                        pool_load,
                        going,
                    ),
                    alone: Alone::new(program, threads, limits, schema.clone(), counts, got_going),
                    schema: schema.clone(),
                    isolate: limits.isolate,
                    load: load.clone(),
                }))
            }
        };
        Ok(Self { kind, schema, load })
    }

    /// The columns that rows go into.
    pub(crate) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Waits until ids can be computed at once: all threads stand, and the pipeline's `start` is over.
    ///
    /// # Errors
    /// [`Error::Child`] when this host cannot compute.
    pub async fn ready(&self) -> Result<(), Error> {
        match &self.kind {
            Kind::Apart(processes) if processes.isolate => processes.alone.ready().await,
            Kind::Apart(processes) => processes.pool.ready().await,
            Kind::Here(pool, started) => started.get_or_try_init(|| pool.started()).await.copied(),
        }
    }

    /// Computes `ids`, which are sorted. With `last`, ids that would be tried again become dead letters;
    /// with `suspect`, each is computed alone.
    ///
    /// Dropping the future forgets the result, and leaves out the ids that are not begun.
    ///
    /// # Errors
    /// [`Error::Child`] when no process can be started; never for what an id does.
    pub async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        last: bool,
        suspect: bool,
    ) -> Result<Computed<I>, Error> {
        let computed = match &self.kind {
            Kind::Here(pool, _) => {
                self.ready().await?;
                pool.compute(ids, last).await
            }
            Kind::Apart(processes) => processes.compute(key, ids, last, suspect).await?,
        };
        self.load.spent(computed.spent);
        Ok(computed)
    }
}

impl<I: Id> Processes<I> {
    async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        last: bool,
        suspect: bool,
    ) -> Result<Computed<I>, Error> {
        if suspect || self.isolate {
            return self.alone(key, ids, last).await;
        }
        let (mut whole, mut left, mut silent) = (Computed::none(&self.schema), ids, 0);
        while !left.is_empty() {
            let Ground { done, left: rest, suspect } = self.pool.compute(key, left, last).await?;
            whole.append(done);
            left = rest;
            silent += u32::from(suspect == Suspect::Silent);
            if suspect == Suspect::Yes || silent == SILENT_POOLS {
                whole.append(self.alone(key, std::mem::take(&mut left), last).await?);
            }
        }
        Ok(whole)
    }

    async fn alone(&self, key: &BatchKey, ids: Vec<I>, last: bool) -> Result<Computed<I>, Error> {
        let computed = self.alone.compute(key, ids, last).await?;
        self.load.alone(computed.spent.computing);
        Ok(computed)
    }
}
