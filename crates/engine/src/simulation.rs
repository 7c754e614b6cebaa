//! Tests the decisions of workers and sinks on a model of the worst broker and the worst store.
//!
//! The decisions are made by the real code: [`Step::next`], [`is_landed`], [`Encoded`], [`Course`] and
//! [`Known`]. Everything else is a model that does whatever a server or a process may do, in an order drawn
//! from a seed. Acks and publishes lose their answers. Messages are redelivered while they are held. Inserts
//! commit late, in part, or never, whatever was answered. Processes die, or are paused and wake, at any moment.
//! A seal removes the rows from the stream.
//!
//! A failing seed is printed with its diary; `MILLSTREAM_SEED=<number>` runs that seed alone.

mod model;
mod seal;
mod tally;

use std::ops::Range;
use std::sync::Arc;

use crate::error::Class;
use crate::sink::step::{Seen, Step, is_landed};
use crate::work::rows_message::{Course, EARLY_PARTS, Encoded, Known, Next};
pub(crate) use model::Dice;
use model::{Arrived, BATCHES, Fate, Place, Store, Stream, encoded};
use tally::Tally;

const SEEDS: u64 = 5000;
const SINKS: usize = 3;
const WORKERS: usize = 3;
/// Steps in which anything may go wrong, and steps after them in which the model must come to rest.
const TROUBLED: u64 = 300;
const CALM: u64 = 6000;
/// Seconds without a progress report after which a message is redelivered.
const ACK_WAIT: u64 = 105;
/// Seconds after which a process knows that it was paused.
const PAUSED: u64 = 40;
/// Redelivery delay in seconds of rows whose insert may still be running.
const INSERT_OVER: u64 = 90;
/// Redelivery delay in seconds of refused rows.
const SET_BACK: u64 = 60;

#[test]
fn nothing_is_lost_and_nothing_is_doubled_on_the_worst_servers() {
    let mut tally = Tally::default();
    let were_all = with_seeds(SEEDS, |seed| {
        let mut world = World::new(seed);
        let fault = world.run().err();
        if let Some(fault) = fault {
            panic!("MILLSTREAM_SEED={seed}\n{}\n{fault}", world.diary.join("\n"));
        }
        tally.add(world.tally);
    });
    assert!(!were_all || tally.each_is_more_than(SEEDS / 50), "{tally:?}");
}

/// Calls `each` with the first `seeds` seeds, or only with that of `MILLSTREAM_SEED`. Returns whether it was
/// all of them.
fn with_seeds(seeds: u64, each: impl FnMut(u64)) -> bool {
    let given = std::env::var("MILLSTREAM_SEED").ok().map(|seed| seed.parse().expect("a number"));
    given.map_or(0..seeds, |seed: u64| seed..seed + 1).for_each(each);
    given.is_none()
}

/// A process with its current work.
struct Process<W> {
    asleep_until: u64,
    woke_at: u64,
    slept_at: u64,
    work: W,
}

impl<W: Default> Process<W> {
    fn start() -> Self {
        Self { asleep_until: 0, woke_at: 0, slept_at: 0, work: W::default() }
    }
}

/// The work of a worker: at most one batch.
#[derive(Default)]
struct Batch(Option<(u32, Arc<Encoded<u64>>, Course)>);

/// The work of a sink: groups of rows that it lands one after the other, the last one first.
#[derive(Default)]
struct Groups {
    landing: Vec<Group>,
    given_up: bool,
}

struct Group {
    step: Step,
    items: Vec<Arrived>,
    /// The number of the last insert.
    query: u64,
    /// When this step was decided.
    since: u64,
    /// The request that was sent and not answered yet.
    sent: Option<Sent>,
}

enum Sent {
    /// The store's answer, and the time when the store read it.
    Question(Option<Vec<u64>>, u64),
    Insert(Seen),
}

