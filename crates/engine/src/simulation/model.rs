//! A model of a broker and a store that do whatever real ones may do, in an order drawn from a seed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use std::sync::Arc;

use bytes::Bytes;
use millstream::envelope::{Rows, decode_rows};
use millstream::names::PassId;
use millstream::schema::Schema;
use serde::Serialize;

use crate::compute::block::read;
use crate::compute::{BatchKey, Computed, Maker};
use crate::error::Class;
use crate::model::rows::Portion;
use crate::sink::step::Seen;
use crate::work::rows_message::Encoded;

/// The number of ids of each batch.
pub const BATCHES: [u32; 4] = [1, 9, 14, 5];
/// The longest run time of an insert, in seconds: `max_execution_time`.
const INSERT_FOR: u64 = 60;
/// Small enough that the rows of most batches need several messages, and some row needs one by itself.
const MAX_PAYLOAD: usize = (4 << 10) + 1500;
const LARGEST_ROW: u64 = 1150;

/// A random number generator: xorshift64*, seeded by splitmix64.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self((mixed ^ (mixed >> 29)) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 32) % end
    }

    pub fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    pub fn publish_fate(&mut self) -> Fate {
        match self.below(6) {
            0 => Fate::NeverArrived,
            1 => Fate::AnswerLost,
            _ => Fate::Done,
        }
    }

    fn pick<T>(&mut self, mut from: Vec<T>) -> Option<T> {
        let count = from.len() as u64;
        (count > 0).then(|| from.swap_remove(self.below(count) as usize))
    }
}

/// What became of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Done,
    NeverArrived,
    AnswerLost,
}

/// Some ids of a batch by position, as a subject of the rows stream names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub batch: u32,
    pub ids: Range<u32>,
}

impl Place {
    fn key(&self) -> (u32, u32, u32) {
        (self.batch, self.ids.start, self.ids.end)
    }

    fn of((batch, start, end): (u32, u32, u32)) -> Self {
        Self { batch, ids: start..end }
    }
}

fn id_at(batch: u32, place: u32) -> u64 {
    u64::from(batch) * 100 + u64::from(place)
}

#[derive(Serialize)]
struct Noise {
    noise: String,
}

/// Some ids of a batch as one worker computed them. Each worker puts its own build into its rows, so no two
/// workers return the same.
pub fn encoded(batch: u32, ids: &[Range<u32>], dice: &mut Dice) -> Encoded<u64> {
    let key = BatchKey {
        pass: PassId { run: "r".parse().expect("legal"), pass: 1 },
        batch,
        ids: BATCHES[batch as usize],
    };
    let by = dice.next();
    let schema = Arc::new(Schema::parse(&[("noise", "String")]).expect("sound"));
    let (first, later): (Vec<u32>, Vec<u32>) = ids.iter().cloned().flatten().partition(|_| !dice.one_in(4));
    let mut computed = Computed::none(&schema);
    for place in first.into_iter().chain(later) {
        let length = dice.below(LARGEST_ROW);
        let noise = (0..length).map(|_| char::from(b'0' + (dice.next() >> 57) as u8 % 75)).collect();
        computed.ids.push(id_at(batch, place));
        computed.rows.ok(&schema, &Noise { noise });
    }
    let maker = Arc::new(Maker { host: "h".into(), build: by.to_string() });
    let all: Vec<u64> = (0..key.ids).map(|place| id_at(batch, place)).collect();
    Encoded::some(&key, &all, computed, schema, maker, MAX_PAYLOAD)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free { from: u64 },
    Held { delivery: u64, until: u64 },
    Acked,
}

/// A message with the broker's state of it.
pub struct Message {
    pub bytes: Bytes,
    state: State,
    deliveries: u64,
}

impl Message {
    fn new(bytes: Bytes, number: u64) -> Self {
        // Deliveries of different messages under one subject must differ.
        Self { bytes, state: State::Free { from: 0 }, deliveries: number << 32 }
    }

    fn is_due(&self, now: u64) -> bool {
        match self.state {
            State::Free { from } => from <= now,
            State::Held { until, .. } => until < now,
            State::Acked => false,
        }
    }

    fn deliver(&mut self, until: u64) -> u64 {
        self.deliveries += 1;
        self.state = State::Held { delivery: self.deliveries, until };
        self.deliveries
    }

    pub fn keep(&mut self, until: u64) {
        if let State::Held { delivery, .. } = self.state {
            self.state = State::Held { delivery, until };
        }
    }

    pub fn ack(&mut self) {
        self.state = State::Acked;
    }
}

/// Both streams with their consumers.
pub struct Stream {
    pub ids: Vec<Message>,
    rows: BTreeMap<(u32, u32, u32), Message>,
    stored: u64,
}

/// Rows that a sink holds.
#[derive(Debug, Clone)]
pub struct Arrived {
    pub place: Place,
    pub delivery: u64,
    pub portion: Portion,
    /// Each id with the worker that computed its row.
    pub rows: Vec<(u64, u64)>,
}

