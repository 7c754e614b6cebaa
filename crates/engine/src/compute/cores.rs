//! Where a worker's ids are computed, and what is done about ids that crash or overrun.

use std::path::PathBuf;
use std::sync::Arc;

use millstream::schema::ColumnType;
use millstream::{Limits, Pipeline};

use super::alone::Alone;
use super::apart::{Apart, Ground};
use super::{BatchKey, Computed, Pool, blank_of};
use crate::error::Error;
use crate::load::Load;
use crate::work::WorkCounts;

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
pub struct Cores<P: Pipeline> {
    kind: Kind<P>,
    load: Load,
}

enum Kind<P: Pipeline> {
    Here(Pool<P>),
    Apart(Box<Processes<P>>),
}

struct Processes<P: Pipeline> {
    pool: Apart<P>,
    alone: Alone<P>,
    isolate: bool,
    load: Load,
}

impl<P: Pipeline> Cores<P> {
    /// Takes `threads` cores. Processes are started when there is something to compute.
    ///
    /// # Errors
    /// [`Error::Pool`] when the system gives no threads.
    pub fn start(
        pipeline: Arc<P>,
        columns: &[ColumnType],
        threads: usize,
        place: Place,
        limits: Limits,
        counts: Arc<WorkCounts>,
        load: Load,
    ) -> Result<Self, Error> {
        let kind = match place {
            Place::Here => Kind::Here(Pool::start(pipeline, columns, threads)?),
            Place::Apart(program) => Kind::Apart(Box::new(Processes {
                pool: Apart::new(program.clone(), threads, limits, counts.clone(), load.clone()),
                alone: Alone::new(program, threads, limits, blank_of(columns), counts),
                isolate: limits.isolate,
                load: load.clone(),
            })),
        };
        Ok(Self { kind, load })
    }

    /// Waits until ids can be computed at once, as far as that can be known before there are any.
    ///
    /// # Errors
    /// [`Error::Child`] when no process can be started.
    pub async fn ready(&self) -> Result<(), Error> {
        match &self.kind {
            Kind::Apart(processes) if !processes.isolate => processes.pool.ready().await,
            _ => Ok(()),
        }
    }

    /// Computes and encodes `ids`, which are sorted. With `last`, ids that would be tried again become dead letters;
    /// with `suspect`, each is computed alone.
    ///
    /// Dropping the future forgets the result, and leaves out the ids that are not begun.
    ///
    /// # Errors
    /// [`Error::Child`] when no process can be started; never for what an id does.
    pub async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<P::Id>,
        last: bool,
        suspect: bool,
    ) -> Result<Computed<P::Id>, Error> {
        let computed = match &self.kind {
            Kind::Here(pool) => pool.compute(key.clone(), ids, last).await,
            Kind::Apart(processes) => processes.compute(key, ids, last, suspect).await?,
        };
        self.load.spent(computed.spent);
        Ok(computed)
    }
}

impl<P: Pipeline> Processes<P> {
    async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<P::Id>,
        last: bool,
        suspect: bool,
    ) -> Result<Computed<P::Id>, Error> {
        if suspect || self.isolate {
            return self.alone(key, ids, last).await;
        }
        let (mut whole, mut left) = (Computed::default(), ids);
        while !left.is_empty() {
            let Ground { done, left: rest, suspect } = self.pool.compute(key, left, last).await?;
            whole.append(done);
            left = rest;
            if suspect {
                whole.append(self.alone(key, std::mem::take(&mut left), last).await?);
            }
        }
        Ok(whole)
    }

    async fn alone(&self, key: &BatchKey, ids: Vec<P::Id>, last: bool) -> Result<Computed<P::Id>, Error> {
        let computed = self.alone.compute(key, ids, last).await?;
        self.load.alone(computed.spent.computing);
        Ok(computed)
    }
}
