//! Publishing a batch's rows: in one message, or in parts where one would be larger than the server takes.
//!
//! The subject of a batch holds either its rows or a cut, which says into which ranges its ids, in their order, are cut.
//! Each range has a subject of its own, and that holds again either rows or a cut. All of these messages are written by
//! whoever comes first. A worker that finds a cut goes by it, with rows of its own, and writes what is missing: so each id
//! has its row in one message, whatever a function returns the second time and whoever died between two parts. Should a
//! worker's rows be too large for a part that another one cut, that part is cut again.
//!
//! While a batch is cut there are in memory its compressed rows, its ids and twelve bytes for each, one frame's rows, and
//! one part.

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use millstream::Id;
use millstream::envelope::{
    EnvelopeFault, RowBatch, RowCut, RowPart, Rows, decode_rows, encode_cut, encode_part, encode_rows,
};
use millstream::frame::{self, FrameWriter};

use crate::broker::{Broker, Written};
use crate::compute::{BatchKey, Computed, row_prefix, write_dead};
use crate::error::{Error, full_cause};
use crate::failpoint;
use crate::retry::Backoff;
use crate::sink::MAX_INSERT_BYTES;
use crate::stop::Stop;
use crate::tables::STATUS_DEAD;

/// What a message carries beside its payload, which counts for the server's limit.
const HEADERS: usize = 4 << 10;
/// Parts of one cut at most; where that is not enough, they are cut again.
const MAX_PARTS: u64 = 1000;
/// Pauses between looks at a subject that was taken and holds nothing.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// Stores the rows of a batch, all or those that nobody stored; returns how many of them are dead letters.
///
/// # Errors
/// [`Error::Stopped`] when work is given up, [`Error::Message`] when what another worker stored cannot be read.
pub(crate) async fn publish<I: Id>(
    broker: &Broker,
    blank: Arc<[u8]>,
    key: &BatchKey,
    computed: Computed<I>,
    stop: &Stop,
) -> Result<u32, Error> {
    let mut dead = computed.dead;
    let rows = Arc::new(Encoded::new(key, computed, blank, broker.max_payload()));
    let all = 0..key.ids;
    let mut left = vec![all];
    while let Some(places) = left.pop() {
        let message = match rows.whole(&places) {
            Some(message) => message,
            None => {
                let (rows, places) = (rows.clone(), places.clone());
                // Megabytes are packed anew: not for a thread that does I/O.
                let packed = tokio::task::spawn_blocking(move || rows.message(&places));
                packed.await.expect("packing does not panic")
            }
        };
        dead += u32::from(message.too_large);
        let parts = store(broker, key, &places, message, stop).await?;
        left.extend(parts.into_iter().rev());
    }
    Ok(dead)
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

/// The rows of a batch.
pub(crate) struct Encoded<I> {
    key: BatchKey,
    computed: Computed<I>,
    blank: Arc<[u8]>,
    /// Bytes of a row before its id.
    prefix: usize,
    max_payload: usize,
    order: OnceLock<Order<I>>,
}

/// Where the rows of which ids lie.
struct Order<I> {
    /// The ids, sorted.
    ids: Vec<I>,
    /// For each row as it lies in the frames, the place of its id.
    places: Vec<u32>,
    frames: Vec<Frame>,
}

struct Frame {
    bytes: Range<usize>,
    rows: Range<usize>,
}

/// Some rows, compressed.
struct Body {
    frames: Vec<u8>,
    raw_bytes: u64,
    dead: u32,
}

impl<I: Id> Encoded<I> {
    pub(crate) fn new(key: &BatchKey, computed: Computed<I>, blank: Arc<[u8]>, max_payload: usize) -> Self {
        let prefix = row_prefix(key).len();
        Self { key: key.clone(), computed, blank, prefix, max_payload, order: OnceLock::new() }
    }

    fn limit(&self) -> usize {
        self.max_payload.saturating_sub(HEADERS)
    }

    fn fits(&self, message: &[u8], raw_bytes: u64) -> bool {
        message.len() <= self.limit() && raw_bytes <= MAX_INSERT_BYTES
    }

    /// What is stored of nearly every batch: all of its rows, as they are.
    pub(crate) fn whole(&self, places: &Range<u32>) -> Option<Message> {
        let Computed { frames, raw_bytes, dead, .. } = &self.computed;
        if *places != (0..self.key.ids) || frames.len() > self.limit() {
            return None;
        }
        let message = self.encode_all(frames, *raw_bytes, *dead);
        self.fits(&message, *raw_bytes).then(|| Message::rows(message))
    }

    /// The rows of the ids at these places; where they are too large, a cut; where there is but one, a dead letter.
    pub(crate) fn message(&self, places: &Range<u32>) -> Message {
        if *places == (0..self.key.ids) && places.len() > 1 {
            return self.cut(places, self.computed.frames.len(), self.computed.raw_bytes);
        }
        let body = self.body(places);
        let message = self.encode(places, &body);
        if self.fits(&message, body.raw_bytes) {
            return Message::rows(message);
        }
        if places.len() > 1 {
            return self.cut(places, message.len(), body.raw_bytes);
        }
        Message { too_large: true, ..Message::rows(self.encode(places, &self.dead_letter(&body))) }
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

    fn encode(&self, places: &Range<u32>, body: &Body) -> Vec<u8> {
        if *places == (0..self.key.ids) {
            return self.encode_all(&body.frames, body.raw_bytes, body.dead);
        }
        let ids = &self.order().ids[places.start as usize..places.end as usize];
        let text = |id: Option<&I>| id.map(ToString::to_string).unwrap_or_default();
        encode_part(&RowPart {
            run: self.key.run.as_str(),
            pass: self.key.pass,
            batch: self.key.batch,
            batch_ids: self.key.ids,
            from: places.start,
            ids: ids.len() as u32,
            first: &text(ids.first()),
            last: &text(ids.last()),
            dead: body.dead,
            raw_bytes: body.raw_bytes,
            rows: &body.frames,
        })
    }

    fn encode_all(&self, frames: &[u8], raw_bytes: u64, dead: u32) -> Vec<u8> {
        let BatchKey { run, pass, batch, ids } = &self.key;
        encode_rows(&RowBatch {
            run: run.as_str(),
            pass: *pass,
            batch: *batch,
            ids: *ids,
            dead,
            raw_bytes,
            rows: frames,
        })
    }

    /// Rows are taken as they lie: ClickHouse sorts what it inserts.
    fn body(&self, places: &Range<u32>) -> Body {
        let order = self.order();
        let wanted = |row: usize| places.contains(&order.places[row]);
        let (mut rows, mut raw, mut dead) = (FrameWriter::default(), Vec::new(), 0);
        for frame in order.frames.iter().filter(|frame| frame.rows.clone().any(wanted)) {
            self.open(frame, &mut raw);
            let mut rest = &raw[..];
            for row in frame.rows.clone() {
                let (bytes, after) = rest.split_at(self.computed.lengths[row] as usize);
                rest = after;
                if wanted(row) {
                    dead += u32::from(self.split(bytes).1.first() == Some(&STATUS_DEAD));
                    rows.raw.extend_from_slice(bytes);
                    rows.end_row();
                }
            }
        }
        let (frames, raw_bytes) = rows.finish();
        Body { frames, raw_bytes, dead }
    }

    /// In place of the one row in `body`.
    fn dead_letter(&self, body: &Body) -> Body {
        let mut row = Vec::new();
        frame::decompress(&body.frames, &mut row).expect("a frame of our own");
        let (size, head) = (row.len(), row.len() - self.split(&row).1.len());
        row.truncate(head);
        let reason = format!(
            "row of {size} bytes is larger than a message may be ({} bytes): return less for one id, or raise max_payload \
             of nats-server",
            self.max_payload
        );
        write_dead(&reason, &self.blank, &mut row);
        let mut frames = Vec::new();
        frame::compress(&row, &mut frames);
        Body { frames, raw_bytes: row.len() as u64, dead: 1 }
    }

    fn order(&self) -> &Order<I> {
        self.order.get_or_init(|| {
            let Computed { frames: bytes, lengths, .. } = &self.computed;
            let (mut frames, mut ids) = (Vec::new(), Vec::with_capacity(lengths.len()));
            let (mut begin, mut raw) = (0, Vec::new());
            while let Some(length) = frame::frame_len(&bytes[begin..]).expect("frames of our own") {
                let mut frame = Frame { bytes: begin..begin + length, rows: ids.len()..ids.len() };
                self.open(&frame, &mut raw);
                let mut rest = &raw[..];
                while !rest.is_empty() {
                    let (row, after) = rest.split_at(lengths[ids.len()] as usize);
                    ids.push(self.split(row).0);
                    rest = after;
                }
                frame.rows.end = ids.len();
                begin = frame.bytes.end;
                frames.push(frame);
            }
            sorted(ids, frames)
        })
    }

    fn open(&self, frame: &Frame, raw: &mut Vec<u8>) {
        raw.clear();
        frame::decompress(&self.computed.frames[frame.bytes.clone()], raw).expect("a frame of our own");
    }

    /// A row's id, and all that follows it.
    fn split<'a>(&self, row: &'a [u8]) -> (I, &'a [u8]) {
        I::read_rowbinary(&row[self.prefix..]).expect("a row of our own")
    }
}

fn sorted<I: Id>(ids: Vec<I>, frames: Vec<Frame>) -> Order<I> {
    let mut rows: Vec<(I, u32)> = ids.into_iter().zip(0..).collect();
    rows.sort_unstable();
    let mut places = vec![0; rows.len()];
    for (place, (_, row)) in (0..).zip(&rows) {
        places[*row as usize] = place;
    }
    Order { ids: rows.into_iter().map(|(id, _)| id).collect(), places, frames }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::sync::Mutex;

    use millstream::{Failure, Outcome, Pipeline};
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::compute::{Function, Pool};

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
        let mut computed = pool.compute(key.clone(), ids.to_vec(), false).await;
        let again = std::mem::take(&mut computed.again).into_iter().map(|(id, _)| id).collect();
        computed.append(pool.compute(key.clone(), again, true).await);
        Encoded::new(&key, computed, function.blank, MAX_PAYLOAD)
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
            let message = rows.whole(&places).unwrap_or_else(|| rows.message(&places));
            left.extend(parts_of(&message.bytes, &places).expect("sound"));
            messages.insert((places.start, places.end), message.bytes.into());
        }
        messages
    }

    /// Each row's status and error by its id.
    fn read_back(rows: &Encoded<String>, frames: &[u8]) -> BTreeMap<String, (u8, String)> {
        let (mut raw, mut rest) = (Vec::new(), frames);
        while let Some(length) = frame::frame_len(rest).expect("frames") {
            frame::decompress(&rest[..length], &mut raw).expect("sound");
            rest = &rest[length..];
        }
        let (mut found, mut rest) = (BTreeMap::new(), &raw[..]);
        while !rest.is_empty() {
            let (id, after) = rows.split(rest);
            let (error, columns) = read_long(&after[1..]);
            let (noise, next) = read_long(columns);
            assert_eq!(noise.is_empty(), after[0] == STATUS_DEAD || noise_of(&id) == 0, "{id}");
            found.insert(id, (after[0], String::from_utf8(error.to_vec()).expect("text")));
            rest = next;
        }
        found
    }

    fn read_long(bytes: &[u8]) -> (&[u8], &[u8]) {
        let (mut length, mut digits) = (0usize, 0);
        while bytes[digits] & 0x80 != 0 {
            length |= usize::from(bytes[digits] & 0x7f) << (7 * digits);
            digits += 1;
        }
        length |= usize::from(bytes[digits]) << (7 * digits);
        bytes[digits + 1..].split_at(length)
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
                Rows::Part(part) => part,
                Rows::Cut(_) => {
                    cuts += 1;
                    continue;
                }
                Rows::Batch(_) => panic!("{start}..{end}: all rows are too large"),
            };
            assert_eq!((part.from, part.from + part.ids), (start, end));
            assert_eq!(start, next, "parts follow each other");
            next = end;
            let range = &ids[start as usize..end as usize];
            assert_eq!((part.first, part.last), (range[0].as_str(), range[range.len() - 1].as_str()));
            assert_eq!((part.run, part.pass, part.batch, part.batch_ids), ("r", 3, 9, 500));
            let read = read_back(&rows, part.rows);
            assert_eq!(read.keys().collect::<Vec<_>>(), range.iter().collect::<Vec<_>>());
            assert_eq!(read.values().filter(|row| row.0 == STATUS_DEAD).count(), part.dead as usize);
            found.extend(read);
        }
        assert!(cuts > 1, "no part was cut again");
        assert_eq!((next, found.len()), (500, 500));
        let dead: Vec<&String> =
            found.iter().filter(|(_, row)| row.0 == STATUS_DEAD).map(|(id, _)| id).collect();
        assert_eq!(dead, ["107", "207", "307", "407", "7"]);
        assert!(found["107"].1.starts_with("row of 800"), "{}", found["107"].1);
        assert!(found["107"].1.contains(" bytes is larger than a message may be (40000 bytes): "));
    }

    #[tokio::test]
    async fn rows_that_fit_go_as_they_are() {
        let ids = numbers(7);
        let rows = encoded(&ids).await;
        let messages = messages(&rows);
        assert_eq!(messages.len(), 1);
        let Ok(Rows::Batch(batch)) = decode_rows(&messages[&(0, 7)]) else { panic!("not a whole batch") };
        assert_eq!((batch.ids, batch.rows), (7, &rows.computed.frames[..]));
    }

    #[tokio::test]
    async fn a_batch_of_one_id_whose_row_is_too_large_is_a_dead_letter() {
        let rows = encoded(&["7".to_owned()]).await;
        let messages = messages(&rows);
        let Ok(Rows::Batch(batch)) = decode_rows(&messages[&(0, 1)]) else { panic!("not a whole batch") };
        assert_eq!((batch.ids, batch.dead), (1, 1));
        assert_eq!(read_back(&rows, batch.rows)["7"].0, STATUS_DEAD);
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
