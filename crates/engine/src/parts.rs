//! Publishing a batch's rows: in one message, or in parts where one would be larger than the server takes.
//!
//! The subject of a batch holds either its rows or a cut, which says into which ranges its ids, in their order, are cut.
//! Each range has a subject of its own, and that holds again either rows or a cut. The first worker to write one of these
//! messages wins. A worker that finds a cut goes by it, with rows of its own, and writes what is missing: so each id
//! has its row in one message, whatever a function returns the second time and whichever worker died between two parts.
//! Should a worker's rows be too large for a part that another one cut, that part is cut again.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millstream::Id;
use millstream::envelope::{EnvelopeFault, RowBatch, RowCut, Rows, decode_rows, encode_cut, encode_rows};
use millstream::schema::Schema;

use crate::broker::{Broker, Written};
use crate::compute::block::{Head, Packed, pack};
use crate::compute::{self, BatchKey, Computed, Maker};
use crate::error::{Error, full_cause};
use crate::failpoint;
use crate::load::WorkLoad;
use crate::records::now_ms;
use crate::retry::Backoff;
use crate::sink::MAX_INSERT_BYTES;
use crate::stop::Stop;

/// What a message carries beside its payload, which counts for the server's limit.
const HEADERS: usize = 4 << 10;
/// Parts of one cut at most; where that is not enough, they are cut again.
const MAX_PARTS: u64 = 1000;
/// Pauses between looks at a subject that was taken and holds nothing.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// What publishing a batch came to.
pub(crate) struct Published {
    /// How many of its rows are dead letters.
    pub dead: u32,
    /// How long its rows were packed, on a thread beside those that compute.
    pub packing: Duration,
}

/// Stores the rows of a batch, all or those that no worker stored before.
///
/// # Errors
/// [`Error::Stopped`] when work is given up, [`Error::Message`] when what another worker stored cannot be read.
pub(crate) async fn publish<I: Id>(
    broker: &Broker,
    schema: &Arc<Schema>,
    maker: &Arc<Maker>,
    key: &BatchKey,
    computed: Computed<I>,
    load: &WorkLoad,
    stop: &Stop,
) -> Result<Published, Error> {
    let mut published = Published { dead: computed.rows.dead.len() as u32, packing: Duration::ZERO };
    let encoded = Encoded::new(key, computed, schema.clone(), maker.clone(), broker.max_payload());
    let rows = Arc::new(encoded);
    let all = 0..key.ids;
    let mut left = vec![all];
    while let Some(places) = left.pop() {
        let under_way = load.packing();
        let (packer, wanted) = (rows.clone(), places.clone());
        // Megabytes are compressed: not for a thread that does I/O.
        let packed = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            (packer.message(&wanted), begun.elapsed())
        });
        let (message, took) = packed.await.expect("packing does not panic");
        drop(under_way);
        load.packed(took);
        published.packing += took;
        published.dead += u32::from(message.too_large);
        let _publishing = load.publishing();
        let parts = store(broker, key, &places, message, stop).await?;
        left.extend(parts.into_iter().rev());
    }
    Ok(published)
}

/// The message that a worker stores of a batch whose rows are no more than one message may carry.
pub fn whole_message<I: Id>(
    key: &BatchKey,
    computed: Computed<I>,
    schema: &Arc<Schema>,
    maker: &Arc<Maker>,
) -> Bytes {
    Encoded::new(key, computed, schema.clone(), maker.clone(), usize::MAX).message(&(0..key.ids)).bytes
}

