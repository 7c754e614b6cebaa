//! Measures how fast this machine computes a sample, by number of threads and batch size, for users who want to
//! see the curve. It computes and encodes as a worker does, and stores nothing.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::{Id, MAX_BATCH_IDS};
use serde::Serialize;
use tokio::time::Instant;

use crate::compute::{Cores, Function};
use crate::error::Error;
use crate::fleet::times::WorkLoad;
use crate::produce::input::Sample;
use crate::produce::sample::compute;
use crate::stop::Stop;
use crate::telemetry::metrics::Metrics;
use crate::work::WorkPlan;
use crate::work::pull::Slots;

/// The factor between one batch size and the next.
const STEP: u32 = 4;

/// The throughput at one number of threads and one batch size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// Compute threads.
    pub threads: usize,
    /// Ids per batch.
    pub batch_ids: u32,
    /// Ids computed and encoded per second.
    pub ids_per_second: f64,
    /// The number of finished batches.
    pub batches: u64,
}

/// Measures every size with every number of threads, for about `time` in total, the smallest sizes first, and
/// passes on each result at once. Sizes that take too long for their share of the time are left out.
///
/// # Errors
/// [`Error::Stopped`] when it is interrupted, [`Error::Child`] when no process can be started.
pub async fn tune<I: Id>(
    function: &Function<I>,
    plan: &WorkPlan,
    sample: &Sample<I>,
    time: Duration,
    stop: &Stop,
    mut measured: impl FnMut(Measured),
) -> Result<(), Error> {
    let all_threads = thread_counts(plan.threads);
    let sizes = sizes(sample.len());
    let each = time / (all_threads.len() * sizes.len()) as u32;
    for threads in all_threads {
        let place = plan.place.clone();
        let load = Arc::new(WorkLoad::new(threads));
        let cores = Cores::start(function.clone(), threads, place, plan.limits, Metrics::default(), load)?;
        cores.ready().await?;
        for batch_ids in &sizes {
            let one = measure(&cores, threads, *batch_ids, sample.clone(), each);
            let found = tokio::select! {
                found = one => found?,
                () = stop.no_more_taking() => return Err(Error::Stopped),
            };
            // A larger size takes even longer.
            let Some(found) = found else { break };
            measured(found);
        }
    }
    Ok(())
}

/// Keeps the cores as busy as a worker does; `None` if no batch is finished in the time.
async fn measure<I: Id>(
    cores: &Cores<I>,
    threads: usize,
    batch_ids: u32,
    mut sample: Sample<I>,
    time: Duration,
) -> Result<Option<Measured>, Error> {
    let begun = Instant::now();
    let at_once = Slots::new(threads).batches(batch_ids);
    let mut ids = 0;
    let mut batches = 0;
    let mut last = begun;
    let mut flights = FuturesUnordered::new();
    loop {
        while flights.len() < at_once {
            flights.push(compute(cores, sample.take(batch_ids as usize)));
        }
        match tokio::time::timeout_at(begun + time, flights.next()).await {
            Ok(Some(done)) => (ids, batches, last) = (ids + done?.0.len(), batches + 1, Instant::now()),
            _ => break,
        }
    }
    let seconds = (last - begun).as_secs_f64();
    let measured = Measured { threads, batch_ids, ids_per_second: ids as f64 / seconds, batches };
    Ok((batches > 0).then_some(measured))
}

/// Powers of two up to `most`, and `most` itself.
fn thread_counts(most: usize) -> Vec<usize> {
    let mut counts: Vec<usize> =
        (0..usize::BITS).map(|power| 1 << power).take_while(|count| *count < most).collect();
    counts.push(most);
    counts
}

/// The batch sizes that this many ids allow.
fn sizes(ids: u64) -> Vec<u32> {
    let most = u64::from(MAX_BATCH_IDS).min(ids.max(1)) as u32;
    std::iter::successors(Some(1u32), |size| size.checked_mul(STEP))
        .take_while(|size| *size <= most)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_and_sizes_are_spread() {
        assert_eq!(
            [1, 2, 6, 64].map(thread_counts),
            [vec![1], vec![1, 2], vec![1, 2, 4, 6], vec![1, 2, 4, 8, 16, 32, 64]]
        );
        assert_eq!(sizes(0), [1]);
        assert_eq!(sizes(300), [1, 4, 16, 64, 256]);
        assert_eq!(sizes(u64::MAX).last(), Some(&262_144));
    }
}
