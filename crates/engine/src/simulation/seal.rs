//! Tests the decisions of sealers on a model of the worst servers. Several sealers are killed at each point,
//! and their answers are lost. Merges are stopped, mutations never end, rows are lost or doubled, and a proof
//! takes an hour beside small runs. The decisions are made by the real code, [`Course`] and [`Room`]; the rest
//! is a model.

use std::time::Duration;

use super::model::Dice;
use super::with_seeds;
use crate::model::record::PassState;
use crate::seal::step::{Course, Room, Seen, Step};

const SEEDS: u64 = 2000;
const SEALERS: usize = 3;
const PASSES: usize = 5;
/// The pass whose proof takes long.
const LARGE: usize = 0;
/// Seconds in which anything may go wrong, and seconds after them in which the model must come to rest.
const TROUBLED: u64 = 400;
const CALM: u64 = 12_000;
/// Seconds within which a small, fully stored pass is sealed, once nothing goes wrong any more.
const SOON: u64 = 200;

/// The whereabouts of a batch's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Batch {
    Pending,
    InWorker,
    InStream,
    InSink,
    /// A sink holds the batch, and the table refuses it until the trouble is over.
    Refused,
    Stored,
    Lost,
}

/// A pass in the state of the servers.
#[derive(Debug)]
struct Pass {
    batches: Vec<Batch>,
    doubles: u32,
    state: PassState,
    freed: bool,
    revision: u64,
    shown: bool,
    announced: u32,
    consumer: bool,
    complete_since: Option<u64>,
}

/// One pass in the state of a sealer.
struct Lane {
    state: PassState,
    course: Course,
    due: u64,
    /// The record's revision before the proof.
    before: u64,
    under_way: Option<UnderWay>,
}

struct UnderWay {
    step: Step,
    place: usize,
    ends: u64,
    /// When the step takes effect; its answer comes later.
    acts: Option<u64>,
    seen: Seen,
}

#[derive(Default)]
struct Sealer {
    lanes: Vec<Option<Lane>>,
    room: Room,
}

#[derive(Debug, Default)]
struct Tally {
    kills: u64,
    lost_answers: u64,
    beaten: u64,
    finished_for_others: u64,
    merges_in_vain: u64,
    repairs: u64,
    cancelled: u64,
}

struct World {
    dice: Dice,
    now: u64,
    troubled: bool,
    merges_stopped: bool,
    mutations_stuck: bool,
    passes: Vec<Pass>,
    sealers: Vec<Sealer>,
    tally: Tally,
    diary: Vec<String>,
}

#[test]
fn sealers_seal_each_pass_once_and_leave_nothing_behind_on_the_worst_servers() {
    let mut sums = [0; 7];
    let were_all = with_seeds(SEEDS, |seed| {
        let mut world = World::new(seed);
        if let Err(fault) = world.run() {
            panic!("MILLSTREAM_SEED={seed}\n{}\n{:#?}\n{fault}", world.diary.join("\n"), world.passes);
        }
        let Tally { kills, lost_answers, beaten, finished_for_others, merges_in_vain, repairs, cancelled } =
            world.tally;
        let found = [kills, lost_answers, beaten, finished_for_others, merges_in_vain, repairs, cancelled];
        sums.iter_mut().zip(found).for_each(|(sum, more)| *sum += more);
    });
    // A model in which nothing happens would prove nothing.
    assert!(!were_all || sums.iter().all(|sum| *sum > SEEDS / 50), "{sums:?}");
}

impl Pass {
    fn new(dice: &mut Dice) -> Self {
        let batches = vec![Batch::Pending; 1 + dice.below(6) as usize];
        Self {
            batches,
            doubles: 0,
            state: PassState::Running,
            freed: false,
            revision: 1,
            shown: false,
            announced: 0,
            consumer: true,
            complete_since: None,
        }
    }

    fn has(&self, wanted: &[Batch]) -> bool {
        self.batches.iter().any(|batch| wanted.contains(batch))
    }

    fn is_complete(&self) -> bool {
        self.batches.iter().all(|batch| *batch == Batch::Stored)
    }

