//! Drives passes to their seal: runs the steps that `step.rs` decides on, for several passes at once.
//!
//! A pass waits only for its own steps; [`Room`] limits how many run at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use millstream::Id;
use millstream::names::{PassId, RunName};
use tokio::sync::{mpsc, watch};

use super::sealer::Sealer;
use super::step::{Course, IDLE, Next, Room, Seen, Step};
use super::take::Carried;
use crate::error::full_cause;
use crate::model::record::{Open, PassRecord, PassState};
use crate::nats::broker::Standing;
use crate::stop::Stop;

/// How long running steps may take once this process is stopping. Each can be aborted at any point.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);

/// Sources of changes that end a wait.
pub(super) struct Changes {
    /// The passes that have something to do.
    pub open: watch::Receiver<Open>,
    /// The state of each pass's worker consumer, by consumer name.
    pub standings: watch::Receiver<HashMap<String, Standing>>,
    /// Runs whose record has changed.
    pub runs: mpsc::Receiver<RunName>,
}

/// A pass on its way to the seal.
struct Lane {
    record: PassRecord,
    course: Course,
    due: Instant,
    /// Data that one step passes to later ones; `None` while a step is running.
    carried: Option<Box<Carried>>,
    /// Whether rows of the pass were inserted while a step was running.
    is_stale: bool,
    /// The state of the pass's worker consumer at the last check.
    standing: Option<Standing>,
    /// Whether this process made the seal.
    is_ours: bool,
}

impl Lane {
    fn new(record: &PassRecord) -> Self {
        let (course, Next { after, .. }) = Course::begin(record.state, record.covers.is_some());
        Self {
            record: record.clone(),
            course,
            due: Instant::now() + after,
            carried: Some(Box::default()),
            is_stale: false,
            standing: None,
            is_ours: false,
        }
    }

    /// Starts over if the record has another state than before; any other change of the record ends a wait.
    fn follow(&mut self, record: &PassRecord) {
        if *record == self.record {
            return;
        }
        let is_same = record.state == self.record.state;
        self.record = record.clone();
        if is_same {
            self.wake();
        } else if !(record.state == PassState::Sealed && self.is_ours) {
            let (course, Next { after, .. }) = Course::begin(record.state, record.covers.is_some());
            (self.course, self.due, self.is_ours) = (course, Instant::now() + after, false);
        }
    }

    /// Continues with the finish of the seal that this process made, even if the watch has not reported it yet.
    fn is_marked(&mut self) {
        let (course, _) = Course::begin(PassState::Sealed, false);
        (self.course, self.due, self.is_ours) = (course, Instant::now(), true);
        self.record.state = PassState::Sealed;
    }

    /// Rows of the pass were inserted. A pause after a failure continues, because it has another reason.
    fn landed(&mut self) {
        // A running step may see the rows from before.
        self.is_stale = self.carried.is_none();
        if !self.is_stale && self.course.step() == Step::Ask {
            self.wake();
        }
    }

    fn wake(&mut self) {
        self.course.changed();
        if self.course.step().waits_for_workers() {
            self.due = self.due.min(Instant::now());
        }
    }
}

struct Taken {
    key: PassId,
    state: PassState,
    step: Step,
    place: usize,
    carried: Box<Carried>,
    seen: Seen,
}

pub(super) struct Drive<'a, I> {
    sealer: &'a Sealer,
    lanes: BTreeMap<PassId, Lane>,
    steps: FuturesUnordered<BoxFuture<'a, Taken>>,
    room: Room,
    ids: std::marker::PhantomData<I>,
}

impl<'a, I: Id> Drive<'a, I> {
    pub(super) fn new(sealer: &'a Sealer) -> Self {
        Self {
            sealer,
            lanes: BTreeMap::new(),
            steps: FuturesUnordered::new(),
            room: Room::default(),
            ids: std::marker::PhantomData,
        }
    }