impl Stream {
    pub fn new() -> Self {
        let ids = BATCHES.iter().map(|_| Message::new(Bytes::new(), 0)).collect();
        Self { ids, rows: BTreeMap::new(), stored: 0 }
    }

    pub fn is_acked(&self) -> bool {
        self.ids.iter().chain(self.rows.values()).all(|message| message.state == State::Acked)
    }

    /// A batch that is due, and whether it was delivered before.
    pub fn take_ids(&mut self, now: u64, ack_wait: u64, dice: &mut Dice) -> Option<(u32, bool)> {
        let due = (0..self.ids.len()).filter(|batch| self.ids[*batch].is_due(now)).collect();
        let batch = dice.pick(due)?;
        let delivery = self.ids[batch].deliver(now + ack_wait);
        Some((batch as u32, delivery > 1))
    }

    pub fn rows(&self, place: &Place) -> Option<&Bytes> {
        self.rows.get(&place.key()).map(|message| &message.bytes)
    }

    pub fn put_rows(&mut self, place: &Place, bytes: Bytes) {
        self.stored += 1;
        let replaced = self.rows.insert(place.key(), Message::new(bytes, self.stored));
        assert!(replaced.is_none(), "the first writer wins");
    }

    /// A message that is due, with its delivery, and whether it was delivered before.
    pub fn take_rows(&mut self, now: u64, ack_wait: u64, dice: &mut Dice) -> Option<(Place, u64, bool)> {
        let due = self.rows.iter().filter(|(_, message)| message.is_due(now)).map(|(key, _)| *key).collect();
        let key = dice.pick(due)?;
        let delivery = self.rows.get_mut(&key)?.deliver(now + ack_wait);
        Some((Place::of(key), delivery, delivery & 0xffff_ffff > 1))
    }

    /// The rows of a message; `None` for a manifest.
    pub fn read_rows(&self, place: Place, delivery: u64) -> Option<Arrived> {
        let Rows::Batch(message) = decode_rows(self.rows(&place)?).expect("our own message") else {
            return None;
        };
        let portion = if message.is_whole() {
            Portion::all(message.batch, message.batch_ids)
        } else {
            Portion::between(message.batch, message.batch_ids, message.first, message.last)
        };
        let rows = read_back(&place, message.rows);
        Some(Arrived { place, delivery, portion, rows })
    }

    fn held_as(&mut self, place: &Place, delivery: u64) -> Option<&mut Message> {
        let is_ours = |message: &&mut Message| matches!(message.state, State::Held { delivery: held, .. } if held == delivery);
        self.rows.get_mut(&place.key()).filter(is_ours)
    }

    pub fn is_held(&mut self, item: &Arrived) -> bool {
        self.held_as(&item.place, item.delivery).is_some()
    }

    pub fn keep_rows(&mut self, item: &Arrived, until: u64) {
        if let Some(message) = self.held_as(&item.place, item.delivery) {
            message.keep(until);
        }
    }

    /// An ack counts for its message even if another sink holds it by now, but not for a later message under
    /// the same subject.
    pub fn ack_rows(&mut self, place: &Place, delivery: u64) {
        if let Some(message) =
            self.rows.get_mut(&place.key()).filter(|m| m.deliveries >> 32 == delivery >> 32)
        {
            message.ack();
        }
    }

    /// Naks a message. Returns whether this sink held it; if not, the sink that holds it loses it.
    pub fn hand_back(&mut self, item: &Arrived, from: u64) -> bool {
        let ours = self.is_held(item);
        if let Some(message) = self.rows.get_mut(&item.place.key())
            && message.state != State::Acked
        {
            message.state = State::Free { from };
        }
        ours
    }

    /// Redelivers a message whose ack was lost, or one that is held. Returns whether it was held.
    pub fn deliver_again(&mut self, dice: &mut Dice) -> Option<(Place, bool)> {
        let delivered = self.rows.iter().filter(|(_, message)| !matches!(message.state, State::Free { .. }));
        let key = dice.pick(delivered.map(|(key, _)| *key).collect())?;
        let message = self.rows.get_mut(&key)?;
        let held = matches!(message.state, State::Held { .. });
        message.state = State::Free { from: 0 };
        Some((Place::of(key), held))
    }

    pub fn remove_rows(&mut self) {
        self.rows.clear();
    }
}

/// Each id with the worker that computed its row.
fn read_back(place: &Place, frames: &[u8]) -> Vec<(u64, u64)> {
    let (rows, columns) = read::block(frames);
    let row = |row| {
        assert_eq!(columns["batch"].number(row), u128::from(place.batch));
        (columns["id"].number(row) as u64, columns["build"].text(row).parse().expect("a signature"))
    };
    (0..rows).map(row).collect()
}

/// A running insert.
#[derive(Debug)]
struct Query {
    id: u64,
    rows: Vec<(u32, u64, u64)>,
    commits_at: Option<u64>,
    until: u64,
}

