//! Storing a batch's rows, in one message or in split rows messages. The worker splits them if one message would exceed
//! the server's limit, or if some rows are finished long before the others.
//!
//! The subject of a batch holds either its rows or a manifest, which divides the batch's ids, in order, into ranges.
//! Each range has a subject of its own, which again holds either rows or a manifest. The first worker that writes one
//! of these messages wins. A worker that finds an existing manifest follows it and writes only the missing messages,
//! from its own rows. So each id has its row in one message, even if the function is not deterministic or a worker dies
//! in between. If a worker's rows are too large for a range, or incomplete, the worker divides that range again.

mod course;
mod encoded;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use millstream::Id;
use millstream::schema::Schema;

use crate::compute::{BatchKey, Computed, Maker};
use crate::error::{Error, full_cause};
use crate::failpoint;
use crate::fleet::times::WorkLoad;
use crate::nats::broker::{Broker, Writing, Written};
use crate::retry::{Backoff, patiently};
use crate::stop::Stop;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::TraceContext;

#[cfg(test)]
pub(crate) use course::parts_of;
pub(crate) use course::{Course, EARLY_PARTS, Known, Next};
pub(crate) use encoded::{Encoded, Message};

/// Pauses before reading a subject again that was taken but holds no message.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));
/// Subjects that are read concurrently.
const CONCURRENT_READS: usize = 32;

/// Where and how the rows of a batch are stored.
pub(crate) struct Target {
    pub broker: Broker,
    pub key: BatchKey,
    pub schema: Arc<Schema>,
    pub maker: Arc<Maker>,
    pub load: Arc<WorkLoad>,
    pub metrics: Metrics,
    /// The delivery's place in the batch's trace.
    pub trace: TraceContext,
    pub stop: Stop,
}

/// Outcome of storing some rows.
pub(crate) struct Stored<I> {
    /// Dead letters among the stored rows.
    pub dead: u32,
    /// How long packing took, on a thread beside the compute threads.
    pub packing: Duration,
    /// Rows that are not stored yet: too many of their neighbours are unfinished.
    pub rest: Computed<I>,
}

impl Target {
    /// Reads which messages of the batch are stored.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the worker gives up, [`Error::Message`] when a stored message cannot be read.
    pub async fn look(&self) -> Result<Known, Error> {
        let mut known = Known::default();
        let mut level = Known::nothing(self.key.ids).open;
        while !level.is_empty() {
            let reads = std::mem::take(&mut level).into_iter().map(async |places| {
                let subject = self.subject(&places);
                let ask = || self.broker.rows_message(&subject);
                let found = patiently(&self.key.pass.run, &self.stop, ask).await?;
                Ok::<_, Error>((places, subject, found))
            });
            let found: Vec<_> = stream::iter(reads).buffered(CONCURRENT_READS).try_collect().await?;
            for (places, subject, found) in found {
                let parts = known.note(places, &subject, found);
                let parts = parts.map_err(|source| Error::Message { subject, source })?;
                level.extend(parts);
            }
        }
        known.open.sort_unstable_by_key(|places| places.start);
        Ok(known)
    }

    /// Writes lost manifests again. The sealer may remove them to make room in the stream while a batch is unfinished.
    /// The next worker needs them to see that some rows are stored.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the worker gives up.
    pub async fn keep_cuts(&self, known: &Known) -> Result<(), Error> {
        for (subject, bytes) in &known.cuts {
            self.broker.write_once(subject, bytes.clone(), self.writing()).await?;
        }
        Ok(())
    }