    fn raw(&self) -> usize {
        self.batches.iter().filter(|batch| **batch == Batch::Stored).count() + self.doubles as usize
    }

    fn is_over(&self) -> bool {
        self.freed && !matches!(self.state, PassState::Running | PassState::Paused)
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let passes = (0..PASSES).map(|_| Pass::new(&mut dice)).collect();
        Self {
            dice,
            now: 0,
            troubled: true,
            merges_stopped: false,
            mutations_stuck: false,
            passes,
            sealers: (0..SEALERS).map(|_| Sealer::new()).collect(),
            tally: Tally::default(),
            diary: Vec::new(),
        }
    }

    fn note(&mut self, text: String) {
        self.diary.push(format!("{:>6} {text}", self.now));
    }

    fn run(&mut self) -> Result<(), String> {
        while self.now < TROUBLED + CALM {
            self.now += 1;
            self.troubled = self.now < TROUBLED;
            if self.troubled {
                self.inject_faults();
            } else {
                (self.merges_stopped, self.mutations_stuck) = (false, false);
            }
            self.rows_move();
            for which in 0..SEALERS {
                self.act(which)?;
            }
            self.are_small_ones_soon()?;
            if !self.troubled && self.passes.iter().all(Pass::is_over) {
                return self.check();
            }
        }
        Err("no rest in the end".into())
    }

    fn check(&self) -> Result<(), String> {
        for (at, pass) in self.passes.iter().enumerate() {
            let is_sealed = pass.state == PassState::Sealed;
            let is_right = if is_sealed {
                pass.shown && pass.announced > 0 && pass.is_complete()
            } else {
                !pass.shown && pass.announced == 0
            };
            if !is_right || pass.consumer || (is_sealed && pass.has(&[Batch::InStream])) {
                return Err(format!("pass {at} is not as it should be in the end"));
            }
        }
        Ok(())
    }

    /// A long proof of another pass must not delay a small one.
    fn are_small_ones_soon(&mut self) -> Result<(), String> {
        let now = self.now;
        let troubled = self.troubled;
        for (at, pass) in self.passes.iter_mut().enumerate().filter(|(at, _)| *at != LARGE) {
            let waits = !troubled && pass.state == PassState::Running && pass.is_complete();
            let since = *pass.complete_since.get_or_insert(now);
            if !waits {
                pass.complete_since = None;
            } else if now - since > SOON {
                return Err(format!("pass {at} has all its rows since {since} and is not sealed"));
            }
        }
        Ok(())
    }

    fn inject_faults(&mut self) {
        if !self.dice.one_in(12) {
            return;
        }
        let which = self.dice.below(SEALERS as u64) as usize;
        let at = self.dice.below(PASSES as u64) as usize;
        match self.dice.below(6) {
            0 => {
                self.note(format!("sealer {which} is killed"));
                self.tally.kills += 1;
                self.sealers[which] = Sealer::new();
            }
            1 => self.merges_stopped = !self.merges_stopped,
            2 => self.mutations_stuck = !self.mutations_stuck,
            3 => {
                // A paused sink wakes up.
                if self.passes[at].raw() > 0 {
                    self.passes[at].doubles += 1;
                }
            }
            4 if self.dice.one_in(4) && self.passes[at].state == PassState::Running => {
                self.note(format!("pass {at} is cancelled"));
                self.tally.cancelled += 1;
                let pass = &mut self.passes[at];
                (pass.state, pass.revision) = (PassState::Cancelled, pass.revision + 1);
            }
            _ => {
                // An operator purges messages of rows.
                if let Some(batch) =
                    self.passes[at].batches.iter_mut().find(|batch| **batch == Batch::InStream)
                {
                    *batch = Batch::Lost;
                }
            }
        }
    }

    /// Workers compute and sinks store, all of it with delays.
    fn rows_move(&mut self) {
        for at in 0..PASSES {
            for batch in 0..self.passes[at].batches.len() {
                if !self.dice.one_in(12) {
                    continue;
                }
                let refuses = self.troubled && self.dice.one_in(10);
                let found = &mut self.passes[at].batches[batch];
                *found = match *found {
                    Batch::Pending => Batch::InWorker,
                    Batch::InWorker => Batch::InStream,
                    Batch::InStream => Batch::InSink,
                    Batch::InSink if refuses => Batch::Refused,
                    Batch::InSink => Batch::Stored,
                    Batch::Refused if !self.troubled => Batch::InSink,
                    other => other,
                };
            }
        }
    }