/// Stores a message unless its subject holds one; returns the parts into which what is stored there is cut.
async fn store(
    broker: &Broker,
    key: &BatchKey,
    places: &Range<u32>,
    message: Message,
    stop: &Stop,
) -> Result<Vec<Range<u32>>, Error> {
    let (names, whole) = (broker.names(), *places == (0..key.ids));
    let subject = match whole {
        true => names.rows_subject(&key.run, key.pass, key.batch),
        false => names.part_subject(&key.run, key.pass, key.batch, places),
    };
    let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
    loop {
        if broker.write_once(&subject, message.bytes.clone(), stop).await? == Written::First {
            failpoint::pass(match (whole, message.parts.is_empty()) {
                (true, true) => "work-after-rows",
                (false, true) => "work-after-part",
                (_, false) => "work-after-cut",
            });
            return Ok(message.parts);
        }
        match broker.rows_message(&subject).await {
            Ok(Some(found)) => {
                tracing::debug!(subject, "another worker's message is stored already");
                return parts_of(&found, places).map_err(|source| Error::Message { subject, source });
            }
            // Removed since, behind the seal for one: late rows are stored once more, and the sink asks about them.
            Ok(None) => {}
            Err(error) => tracing::warn!(error = full_cause(&error), "trying again"),
        }
        if !stop.pause(pause.wait()).await {
            return Err(Error::Stopped);
        }
    }
}

pub(crate) fn parts_of(message: &[u8], places: &Range<u32>) -> Result<Vec<Range<u32>>, EnvelopeFault> {
    let Rows::Cut(cut) = decode_rows(message)? else { return Ok(Vec::new()) };
    let parts: Vec<Range<u32>> = cut.ranges().collect();
    let covered = parts.first().zip(parts.last()).map(|(first, last)| first.start..last.end);
    if covered.as_ref() == Some(places) {
        Ok(parts)
    } else {
        Err(EnvelopeFault::Body { length: message.len() })
    }
}

/// A message to be stored.
pub(crate) struct Message {
    pub(crate) bytes: Bytes,
    /// The parts that it stands for, if it is a cut.
    pub(crate) parts: Vec<Range<u32>>,
    /// Whether it is one row that was too large, and is a dead letter now.
    too_large: bool,
}

impl Message {
    fn rows(bytes: Vec<u8>) -> Self {
        Self { bytes: bytes.into(), parts: Vec::new(), too_large: false }
    }
}

/// The rows of a batch, in the order of its ids.
pub(crate) struct Encoded<I> {
    key: BatchKey,
    ids: Vec<I>,
    rows: compute::Rows,
    schema: Arc<Schema>,
    columns: String,
    maker: Arc<Maker>,
    computed_ms: u64,
    max_payload: usize,
}

impl<I: Id> Encoded<I> {
    pub(crate) fn new(
        key: &BatchKey,
        computed: Computed<I>,
        schema: Arc<Schema>,
        maker: Arc<Maker>,
        max_payload: usize,
    ) -> Self {
        let (ids, rows) = in_order(computed);
        let (columns, computed_ms) = (schema.to_text(), now_ms());
        Self { key: key.clone(), ids, rows, schema, columns, maker, computed_ms, max_payload }
    }

    fn limit(&self) -> usize {
        self.max_payload.saturating_sub(HEADERS)
    }

    /// The rows of the ids at these places; where they are too large, a cut; where there is but one, a dead letter.
    pub(crate) fn message(&self, places: &Range<u32>) -> Message {
        let (ids, range) = (self.ids(places), places.start as usize..places.end as usize);
        let some = (*places != (0..self.key.ids)).then(|| self.rows.slice(range));
        let rows = some.as_ref().unwrap_or(&self.rows);
        let raw_bytes = rows.bytes() as u64;
        if raw_bytes > MAX_INSERT_BYTES && places.len() > 1 {
            return self.cut(places, 0, raw_bytes);
        }
        let packed = self.pack(ids, rows);
        let message = self.encode(places, &packed);
        if message.len() <= self.limit() && packed.raw_bytes <= MAX_INSERT_BYTES {
            return Message::rows(message);
        }
        if places.len() > 1 {
            return self.cut(places, message.len(), packed.raw_bytes);
        }
        let reason = format!(
            "row of {} bytes is larger than a message may be ({} bytes): return less for one id, or raise max_payload \
             of nats-server",
            rows.bytes(),
            self.max_payload
        );
        let mut dead = compute::Rows::with_room(&self.schema, 1);
        dead.dead(&self.schema, &reason);
        Message { too_large: true, ..Message::rows(self.encode(places, &self.pack(ids, &dead))) }
    }