    fn writing(&self) -> Writing<'_> {
        Writing { trace: Some(self.trace), metrics: &self.metrics, stop: &self.stop }
    }

    /// Stores rows: all of them, or those that no worker stored before. If some ids of a range are unfinished, a
    /// manifest separates them.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the worker gives up, [`Error::Message`] when another worker's message cannot be read.
    pub async fn store<I: Id>(&self, rows: Encoded<I>, known: &mut Known) -> Result<Stored<I>, Error> {
        let mut stored = Stored { dead: 0, packing: Duration::ZERO, rest: Computed::none(&self.schema) };
        let rows = Arc::new(rows);
        let mut course = Course::new(std::mem::take(&mut known.open), EARLY_PARTS);
        while let Some(next) = course.next(&rows) {
            let (places, message) = match next {
                Next::Rows(places) => {
                    let message = self.pack(&rows, &places, &mut stored).await;
                    (places, message)
                }
                Next::Cut(places, message) => (places, message),
            };
            stored.dead += u32::from(message.too_large);
            let _publishing = self.load.publishing();
            course.follow(self.write(&places, message, known).await?);
        }
        known.open = course.open();
        stored.rest = rows.rest(&known.open);
        stored.dead += (rows.dead() - stored.rest.rows.dead.len()) as u32;
        Ok(stored)
    }

    /// The message with the rows of these ids.
    async fn pack<I: Id>(
        &self,
        rows: &Arc<Encoded<I>>,
        places: &Range<u32>,
        stored: &mut Stored<I>,
    ) -> Message {
        let under_way = self.load.packing();
        let packer = rows.clone();
        let wanted = places.clone();
        // Compressing megabytes takes too long for a thread that does I/O.
        let packed = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            (packer.message(&wanted), begun.elapsed())
        });
        let (message, took) = packed.await.expect("packing does not panic");
        drop(under_way);
        self.load.packed(took);
        stored.packing += took;
        message
    }

    /// The subject of the rows of these ids.
    fn subject(&self, places: &Range<u32>) -> String {
        let names = self.broker.names();
        let BatchKey { pass, batch, .. } = &self.key;
        if *places == (0..self.key.ids) {
            names.rows_subject(pass, *batch)
        } else {
            names.part_subject(pass, *batch, places)
        }
    }

    /// Stores a message unless its subject holds one; returns the ranges of the manifest that is stored there.
    async fn write(
        &self,
        places: &Range<u32>,
        message: Message,
        known: &mut Known,
    ) -> Result<Vec<Range<u32>>, Error> {
        let subject = self.subject(places);
        let whole = *places == (0..self.key.ids);
        let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            if self.broker.write_once(&subject, message.bytes.clone(), self.writing()).await?
                == Written::First
            {
                failpoint::pass(match (whole, message.parts.is_empty()) {
                    (true, true) => "work-after-rows",
                    (false, true) => "work-after-part",
                    (_, false) => "work-after-cut",
                });
                if !message.parts.is_empty() {
                    known.cuts.push((subject, message.bytes));
                }
                return Ok(message.parts);
            }
            match self.broker.rows_message(&subject).await {
                Ok(Some(found)) => {
                    tracing::debug!(subject, "not stored: another worker's message has this subject already");
                    let parts = known.note(places.clone(), &subject, Some(found));
                    return parts.map_err(|source| Error::Message { subject, source });
                }
                // The message was removed meanwhile, for example after the seal. The late rows are stored again, and
                // the sink asks ClickHouse about them.
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(error = full_cause(&error), "stored message not read, trying again")
                }
            }
            if !self.stop.pause(pause.wait()).await {
                return Err(Error::Stopped);
            }
        }
    }
}