    fn act(&mut self, which: usize) -> Result<(), String> {
        for at in 0..PASSES {
            self.follow(which, at);
            self.go_on(which, at)?;
            self.start(which, at);
        }
        Ok(())
    }

    /// Follows the watch on the records, with a small delay.
    fn follow(&mut self, which: usize, at: usize) {
        let state = self.passes[at].state;
        let is_over = self.passes[at].is_over();
        if self.dice.one_in(2) {
            return;
        }
        let begin = |now: u64| {
            let (course, next) = Course::begin(state, false);
            Lane { state, course, due: now + next.after.as_secs(), before: 0, under_way: None }
        };
        let now = self.now;
        match &mut self.sealers[which].lanes[at] {
            Some(lane) if lane.under_way.is_some() => {}
            lane @ Some(_) if is_over => *lane = None,
            Some(lane) if lane.state == state => {}
            // A sealer finishes its own seal.
            Some(lane) if state == PassState::Sealed && lane.course.step() == Step::Finish => {
                lane.state = state
            }
            None if is_over => {}
            lane => *lane = Some(begin(now)),
        }
    }

    fn start(&mut self, which: usize, at: usize) {
        let now = self.now;
        let troubled = self.troubled;
        let sealer = &mut self.sealers[which];
        let Some(lane) = &mut sealer.lanes[at] else { return };
        let step = lane.course.step();
        if lane.under_way.is_some() || lane.due > now || step == Step::Rest {
            return;
        }
        let Some(place) = sealer.room.enter(step, at == LARGE) else { return };
        let length = match step {
            Step::Prove if at == LARGE => 1000 + self.dice.below(2600),
            step if step.is_heavy() => 1 + self.dice.below(8),
            _ => self.dice.below(3),
        };
        let is_lost = troubled && self.dice.one_in(8);
        let acts = (!is_lost || self.dice.one_in(2)).then(|| now + self.dice.below(length + 1));
        self.tally.lost_answers += u64::from(is_lost);
        lane.under_way = Some(UnderWay {
            step,
            place,
            ends: now + length,
            acts,
            seen: if is_lost { Seen::Failed } else { Seen::Gone },
        });
    }

    /// A step takes effect, and then its answer arrives unless it is lost.
    fn go_on(&mut self, which: usize, at: usize) -> Result<(), String> {
        let now = self.now;
        let Some(lane) = &mut self.sealers[which].lanes[at] else { return Ok(()) };
        let Some(mut under_way) = lane.under_way.take() else { return Ok(()) };
        let is_lost = under_way.seen == Seen::Failed;
        if under_way.acts.is_some_and(|acts| acts <= now) {
            under_way.acts = None;
            let mut before = lane.before;
            let seen = self.have_effect(at, under_way.step, &mut before)?;
            if let Some(lane) = &mut self.sealers[which].lanes[at] {
                lane.before = before;
            }
            under_way.seen = if is_lost { Seen::Failed } else { seen };
        }
        let seen = under_way.seen;
        if under_way.ends > now {
            if let Some(lane) = &mut self.sealers[which].lanes[at] {
                lane.under_way = Some(under_way);
            }
            return Ok(());
        }
        self.note(format!("sealer {which}: {:?} of pass {at} came to {seen:?}", under_way.step));
        self.tally.beaten += u64::from(seen == Seen::Beaten);
        self.tally.merges_in_vain += u64::from(seen == Seen::NotMerged);
        self.tally.repairs += u64::from(seen == Seen::Repaired);
        let sealer = &mut self.sealers[which];
        sealer.room.leave(under_way.place);
        if let Some(lane) = &mut sealer.lanes[at] {
            self.tally.finished_for_others +=
                u64::from(seen == Seen::Finished && under_way.step == Step::Finish && lane.before == 0);
            lane.due = now + lane.course.next(seen).after.max(Duration::from_millis(1)).as_secs();
        }
        Ok(())
    }