    fn ids(&self, places: &Range<u32>) -> &[I] {
        &self.ids[places.start as usize..places.end as usize]
    }

    fn pack(&self, ids: &[I], rows: &compute::Rows) -> Packed {
        let head = Head { key: &self.key, maker: &self.maker, computed_ms: self.computed_ms };
        pack(&head, &self.schema, ids, rows)
    }

    /// Parts of as many ids each, whose rows take half of what a message may have: another worker's may be larger.
    fn cut(&self, places: &Range<u32>, bytes: usize, raw_bytes: u64) -> Message {
        let half = (self.limit() as u64 / 2).max(1);
        let parts = (bytes as u64).div_ceil(half).max(raw_bytes.div_ceil(MAX_INSERT_BYTES / 2));
        let parts = parts.clamp(2, MAX_PARTS).min(places.len() as u64);
        let at = |part| places.start + (places.len() as u64 * part / parts) as u32;
        let parts: Vec<Range<u32>> = (0..parts).map(|part| at(part)..at(part + 1)).collect();
        let BatchKey { run, pass, batch, .. } = &self.key;
        let ids = parts.iter().map(|part| part.len() as u32).collect();
        let cut = RowCut { run: run.as_str(), pass: *pass, batch: *batch, from: places.start, parts: ids };
        Message { bytes: encode_cut(&cut).into(), parts, too_large: false }
    }

    fn encode(&self, places: &Range<u32>, packed: &Packed) -> Vec<u8> {
        let whole = *places == (0..self.key.ids);
        let ids = self.ids(places);
        let text = |id: Option<&I>| id.filter(|_| !whole).map(ToString::to_string).unwrap_or_default();
        encode_rows(&RowBatch {
            run: self.key.run.as_str(),
            pass: self.key.pass,
            batch: self.key.batch,
            batch_ids: self.key.ids,
            from: places.start,
            ids: places.len() as u32,
            first: &text(ids.first()),
            last: &text(ids.last()),
            dead: packed.dead,
            raw_bytes: packed.raw_bytes,
            schema: self.schema.fingerprint(),
            columns: &self.columns,
            build: &self.maker.build,
            rows: &packed.frames,
        })
    }
}

/// Ids and rows, sorted by id. They nearly always are: ids that were tried again come last.
fn in_order<I: Id>(computed: Computed<I>) -> (Vec<I>, compute::Rows) {
    let Computed { ids, rows, .. } = computed;
    if ids.is_sorted() {
        return (ids, rows);
    }
    let mut order: Vec<(I, u32)> = ids.into_iter().zip(0..).collect();
    order.sort_unstable();
    let (ids, places): (Vec<I>, Vec<u32>) = order.into_iter().unzip();
    let rows = rows.reordered(&places);
    (ids, rows)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::sync::Mutex;

    use millstream::{Failure, Outcome, Pipeline};
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::compute::block::read;
    use crate::compute::{Function, Pool};
    use crate::tables::STATUS_DEAD;

    const MAX_PAYLOAD: usize = 40_000;

    /// Rows of noise; some ids ask for a second attempt, so that their rows lie behind all others.
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
            match id.ends_with("05") && self.again.lock().expect("no panic").insert(id.clone()) {
                true => Err(Failure::retry("later")),
                false => Ok(Noise { noise: noise(noise_of(id)) }),
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
        BatchKey { run: "r".parse().expect("legal"), pass: 3, batch: 9, ids }
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

    /// Every message that is stored of a batch, by the places of its ids.
    fn messages(rows: &Encoded<String>) -> BTreeMap<(u32, u32), Vec<u8>> {
        let all = 0..rows.key.ids;
        let (mut left, mut messages) = (vec![all], BTreeMap::new());
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
            let (id, status) = (columns["id"].text(row), columns["status"].number(row) as u8);
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
        let (mut cuts, mut next) = (0, 0);
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

    /// Two workers with other rows for the same ids: the second goes by the cuts of the first, and cuts once more.
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
}
