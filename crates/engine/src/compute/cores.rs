//! Where a worker computes ids, and what it does about ids that crash or overrun.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use millstream::schema::Schema;
use millstream::{Id, Limits};
use tokio::sync::OnceCell;

use super::computed::{BatchKey, Computed};
use super::function::Function;
use super::isolated::Isolated;
use super::pool::Pool;
use super::pool_process::{Leftover, PoolProcess, Suspect};
use super::process::Program;
use super::results::Results;
use crate::error::Error;
use crate::fleet::times::Load;
use crate::telemetry::metrics::Metrics;

/// After so many silent pools in a row the worker computes their ids in isolated processes.
const SILENT_POOLS: u32 = 2;

/// Which process computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// This process: for tests and for embedding. An id that crashes ends the whole process, and limits of time and
    /// memory do not hold.
    Here,
    /// Child processes of this program, a pipeline's binary that calls [`child_main`](super::child_main).
    PoolProcess(PathBuf),
}

/// The cores of this host.
pub struct Cores<I> {
    kind: Kind<I>,
    schema: Arc<Schema>,
    load: Load,
}

enum Kind<I> {
    Here(Pool<I>, OnceCell<()>),
    PoolProcess(Box<Processes<I>>),
}

struct Processes<I> {
    pool: PoolProcess<I>,
    isolated: Isolated<I>,
    isolate: bool,
}

impl<I: Id> Cores<I> {
    /// Prepares `threads` cores. Child processes start when there is something to compute.
    ///
    /// # Errors
    /// [`Error::Pool`] when the system gives no threads.
    pub fn start(
        function: Function<I>,
        threads: usize,
        place: Place,
        limits: Limits,
        metrics: Metrics,
        load: Load,
    ) -> Result<Self, Error> {
        let schema = function.spec().schema.clone();
        let kind = match place {
            Place::Here => Kind::Here(Pool::start(function, threads)?, OnceCell::new()),
            Place::PoolProcess(path) => {
                let pipeline = function.spec().name;
                let start_within = limits.start_within;
                let program = Program { path, pipeline, start_within };
                let counted = metrics.clone();
                let pool_load = load.clone();
                let got_going = Arc::<AtomicBool>::default();
                let going = got_going.clone();
                Kind::PoolProcess(Box::new(Processes {
                    pool: PoolProcess::new(
                        program.clone(),
                        schema.clone(),
                        threads,
                        limits,
                        counted,
                        pool_load,
                        going,
                    ),
                    isolated: Isolated::new(program, threads, limits, schema.clone(), metrics, got_going),
                    isolate: limits.isolate,
                }))
            }
        };
        Ok(Self { kind, schema, load })
    }

    /// The columns of the rows.
    pub(crate) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Waits until ids can be computed at once: all threads run, and the pipeline's `start` is over.
    ///
    /// # Errors
    /// [`Error::Child`] when this host cannot compute.
    pub async fn ready(&self) -> Result<(), Error> {
        match &self.kind {
            Kind::PoolProcess(processes) if processes.isolate => processes.isolated.ready().await,
            Kind::PoolProcess(processes) => processes.pool.ready().await,
            Kind::Here(pool, started) => started.get_or_try_init(|| pool.started()).await.copied(),
        }
    }

    /// Computes `ids`, which are sorted. With `last`, ids that ask for another attempt become dead letters; with
    /// `suspect`, each id is computed in an isolated process.
    ///
    /// Dropping the future discards the result, and skips the ids that are not begun.
    ///
    /// # Errors
    /// [`Error::Child`] when no process can be started; never because of an id.
    pub async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        last: bool,
        suspect: bool,
    ) -> Result<Computed<I>, Error> {
        let results = self.results();
        self.compute_onto(key, ids, (last, suspect), &results).await?;
        Ok(results.take_all(&self.schema))
    }

    /// An empty store for results, to which computed ids are added one piece at a time.
    pub(crate) fn results(&self) -> Arc<Results<I>> {
        Arc::new(Results::counted(self.load.clone()))
    }

    /// Computes like [`Self::compute`], and adds results to the store as they arrive. If it fails, the store may hold
    /// some of them.
    ///
    /// # Errors
    /// Errors of [`Self::compute`].
    pub(crate) async fn compute_onto(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        (last, suspect): (bool, bool),
        results: &Arc<Results<I>>,
    ) -> Result<(), Error> {
        match &self.kind {
            Kind::Here(pool, _) => {
                self.ready().await?;
                pool.compute_onto(ids, last, results).await;
                Ok(())
            }
            Kind::PoolProcess(processes) => processes.compute(key, ids, (last, suspect), results).await,
        }
    }
}

impl<I: Id> Processes<I> {
    async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        (last, suspect): (bool, bool),
        results: &Arc<Results<I>>,
    ) -> Result<(), Error> {
        if suspect || self.isolate {
            return self.isolated.compute(key, ids, last, results).await;
        }
        let mut left = ids;
        let mut silent = 0;
        while !left.is_empty() {
            let Leftover { left: rest, suspect } = self.pool.compute(key, left, last, results).await?;
            left = rest;
            silent += u32::from(suspect == Suspect::Silent);
            if suspect == Suspect::Yes || silent == SILENT_POOLS {
                self.isolated.compute(key, std::mem::take(&mut left), last, results).await?;
            }
        }
        Ok(())
    }
}