/// The message of a batch whose rows fit into one message.
pub fn whole_message<I: Id>(
    key: &BatchKey,
    computed: Computed<I>,
    schema: &Arc<Schema>,
    maker: &Arc<Maker>,
) -> Bytes {
    Encoded::new(key, computed, schema.clone(), maker.clone(), usize::MAX).message(&(0..key.ids)).bytes
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::sync::Mutex;

    use millstream::{Failure, Outcome, Pipeline};
    use serde::{Deserialize, Serialize};

    use millstream::envelope::{RowCut, Rows, decode_rows, encode_cut};

    use super::encoded::{HEADERS, Has};
    use millstream::names::PassId;

    use super::*;
    use crate::compute::block::read;
    use crate::compute::{Function, Pool};
    use crate::model::rows::STATUS_DEAD;

    const MAX_PAYLOAD: usize = 40_000;

    /// Rows of noise. Some ids ask for a second attempt, so that their rows come after all others.
    #[derive(Default)]
    struct Noisy {
        again: Mutex<HashSet<String>>,
    }

    #[derive(Serialize, Deserialize)]
    struct Noise {
        noise: String,
    }

    impl Pipeline for Noisy {
        const NAME: &'static str = "noisy";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("noise", "String")];
        type Id = String;
        type Row = Noise;

        fn compute(&self, id: &String) -> Outcome<Noise> {
            if id.ends_with("05") && self.again.lock().expect("no panic").insert(id.clone()) {
                Err(Failure::retry("later"))
            } else {
                Ok(Noise { noise: noise(noise_of(id)) })
            }
        }
    }

    fn noise_of(id: &str) -> usize {
        match id.parse::<usize>().expect("a number") % 100 {
            7 => MAX_PAYLOAD * 2,
            50 => MAX_PAYLOAD * 3 / 4,
            size => size * 20,
        }
    }

    /// Text that does not compress.
    fn noise(size: usize) -> String {
        let mut state = size as u64 | 1 << 40;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            char::from(b'0' + (state % 75) as u8)
        };
        (0..size).map(|_| next()).collect()
    }

    fn key(ids: u32) -> BatchKey {
        BatchKey { pass: PassId { run: "r".parse().expect("legal"), pass: 3 }, batch: 9, ids }
    }

    async fn encoded(ids: &[String]) -> Encoded<String> {
        let function = Function::of(Arc::new(Noisy::default())).expect("sound");
        let pool = Pool::start(function.clone(), 2).expect("threads");
        let key = key(ids.len() as u32);
        let mut computed = pool.compute(ids.to_vec(), false).await;
        let again = std::mem::take(&mut computed.again).into_iter().map(|(id, _)| id).collect();
        computed.append(pool.compute(again, true).await);
        let maker = Arc::new(Maker { host: "here".into(), build: "1".into() });
        Encoded::new(&key, computed, function.spec().schema.clone(), maker, MAX_PAYLOAD)
    }

    fn numbers(count: u64) -> Vec<String> {
        let mut ids: Vec<String> = (0..count).map(|id| id.to_string()).collect();
        ids.sort_unstable();
        ids
    }

    /// Every stored message of a batch, by the places of its ids.
    fn messages(rows: &Encoded<String>) -> BTreeMap<(u32, u32), Vec<u8>> {
        let all = 0..rows.ids_in_all();
        let mut left = vec![all];
        let mut messages = BTreeMap::new();
        while let Some(places) = left.pop() {
            let message = rows.message(&places);
            left.extend(parts_of(&message.bytes, &places).expect("sound"));
            messages.insert((places.start, places.end), message.bytes.into());
        }
        messages
    }

    /// Each row's status and error by its id.
    fn read_back(frames: &[u8]) -> BTreeMap<String, (u8, String)> {
        let (rows, columns) = read::block(frames);
        let row = |row| {
            let id = columns["id"].text(row);
            let status = columns["status"].number(row) as u8;
            let noise = columns["noise"].text(row);
            let wanted = if status == STATUS_DEAD { 0 } else { noise_of(&id) };
            assert_eq!(noise.len(), wanted, "{id}");
            (id, (status, columns["error"].text(row)))
        };
        (0..rows).map(row).collect()
    }

    #[tokio::test]
    async fn rows_that_are_too_large_for_one_message_come_in_parts() {
        let ids = numbers(500);
        let rows = encoded(&ids).await;
        let mut found = BTreeMap::new();
        let mut cuts = 0;
        let mut next = 0;
        for ((start, end), message) in messages(&rows) {
            assert!(message.len() <= MAX_PAYLOAD - HEADERS, "{start}..{end}: {}", message.len());
            let part = match decode_rows(&message).expect("sound") {
                Rows::Batch(part) => part,
                Rows::Cut(_) => {
                    cuts += 1;
                    continue;
                }
            };
            assert!(!part.is_whole(), "{start}..{end}: all rows are too large");
            assert_eq!((part.from, part.from + part.ids), (start, end));
            assert_eq!(start, next, "parts follow each other");
            next = end;
            let range = &ids[start as usize..end as usize];
            assert_eq!((part.first, part.last), (range[0].as_str(), range[range.len() - 1].as_str()));
            assert_eq!((part.run, part.pass, part.batch, part.batch_ids), ("r", 3, 9, 500));
            let read = read_back(part.rows);
            assert_eq!(read.keys().collect::<Vec<_>>(), range.iter().collect::<Vec<_>>());
            assert_eq!(read.values().filter(|row| row.0 == STATUS_DEAD).count(), part.dead as usize);
            found.extend(read);
        }
        assert!(cuts > 1, "no part was cut again");
        assert_eq!((next, found.len()), (500, 500));
        let dead: Vec<&String> =
            found.iter().filter(|(_, row)| row.0 == STATUS_DEAD).map(|(id, _)| id).collect();
        assert_eq!(dead, ["107", "207", "307", "407", "7"]);
        assert!(found["107"].1.starts_with("row of 8"), "{}", found["107"].1);
        assert!(found["107"].1.contains(" bytes is larger than a message may be (40000 bytes): "));
    }

    #[tokio::test]
    async fn rows_that_fit_go_as_they_are() {
        let ids = numbers(7);
        let rows = encoded(&ids).await;
        let messages = messages(&rows);
        assert_eq!(messages.len(), 1);
        let Ok(Rows::Batch(batch)) = decode_rows(&messages[&(0, 7)]) else { panic!("not a whole batch") };
        assert!(batch.is_whole());
        assert_eq!((batch.ids, batch.first, batch.columns), (7, "", "`noise` String"));
        assert_eq!(read_back(batch.rows).into_keys().collect::<Vec<_>>(), ids);
    }

    #[tokio::test]
    async fn a_batch_of_one_id_whose_row_is_too_large_is_a_dead_letter() {
        let rows = encoded(&["7".to_owned()]).await;
        let messages = messages(&rows);
        let Ok(Rows::Batch(batch)) = decode_rows(&messages[&(0, 1)]) else { panic!("not a whole batch") };
        assert_eq!((batch.ids, batch.dead), (1, 1));
        assert_eq!(read_back(batch.rows)["7"].0, STATUS_DEAD);
    }

    /// Two workers with different rows for the same ids: the second follows the manifests of the first, and divides
    /// once more.
    #[tokio::test]
    async fn another_workers_cut_is_gone_by() {
        let cut = |parts: &[u32]| {
            encode_cut(&RowCut { run: "r", pass: 3, batch: 9, from: 0, parts: parts.to_vec() })
        };
        assert_eq!(parts_of(&cut(&[499, 1]), &(0..500)), Ok(vec![0..499, 499..500]));
        assert!(parts_of(&cut(&[400, 1]), &(0..500)).is_err(), "a cut of other ids");
        let rows = encoded(&numbers(500)).await;
        assert!(!rows.message(&(0..499)).parts.is_empty());
    }

    /// Messages by the places of their ids, as in the stream: the first one stays.
    type Stored = BTreeMap<(u32, u32), Vec<u8>>;

    /// One round of [`Target::store`], which ends after some messages if its worker dies.
    fn store_some(stream: &mut Stored, rows: &Encoded<u64>, open: &mut Vec<Range<u32>>, messages: u64) {
        let mut course = Course::new(std::mem::take(open), 4);
        for _ in 0..messages {
            let Some(next) = course.next(rows) else { break };
            let (places, message) = match next {
                Next::Rows(places) => (places.clone(), rows.message(&places)),
                Next::Cut(places, message) => (places, message),
            };
            let found = stream.entry((places.start, places.end)).or_insert_with(|| message.bytes.into());
            course.follow(parts_of(found, &places).expect("our own messages"));
        }
        *open = course.open();
    }

    /// Open places, as [`Target::look`] finds them.
    fn open_places(stream: &Stored, ids: u32) -> Vec<Range<u32>> {
        let mut known = Known::default();
        let mut left = Known::nothing(ids).open;
        while let Some(places) = left.pop() {
            let found = stream.get(&(places.start, places.end)).map(|found| found.clone().into());
            left.extend(known.note(places, "", found).expect("our own messages"));
        }
        known.open
    }

    /// Rows of these ids, signed by their worker.
    fn done(schema: &Arc<Schema>, by: u64, ids: &[u64], all: &[u64]) -> Encoded<u64> {
        let mut computed = Computed::none(schema);
        for id in ids {
            computed.ids.push(*id);
            computed.rows.ok(schema, &Noise { noise: format!("{by} {}", noise((id % 90) as usize)) });
        }
        let maker = Arc::new(Maker { host: "here".into(), build: by.to_string() });
        Encoded::some(&key(all.len() as u32), all, computed, schema.clone(), maker, HEADERS + 1500)
    }

    /// Workers with different finished ids, and different rows of equal ids, die at any message and begin again.
    #[test]
    fn workers_with_other_ids_done_store_each_id_once() {
        const IDS: u32 = 40;
        let schema = Arc::new(Schema::parse(Noisy::COLUMNS).expect("sound"));
        let all: Vec<u64> = (0..u64::from(IDS)).map(|id| id * 3).collect();
        let mut cut_again = 0;
        for seed in 0..400 {
            let mut dice = crate::simulation::Dice::new(seed);
            let mut stream = Stored::new();
            let mut workers: Vec<(Vec<u64>, Vec<Range<u32>>)> =
                vec![(Vec::new(), Known::nothing(IDS).open); 3];
            for turn in 0..60 {
                let by = dice.below(3);
                let (ids, open) = &mut workers[by as usize];
                if dice.one_in(8) {
                    (*ids, *open) = (Vec::new(), open_places(&stream, IDS));
                }
                let chances = if turn < 50 { 1 + dice.below(12) } else { 1 };
                let missing = all.iter().filter(|id| !ids.contains(id)).copied().collect::<Vec<_>>();
                ids.extend(missing.into_iter().filter(|_| dice.one_in(chances)));
                ids.sort_unstable();
                let messages = if turn < 50 { dice.below(9) } else { u64::MAX };
                store_some(&mut stream, &done(&schema, by, ids, &all), open, messages);
            }
            let mut found = BTreeMap::new();
            for ((start, end), message) in &stream {
                let Ok(Rows::Batch(part)) = decode_rows(message) else {
                    cut_again += u32::from((*start, *end) != (0, IDS));
                    continue;
                };
                assert_eq!((part.from, part.from + part.ids), (*start, *end), "seed {seed}");
                let (rows, columns) = read::block(part.rows);
                for row in 0..rows {
                    let signed = (columns["noise"].text(row), columns["build"].text(row));
                    assert!(signed.0.starts_with(&signed.1), "seed {seed}: {signed:?}");
                    let before = found.insert(columns["id"].number(row) as u64, signed);
                    assert_eq!(before, None, "seed {seed}: a row twice");
                }
            }
            assert_eq!(found.into_keys().collect::<Vec<_>>(), all, "seed {seed}");
        }
        assert!(cut_again > 400, "no part was cut again: {cut_again}");
    }

    #[test]
    fn a_cut_around_what_is_done_has_few_parts() {
        let schema = Arc::new(Schema::parse(Noisy::COLUMNS).expect("sound"));
        let all: Vec<u64> = (0..20).collect();
        let rows = done(&schema, 1, &[0, 2, 3, 4, 8, 9, 19], &all);
        assert_eq!(rows.cut_around(&(0..20), 9).parts, [0..1, 1..2, 2..5, 5..8, 8..10, 10..19, 19..20]);
        assert_eq!(rows.cut_around(&(0..20), 2).parts, [0..2, 2..5, 5..8, 8..10, 10..20]);
        assert_eq!(rows.cut_around(&(3..9), 9).parts, [3..5, 5..8, 8..9]);
        assert_eq!([0..20, 5..8, 2..5].map(|places| rows.has(&places)), [Has::Some, Has::None, Has::All]);
        let rest = rows.rest(&[0..2, 9..20]);
        assert_eq!((rest.ids, rest.rows.count()), (vec![0, 9, 19], 3));
    }
}