    /// Runs until taking stops, or until work is given up. `seen` reports changes.
    pub(super) async fn run(mut self, mut seen: Changes, stop: &Stop) {
        self.follow(&seen.open.borrow_and_update());
        while !stop.taking_stopped() {
            let next = self.start_due();
            tokio::select! {
                () = stop.no_more_taking() => break,
                Some(taken) = self.steps.next(), if !self.steps.is_empty() => self.took(taken),
                changed = seen.open.changed() => match changed {
                    Ok(()) => self.follow(&seen.open.borrow_and_update()),
                    // The watch ends only when the process ends.
                    Err(_) => break,
                },
                Some(run) = seen.runs.recv() => self.wake_run(&run),
                runs = self.sealer.state.bells.landed() => self.landed(&runs),
                Ok(()) = seen.standings.changed() => self.compare(&seen.standings.borrow_and_update()),
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
        if tokio::time::timeout(LEAVE_WITHIN, self.leave()).await.is_err() {
            tracing::debug!(steps = self.steps.len(), "sealer stops: other sealers continue these steps");
        }
    }

    /// Lets running steps end, and finishes seals that readers already see.
    async fn leave(&mut self) {
        self.finish_ours();
        while let Some(taken) = self.steps.next().await {
            self.took(taken);
            self.finish_ours();
        }
    }

    fn finish_ours(&mut self) {
        let is_due =
            |lane: &Lane| lane.is_ours && lane.course.step() == Step::Finish && lane.due <= Instant::now();
        let due: Vec<PassId> =
            self.lanes.iter().filter(|(_, lane)| is_due(lane)).map(|(key, _)| key.clone()).collect();
        due.iter().for_each(|key| self.start(key));
    }

    fn follow(&mut self, open: &Open) {
        let sealer = self.sealer;
        self.lanes.retain(|key, _| {
            let stays = open.contains_key(key);
            if !stays {
                sealer.waits().clear(key);
            }
            stays
        });
        for (key, record) in open {
            self.lanes.entry(key.clone()).or_insert_with(|| Lane::new(record)).follow(record);
        }
        sealer.metrics().following(self.lanes.len());
        sealer.metrics().waiting(sealer.waits().count());
    }

    /// Makes passes due whose worker consumer has changed.
    fn compare(&mut self, standings: &HashMap<String, Standing>) {
        let names = self.sealer.session.broker.names();
        for (key, lane) in &mut self.lanes {
            let standing = standings.get(&names.work_consumer(key)).copied();
            if standing != lane.standing {
                lane.standing = standing;
                lane.wake();
            }
        }
    }

    fn landed(&mut self, runs: &BTreeSet<RunName>) {
        let lanes = self.lanes.iter_mut().filter(|(key, _)| runs.contains(&key.run));
        lanes.for_each(|(_, lane)| lane.landed());
    }

    fn wake_run(&mut self, run: &RunName) {
        self.lanes.iter_mut().filter(|(key, _)| key.run == *run).for_each(|(_, lane)| lane.wake());
    }

    /// Starts the steps that are due, and returns when the next one is. A step without a free slot waits until
    /// another ends.
    fn start_due(&mut self) -> Instant {
        let now = Instant::now();
        let mut next = now + IDLE;
        let mut due: BTreeSet<(Instant, PassId)> = BTreeSet::new();
        for (key, lane) in &self.lanes {
            match lane.due {
                _ if lane.carried.is_none() || lane.course.step() == Step::Rest => {}
                at if at <= now => {
                    due.insert((at, key.clone()));
                }
                at => next = next.min(at),
            }
        }
        for (_, key) in due {
            self.start(&key);
        }
        next
    }

    /// Starts the step of a pass, if there is a free slot of its kind.
    fn start(&mut self, key: &PassId) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        let step = lane.course.step();
        let Some(mut carried) = lane.carried.take() else { return };
        let Some(place) = self.room.enter(step, carried.is_large()) else {
            lane.carried = Some(carried);
            return;
        };
        carried.is_out_of_repairs = lane.course.is_out_of_repairs();
        let sealer = self.sealer;
        let key = key.clone();
        let state = lane.record.state;
        self.steps.push(
            async move {
                let begun = Instant::now();
                let taking = sealer.take::<I>(step, &key, &mut carried);
                let seen = match tokio::time::timeout(step.within(), taking).await {
                    Ok(Ok(seen)) => seen,
                    Ok(Err(error)) => {
                        tracing::warn!(run = %key.run, pass = key.pass, error = full_cause(&error), hint = error.hint(), code = error.code().map(tracing::field::display), "not sealed yet");
                        Seen::Failed
                    }
                    Err(_) => {
                        let within_s = step.within().as_secs();
                        tracing::warn!(run = %key.run, pass = key.pass, ?step, within_s, "not sealed yet: a step took too long");
                        Seen::Failed
                    }
                };
                sealer.metrics().step_taken(step, seen == Seen::Failed, begun.elapsed());
                Taken { key, state, step, place, carried, seen }
            }
            .boxed(),
        );
    }

    fn took(&mut self, taken: Taken) {
        let Taken { key, state, step, place, carried, seen } = taken;
        self.room.leave(place);
        self.sealer.metrics().waiting(self.sealer.waits().count());
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        lane.carried = Some(carried);
        if seen == Seen::Marked {
            return lane.is_marked();
        }
        // The record changed during the step, and the course of the pass has started over.
        if lane.record.state != state || lane.course.step() != step {
            return;
        }
        let Next { after, .. } = lane.course.next(seen);
        lane.due = Instant::now() + jittered(after);
        if std::mem::take(&mut lane.is_stale) {
            lane.landed();
        }
    }
}

/// Adds jitter, so that sealers that saw the same change do not all retry at once.
fn jittered(pause: Duration) -> Duration {
    if pause.is_zero() { pause } else { pause.mul_f64(0.75 + 0.25 * crate::retry::random_unit()) }
}