    fn have_effect(&mut self, at: usize, step: Step, before: &mut u64) -> Result<Seen, String> {
        let merges_stopped = self.merges_stopped;
        let mutations_stuck = self.mutations_stuck;
        let pass = &mut self.passes[at];
        let is_open = pass.state == PassState::Running;
        Ok(match step {
            Step::Read if !is_open => Seen::Gone,
            Step::Read => {
                *before = pass.revision;
                Seen::Published
            }
            Step::Ask if pass.has(&[Batch::Pending]) => Seen::Computing,
            Step::Ask if pass.has(&[Batch::InStream]) => Seen::Undrawn,
            Step::Ask if pass.has(&[Batch::InWorker]) => Seen::InWorkers,
            Step::Ask if pass.has(&[Batch::InSink, Batch::Refused]) => Seen::InSinks,
            Step::Ask => Seen::Landed,
            Step::Count if pass.raw() >= pass.batches.len() => Seen::Enough,
            Step::Count => Seen::Lacking,
            Step::Landing if pass.has(&[Batch::Refused]) => Seen::Refused,
            Step::Landing if pass.has(&[Batch::InSink, Batch::InStream]) => Seen::InSinks,
            Step::Landing => Seen::Landed,
            Step::Turn if self.dice.one_in(2) => Seen::OthersTurn,
            Step::Turn => Seen::OurTurn,
            Step::TakeOver => Seen::TakenOver,
            Step::Prove if pass.doubles == 0 && pass.has(&[Batch::InStream, Batch::InSink]) => {
                return Err(format!("pass {at} is proven while sinks have rows of it to store"));
            }
            Step::Prove if !pass.is_complete() => Seen::Incomplete,
            Step::Prove if pass.doubles > 0 => Seen::Duplicates,
            Step::Prove => Seen::Clean,
            Step::Merge if merges_stopped => Seen::NotMerged,
            Step::Merge => {
                pass.doubles = 0;
                Seen::Merged
            }
            Step::Repair
                if !is_open
                    || !pass.has(&[Batch::Lost])
                    || pass.has(&[Batch::Pending, Batch::InWorker, Batch::InStream, Batch::InSink]) =>
            {
                Seen::NotRepaired
            }
            Step::Repair => {
                pass.revision += 1;
                pass.batches
                    .iter_mut()
                    .filter(|batch| **batch == Batch::Lost)
                    .for_each(|batch| *batch = Batch::Pending);
                Seen::Repaired
            }
            Step::Show if pass.revision != *before => Seen::Beaten,
            Step::Show => {
                pass.shown = true;
                Seen::Shown
            }
            Step::Mark if pass.revision != *before => {
                if pass.state == PassState::Cancelled {
                    pass.shown = false;
                }
                Seen::Beaten
            }
            Step::Mark if !pass.is_complete() => return Err(format!("pass {at} is sealed and not complete")),
            Step::Mark => {
                (pass.state, pass.revision) = (PassState::Sealed, pass.revision + 1);
                Seen::Marked
            }
            Step::Finish if pass.state != PassState::Sealed || pass.freed => Seen::Gone,
            Step::Finish => {
                pass.announced += 1;
                // The sealer is killed, or gets no answer, in the middle of the step.
                if self.troubled && self.dice.one_in(3) {
                    return Ok(Seen::Failed);
                }
                (pass.consumer, pass.freed, pass.revision) = (false, true, pass.revision + 1);
                pass.batches.iter_mut().for_each(|batch| *batch = Batch::Stored);
                Seen::Finished
            }
            Step::Free if pass.state != PassState::Cancelled => Seen::Gone,
            // The row that a sealer was about to show cannot be removed.
            Step::Free if mutations_stuck => Seen::Failed,
            Step::Free => {
                (pass.shown, pass.consumer, pass.freed) = (false, false, true);
                pass.revision += 1;
                Seen::Finished
            }
            Step::Rest => Seen::Finished,
        })
    }
}

impl Sealer {
    fn new() -> Self {
        Self { lanes: (0..PASSES).map(|_| None).collect(), room: Room::default() }
    }
}