/// ClickHouse: rows as the parts hold them.
#[derive(Debug, Default)]
pub struct Store {
    raw: BTreeMap<(u32, u64), Vec<u64>>,
    queries: Vec<Query>,
    next_query: u64,
    doubles_allowed: BTreeSet<(u32, u64)>,
}

impl Store {
    pub fn ask(&self, item: &Arrived) -> u64 {
        let Portion { batch, ids, .. } = &item.portion;
        let number = |text: &String| text.parse::<u64>().expect("a number");
        let between = ids.as_ref().map_or((0, u64::MAX), |(first, last)| (number(first), number(last)));
        self.raw.range((*batch, between.0)..=(*batch, between.1)).count() as u64
    }

    pub fn holds(&self, item: &Arrived) -> bool {
        item.rows.iter().all(|(id, _)| self.raw.contains_key(&(item.place.batch, *id)))
    }

    pub fn is_complete(&self) -> bool {
        let ids = |batch: u32| (0..BATCHES[batch as usize]).map(move |place| (batch, id_at(batch, place)));
        (0..BATCHES.len() as u32).flat_map(ids).all(|id| self.raw.contains_key(&id))
    }

    pub fn is_idle(&self) -> bool {
        self.queries.is_empty()
    }

    pub fn may_double(&mut self, place: &Place) {
        let Place { batch, ids } = place;
        self.doubles_allowed.extend(ids.clone().map(|place| (*batch, id_at(*batch, place))));
    }

    /// The number of ids that are stored more than once.
    ///
    /// # Errors
    /// Names an id with rows of two workers, or with a second row that nothing explains.
    pub fn check_rows(&self) -> Result<u64, String> {
        let doubled: Vec<_> = self.raw.iter().filter(|(_, by)| by.len() > 1).collect();
        for (id, by) in &doubled {
            if by.iter().any(|other| *other != by[0]) {
                return Err(format!("id {id:?} has rows of two workers"));
            }
            if !self.doubles_allowed.contains(id) {
                return Err(format!("id {id:?} is stored {} times", by.len()));
            }
        }
        Ok(doubled.len() as u64)
    }

    /// Runs an insert with any outcome and any answer. Returns its number too.
    pub fn insert(&mut self, items: &[Arrived], now: u64, dice: &mut Dice) -> (u64, Seen) {
        let unclear = Seen::Failed(Class::Unclear);
        let some = dice.below(items.len() as u64 + 1) as usize;
        let late = now + dice.below(INSERT_FOR);
        let said = if dice.one_in(2) { Seen::Accepted } else { unclear };
        match dice.below(10) {
            0..=2 => (self.start(items, Some(now), now), Seen::Accepted),
            3 => (self.start(items, Some(now), now), unclear),
            4 => (self.start(items, Some(late), now), unclear),
            5 => (self.start(items, None, now), unclear),
            6 => (self.start(&[], None, now), said),
            7 => (self.start(&items[..some], Some(now), now), said),
            8 => {
                let class = if dice.one_in(2) { Class::Reject } else { Class::Retry };
                (self.start(&[], None, now), Seen::Failed(class))
            }
            _ => {
                let torn = self.torn(&items[0]);
                (self.start(&torn, Some(now), now), said)
            }
        }
    }

    /// The first half of a batch's rows, which are stored twice when the batch is inserted again.
    fn torn(&mut self, item: &Arrived) -> [Arrived; 1] {
        self.may_double(&item.place);
        let mut torn = item.clone();
        torn.rows.truncate(item.rows.len() / 2);
        [torn]
    }

    pub fn insert_well(&mut self, items: &[Arrived], now: u64) -> (u64, Seen) {
        (self.start(items, Some(now), now), Seen::Accepted)
    }

    fn start(&mut self, items: &[Arrived], commits_at: Option<u64>, now: u64) -> u64 {
        self.next_query += 1;
        let of = |item: &Arrived| {
            let batch = item.place.batch;
            item.rows.clone().into_iter().map(move |(id, by)| (batch, id, by))
        };
        let rows = items.iter().flat_map(of).collect();
        self.queries.push(Query { id: self.next_query, rows, commits_at, until: now + INSERT_FOR });
        self.pass_time(now);
        self.next_query
    }

    /// Commits what is due by now, and ends inserts that have exceeded their run time.
    pub fn pass_time(&mut self, now: u64) {
        for query in self.queries.extract_if(.., |query| query.commits_at.is_some_and(|at| at <= now)) {
            for (batch, id, by) in query.rows {
                self.raw.entry((batch, id)).or_default().push(by);
            }
        }
        self.queries.retain(|query| query.commits_at.is_some() || query.until > now);
    }

    /// `KILL QUERY … SYNC`: the insert has ended, committed or not.
    pub fn end(&mut self, query: u64, now: u64, dice: &mut Dice) {
        let commits = dice.one_in(2);
        for query in self.queries.iter_mut().filter(|found| found.id == query) {
            query.commits_at = query.commits_at.filter(|_| commits).map(|_| now);
            query.until = now;
        }
        self.pass_time(now);
    }
}