struct World {
    dice: Dice,
    now: u64,
    troubled: bool,
    stream: Stream,
    store: Store,
    workers: Vec<Process<Batch>>,
    sinks: Vec<Process<Groups>>,
    sealed: bool,
    tally: Tally,
    diary: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            dice: Dice::new(seed),
            now: 1000,
            troubled: true,
            stream: Stream::new(),
            store: Store::default(),
            workers: (0..WORKERS).map(|_| Process::start()).collect(),
            sinks: (0..SINKS).map(|_| Process::start()).collect(),
            sealed: false,
            tally: Tally::default(),
            diary: Vec::new(),
        }
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let line = format!("{:>6} {}", self.now, text());
        self.diary.push(line);
    }

    fn run(&mut self) -> Result<(), String> {
        for step in 0..TROUBLED + CALM {
            self.troubled = step < TROUBLED;
            if !self.troubled && self.is_at_rest() {
                return self.check();
            }
            self.now += self.dice.below(4);
            self.store.pass_time(self.now);
            self.report_progress();
            self.inject_faults();
            match self.dice.below(2) {
                0 => self.act_as_worker(),
                _ => self.act_as_sink()?,
            }
            if self.store.is_complete() && !self.sealed && self.dice.one_in(20) {
                self.note(|| "sealed: rows are removed from the stream".into());
                self.sealed = true;
                self.stream.remove_rows();
            }
        }
        Err("no rest in the end".into())
    }

    fn is_at_rest(&self) -> bool {
        self.stream.is_acked()
            && self.store.is_idle()
            && self.sinks.iter().all(|sink| sink.work.landing.is_empty())
            && self.workers.iter().all(|worker| worker.work.0.is_none())
    }

    fn check(&mut self) -> Result<(), String> {
        if !self.store.is_complete() {
            return Err(format!("everything is acked, and not everything is stored: {:?}", self.store));
        }
        self.tally.doubled = self.store.check_rows()?;
        Ok(())
    }

    /// Running processes report progress for what they hold.
    fn report_progress(&mut self) {
        for worker in self.workers.iter().filter(|worker| worker.asleep_until <= self.now) {
            if let Some((batch, ..)) = &worker.work.0 {
                self.stream.ids[*batch as usize].keep(self.now + ACK_WAIT);
            }
        }
        for sink in self.sinks.iter().filter(|sink| sink.asleep_until <= self.now) {
            for item in sink.work.landing.iter().flat_map(|group| &group.items) {
                self.stream.keep_rows(item, self.now + ACK_WAIT);
            }
        }
    }

    /// At any moment a process may die or be paused, and a message may be redelivered.
    fn inject_faults(&mut self) {
        if !self.troubled || !self.dice.one_in(8) {
            return;
        }
        let which = self.dice.below(3) as usize;
        let pause = self.now + 1 + self.dice.below(300);
        match self.dice.below(6) {
            0 => {
                self.note(|| format!("worker {which} dies"));
                self.tally.deaths += 1;
                self.workers[which] = Process::start();
            }
            1 => {
                self.note(|| format!("sink {which} dies"));
                self.tally.deaths += 1;
                self.sinks[which] = Process::start();
            }
            2 => pause_until(&mut self.workers[which], self.now, pause),
            3 => {
                self.note(|| format!("sink {which} sleeps until {pause}"));
                self.tally.pauses += 1;
                pause_until(&mut self.sinks[which], self.now, pause);
            }
            4 => {
                self.note(|| format!("sink {which} is told to give up"));
                self.sinks[which].work.given_up = true;
            }
            // The broker lost an ack, or redelivered a held message: two sinks may now insert it at once and
            // cannot detect it.
            _ => {
                let Some((place, held)) = self.stream.deliver_again(&mut self.dice) else { return };
                if held {
                    self.store.may_double(&place);
                }
                self.note(|| format!("{place:?} is delivered again, held: {held}"));
            }
        }
    }

    fn act_as_worker(&mut self) {
        let which = self.dice.below(WORKERS as u64) as usize;
        if self.workers[which].asleep_until > self.now {
            return;
        }
        match self.workers[which].work.0.take() {
            None => self.take_ids(which),
            Some((batch, rows, course)) => self.publish(which, batch, rows, course),
        }
    }

    fn take_ids(&mut self, which: usize) {
        let Some((batch, again)) = self.stream.take_ids(self.now, ACK_WAIT, &mut self.dice) else { return };
        let open = if again { self.look(batch) } else { Known::nothing(BATCHES[batch as usize]).open };
        let rows = Arc::new(encoded(batch, &open, &mut self.dice));
        self.note(|| format!("worker {which} computed {open:?} of batch {batch}"));
        self.workers[which].work.0 = Some((batch, rows, Course::new(open, EARLY_PARTS)));
    }

    /// The ids of a redelivered batch that no message has, as [`crate::work::rows_message`] finds them.
    fn look(&mut self, batch: u32) -> Vec<Range<u32>> {
        let mut known = Known::default();
        let mut left = Known::nothing(BATCHES[batch as usize]).open;
        while let Some(ids) = left.pop() {
            let found = self.stream.rows(&Place { batch, ids: ids.clone() }).cloned();
            self.tally.looks += u64::from(found.is_some());
            left.extend(known.note(ids, "", found).expect("our own messages"));
        }
        known.open
    }

    /// Publishes one message, as [`crate::work::rows_message`] does.
    fn publish(&mut self, which: usize, batch: u32, rows: Arc<Encoded<u64>>, mut course: Course) {
        let (ids, message) = match course.next(&rows) {
            Some(Next::Rows(ids)) => (ids.clone(), rows.message(&ids)),
            Some(Next::Cut(ids, message)) => (ids, message),
            None => {
                // Otherwise the ack is lost, and the batch is redelivered.
                if !self.troubled || !self.dice.one_in(4) {
                    self.stream.ids[batch as usize].ack();
                }
                return;
            }
        };
        let place = Place { batch, ids };
        let fate = if self.troubled { self.dice.publish_fate() } else { Fate::Done };
        let taken = self.stream.rows(&place).cloned();
        let first = taken.is_none();
        if first && fate != Fate::NeverArrived {
            self.tally.late_rows += u64::from(self.sealed);
            self.stream.put_rows(&place, message.bytes);
        }
        let parts = match (fate, taken) {
            // Without an answer the message is published again.
            (Fate::NeverArrived | Fate::AnswerLost, _) => vec![place.ids.clone()],
            (Fate::Done, None) => message.parts,
            (Fate::Done, Some(found)) => {
                let parts = Known::default().note(place.ids.clone(), "", Some(found));
                let parts = parts.expect("our own messages");
                self.tally.cuts_followed += u64::from(!parts.is_empty());
                parts
            }
        };
        self.note(|| format!("worker {which}: {place:?} stored, as the first: {first}, next: {parts:?}"));
        course.follow(parts);
        self.workers[which].work.0 = Some((batch, rows, course));
    }

    fn act_as_sink(&mut self) -> Result<(), String> {
        let which = self.dice.below(SINKS as u64) as usize;
        if self.sinks[which].asleep_until > self.now {
            return Ok(());
        }
        match self.sinks[which].work.landing.pop() {
            Some(group) => self.land(which, group),
            None => {
                self.take_rows(which);
                Ok(())
            }
        }
    }

    fn take_rows(&mut self, which: usize) {
        let most = 1 + self.dice.below(4);
        let mut items = Vec::new();
        for _ in 0..most {
            let Some((place, delivery, again)) = self.stream.take_rows(self.now, ACK_WAIT, &mut self.dice)
            else {
                break;
            };
            self.tally.redeliveries += u64::from(again);
            match self.stream.read_rows(place.clone(), delivery) {
                Some(item) => items.push(item),
                None => self.ack_rows(&place, delivery),
            }
        }
        self.sinks[which].work.given_up = false;
        if !items.is_empty() {
            let places: Vec<&Place> = items.iter().map(|item| &item.place).collect();
            let line = format!("sink {which} takes {places:?}");
            self.note(|| line);
            let group = Group { step: Step::Ask, items, query: 0, since: self.now, sent: None };
            self.sinks[which].work.landing.push(group);
        }
    }

    fn ack_rows(&mut self, place: &Place, delivery: u64) {
        if !self.troubled || !self.dice.one_in(4) {
            self.stream.ack_rows(place, delivery);
        }
    }

    /// One step of [`crate::sink`]'s landing, or half a step, because each server answers later.
    fn land(&mut self, which: usize, mut group: Group) -> Result<(), String> {
        let given_up = self.sinks[which].work.given_up;
        let seen = match (group.step, group.sent.take()) {
            (Step::Ask | Step::Confirm, _) if given_up => Some(Seen::GivenUp),
            (Step::End | Step::Wait, _) if given_up => Some(Seen::GivenUp),
            (Step::Ask | Step::Confirm, Some(Sent::Question(answer, asked_at))) => {
                Some(self.settle(which, &mut group, answer, asked_at)?)
            }
            (Step::Ask | Step::Confirm, _) => {
                group.sent = Some(self.ask(&group));
                None
            }
            (Step::Insert, Some(Sent::Insert(seen))) => Some(seen),
            (Step::Insert, _) => {
                let (query, seen) = self.insert(which, &group);
                (group.query, group.sent) = (query, Some(Sent::Insert(seen)));
                None
            }
            // A kill without an answer is sent again.
            (Step::End, _) => (!self.troubled || !self.dice.one_in(3)).then(|| {
                self.store.end(group.query, self.now, &mut self.dice);
                Seen::Ended
            }),
            (Step::Wait, _) => Some(Seen::Waited),
            (Step::Apart, _) => {
                self.apart(which, group);
                return Ok(());
            }
            (Step::HandBack, _) => {
                self.hand_back(group, 0);
                return Ok(());
            }
            (Step::SetBack, _) => {
                self.hand_back(group, INSERT_OVER);
                return Ok(());
            }
            (Step::Done, _) => return Ok(()),
        };
        if let Some(seen) = seen {
            self.note(|| format!("sink {which}: {:?} came to {seen:?}", group.step));
            (group.step, group.since) = (group.step.next(seen), self.now);
        }
        self.sinks[which].work.landing.push(group);
        Ok(())
    }

    fn ask(&mut self, group: &Group) -> Sent {
        // The sink is awake again, and another sink holds its rows too: both may learn that they are missing,
        // and insert them.
        if group.step == Step::Ask {
            self.allow_doubles_of_lost(group);
        }
        let answers = !self.troubled || !self.dice.one_in(4);
        let answer = answers.then(|| group.items.iter().map(|item| self.store.ask(item)).collect());
        Sent::Question(answer, self.now)
    }

    fn allow_doubles_of_lost(&mut self, group: &Group) {
        for item in &group.items {
            if !self.stream.is_held(item) {
                self.store.may_double(&item.place);
            }
        }
    }

    fn settle(
        &mut self,
        which: usize,
        group: &mut Group,
        answer: Option<Vec<u64>>,
        asked_at: u64,
    ) -> Result<Seen, String> {
        let Some(stored) = answer else { return Ok(Seen::NoAnswer) };
        let mut stored = stored.into_iter();
        let (landed, left): (Vec<_>, Vec<_>) = std::mem::take(&mut group.items)
            .into_iter()
            .partition(|item| stored.next().is_some_and(|stored| is_landed(item.rows.len() as u64, stored)));
        group.items = left;
        for item in landed {
            if !self.store.holds(&item) {
                return Err(format!("acked and not stored: {:?}", item.place));
            }
            self.ack_rows(&item.place, item.delivery);
        }
        Ok(match group.items.is_empty() {
            true => Seen::AllStored,
            false if self.sinks[which].woke_at > asked_at => Seen::Overslept,
            false => Seen::Missing,
        })
    }

    fn insert(&mut self, which: usize, group: &Group) -> (u64, Seen) {
        // The one moment at which a pause goes unnoticed: another sink may have inserted since the decision.
        if self.sinks[which].slept_at >= group.since {
            self.allow_doubles_of_lost(group);
        }
        let (query, seen) = if self.troubled {
            self.store.insert(&group.items, self.now, &mut self.dice)
        } else {
            self.store.insert_well(&group.items, self.now)
        };
        self.tally.inserts_unclear += u64::from(seen == Seen::Failed(Class::Unclear));
        let stored = group.items.iter().all(|item| self.store.holds(item));
        self.tally.lies += u64::from(seen == Seen::Accepted && !stored);
        (query, seen)
    }

    fn apart(&mut self, which: usize, group: Group) {
        if group.items.len() == 1 {
            return self.hand_back(group, SET_BACK);
        }
        let now = self.now;
        let alone = |item| Group { step: Step::Ask, items: vec![item], query: 0, since: now, sent: None };
        self.sinks[which].work.landing.extend(group.items.into_iter().map(alone));
    }

    fn hand_back(&mut self, group: Group, delay: u64) {
        for item in group.items {
            if !self.stream.hand_back(&item, self.now + delay) {
                // Another sink held the message by then.
                self.store.may_double(&item.place);
            }
        }
    }
}

fn pause_until<W>(process: &mut Process<W>, now: u64, until: u64) {
    process.slept_at = now;
    process.asleep_until = until;
    if until - now > PAUSED {
        process.woke_at = until;
    }
}
