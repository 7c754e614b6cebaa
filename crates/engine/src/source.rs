//! Where a run's ids come from, and how they are cut into batches.
//!
//! Input is read twice where it can be: once to find every bad line and to learn the digest, before anything is
//! published; once to publish. Neither pass keeps more than one batch; the first also draws a bounded sample, on which the
//! function is timed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use millstream::{Id, MAX_BATCH_IDS};
use tokio::sync::mpsc;

use crate::error::Error;

/// How many bad lines are shown.
const SHOWN_FAULTS: usize = 10;
/// The longest line that is read, in bytes: longer ones are no ids, and a file without line ends must not fill memory.
const MAX_LINE: u64 = 1 << 20;
/// Times that lines are handed over ahead of whoever takes them: each is what one read brought.
const READ_AHEAD: usize = 4;
/// Ids of a file that are kept as its sample: a second's work of most functions, and 32 MiB of the longest ids.
const SAMPLED: usize = 8192;

/// The ids of a run as the user gave them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Numbers from the first to the last, both included.
    Range {
        /// The first.
        first: u64,
        /// The last, not before the first.
        last: u64,
    },
    /// A file, or what was read from standard input.
    File {
        /// Where it is.
        path: PathBuf,
        /// Its name for people: the path, or `standard input`.
        shown: String,
        /// The column of a CSV file with a header; without, a line is an id.
        column: Option<String>,
    },
}

/// What is known of an input before it is published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// The ids in words.
    pub source: String,
    /// Equal for equal ids.
    pub fingerprint: String,
    /// How many ids there are, repeats counted.
    pub ids: u64,
    /// Whether one can be there twice.
    pub may_repeat: bool,
}

impl Input {
    /// The input in words.
    pub fn shown(&self) -> String {
        match self {
            Self::Range { first, last } => format!("ids {first}..={last}"),
            Self::File { shown, column: None, .. } => shown.clone(),
            Self::File { shown, column: Some(column), .. } => format!("column `{column}` of {shown}"),
        }
    }

    /// Reads all of it without keeping more than a sample. Blocks.
    ///
    /// # Errors
    /// [`Error::BadLines`] with the first of them and their number; [`Error::NoIds`], [`Error::NoColumn`],
    /// [`Error::Input`].
    pub fn survey<I: Id>(&self) -> Result<(Survey, Sample<I>), Error> {
        let source = self.shown();
        if let Self::Range { first, last } = *self {
            let ids = (last - first).checked_add(1).ok_or(Error::TooManyBatches { input: source.clone() })?;
            let survey = Survey { fingerprint: source.clone(), source, ids, may_repeat: false };
            return Ok((survey, Sample::of_range(first, ids)));
        }
        let (mut ids, mut digest, mut bad, mut first) = (0u64, 0u64, 0u64, Vec::new());
        let mut sample = Sample::of_list();
        for line in self.lines::<I>()? {
            match line.map_err(|source| Error::Input { input: self.shown(), source })? {
                Line::Id(id) => {
                    digest = digest.wrapping_add(id.sip_hash());
                    sample.offer(id, ids);
                    ids += 1;
                }
                Line::Bad { number, fault } => {
                    bad += 1;
                    if first.len() < SHOWN_FAULTS {
                        first.push((number, fault));
                    }
                }
            }
        }
        match (bad, ids) {
            (0, 0) => Err(Error::NoIds { input: source }),
            (0, _) => {
                let fingerprint = format!("{ids} ids with digest {digest:016x}");
                Ok((Survey { source, fingerprint, ids, may_repeat: true }, sample))
            }
            _ => Err(Error::BadLines { input: source, count: bad, first }),
        }
    }

    /// The ids, one after the other. Blocks.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::NoColumn`].
    pub fn ids<I: Id>(&self) -> Result<Box<dyn Iterator<Item = Result<I, Error>> + Send>, Error> {
        if let Self::Range { first, last } = *self {
            return Ok(Box::new((first..=last).map(|number| Ok(I::from_number(number)))));
        }
        let input = self.shown();
        Ok(Box::new(self.lines::<I>()?.map(move |line| match line {
            Ok(Line::Id(id)) => Ok(id),
            // Surveyed before: the file changed since.
            Ok(Line::Bad { number, fault }) => {
                Err(Error::BadLines { input: input.clone(), count: 1, first: vec![(number, fault)] })
            }
            Err(source) => Err(Error::Input { input: input.clone(), source }),
        })))
    }

    fn lines<I: Id>(&self) -> Result<Box<dyn Iterator<Item = std::io::Result<Line<I>>> + Send>, Error> {
        let Self::File { path, column, .. } = self else { return Ok(Box::new(std::iter::empty())) };
        match column {
            None => Ok(Box::new(plain_lines(self.open(path)?))),
            Some(column) => self.csv_fields(path, column),
        }
    }

    fn open(&self, path: &Path) -> Result<BufReader<File>, Error> {
        let file = File::open(path).and_then(|file| match file.metadata()?.is_dir() {
            true => Err(std::io::ErrorKind::IsADirectory.into()),
            false => Ok(file),
        });
        file.map(|file| BufReader::with_capacity(1 << 16, file))
            .map_err(|source| Error::Input { input: self.shown(), source })
    }

    fn csv_fields<I: Id>(
        &self,
        path: &Path,
        column: &str,
    ) -> Result<Box<dyn Iterator<Item = std::io::Result<Line<I>>> + Send>, Error> {
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(self.open(path)?);
        let failed = |error: csv::Error| Error::Input { input: self.shown(), source: error.into() };
        let found: Vec<String> = reader.headers().map_err(failed)?.iter().map(str::to_owned).collect();
        let Some(index) = found.iter().position(|name| name.trim() == column) else {
            return Err(Error::NoColumn { input: self.shown(), found });
        };
        Ok(Box::new(reader.into_byte_records().map(move |record| {
            let record = record?;
            let number = record.position().map_or(0, csv::Position::line);
            Ok(match record.get(index).map(std::str::from_utf8) {
                Some(Ok(field)) => line_of(number, field.trim()),
                Some(Err(_)) => Line::Bad { number, fault: "it is not UTF-8".to_owned() },
                None => Line::Bad { number, fault: format!("it has only {} fields", record.len()) },
            })
        })))
    }
}

/// A line of an input.
#[derive(Debug)]
pub enum Line<I> {
    /// An id.
    Id(I),
    /// Something else.
    Bad {
        /// Its number, from 1.
        number: u64,
        /// Why it is no id.
        fault: String,
    },
}

/// Lines that were read together.
pub type Lines<I> = std::io::Result<Vec<Line<I>>>;

/// Reads lines as they come, on a thread of its own that ends with the input, with the receiver, or with the process. What
/// is there is handed over at once: a line that is not whole yet holds nothing back.
///
/// # Errors
/// The system's, when it gives no thread.
pub fn feed<I: Id>(from: impl Read + Send + 'static) -> std::io::Result<mpsc::Receiver<Lines<I>>> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    let mut lines =
        PlainLines { reader: BufReader::with_capacity(1 << 16, from), number: 0, bytes: Vec::new() };
    // Not one of tokio's: those are waited for, and nothing can end a read.
    std::thread::Builder::new().name("input".into()).spawn(move || {
        loop {
            let together = lines.together();
            let last = together.as_ref().map_or(true, Vec::is_empty);
            if sender.blocking_send(together).is_err() || last {
                return;
            }
        }
    })?;
    Ok(receiver)
}

/// One id a line, by number; blank lines are passed over.
struct PlainLines<R> {
    reader: R,
    number: u64,
    bytes: Vec<u8>,
}

fn plain_lines<I: Id>(reader: impl BufRead) -> impl Iterator<Item = std::io::Result<Line<I>>> {
    let mut lines = PlainLines { reader, number: 0, bytes: Vec::new() };
    std::iter::from_fn(move || lines.next().transpose())
}

impl<R: BufRead> PlainLines<R> {
    fn next<I: Id>(&mut self) -> std::io::Result<Option<Line<I>>> {
        while self.read()? {
            if let Some(line) = self.line() {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    /// Reads one line, whatever is in it; `false` at the end.
    fn read(&mut self) -> std::io::Result<bool> {
        self.bytes.clear();
        let read = (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut self.bytes)?;
        self.number += u64::from(read > 0);
        Ok(read > 0)
    }

    /// What was read, unless it is blank.
    fn line<I: Id>(&self) -> Option<Line<I>> {
        let number = self.number;
        match std::str::from_utf8(&self.bytes).map(|text| text.trim_end_matches(['\n', '\r'])) {
            Ok(text) if text.trim().is_empty() => None,
            Ok(text) => Some(line_of(number, text)),
            Err(_) => Some(Line::Bad { number, fault: "it is not UTF-8".to_owned() }),
        }
    }
}

impl<R: Read> PlainLines<BufReader<R>> {
    /// Waits for a line, and takes those that are there with it; none at the end.
    fn together<I: Id>(&mut self) -> Lines<I> {
        let mut lines = Vec::new();
        loop {
            match self.read() {
                Ok(true) => lines.extend(self.line()),
                Ok(false) => break,
                Err(error) if lines.is_empty() => return Err(error),
                // It will be there at the next call, too.
                Err(_) => break,
            }
            if !lines.is_empty() && !self.reader.buffer().contains(&b'\n') {
                break;
            }
        }
        Ok(lines)
    }
}

fn line_of<I: Id>(number: u64, text: &str) -> Line<I> {
    match I::parse(text) {
        Ok(id) => Line::Id(id),
        Err(fault) => Line::Bad { number, fault: fault.to_string() },
    }
}

/// Ids from all over an input, for as long as somebody takes them.
#[derive(Debug, Clone)]
pub struct Sample<I> {
    drawn: Drawn<I>,
    /// How many were taken.
    taken: u64,
}

#[derive(Debug, Clone)]
enum Drawn<I> {
    Range { first: u64, ids: u64 },
    List(Vec<I>),
}

impl<I: Id> Sample<I> {
    fn of_range(first: u64, ids: u64) -> Self {
        Self { drawn: Drawn::Range { first, ids }, taken: 0 }
    }

    /// Of ids that are at hand.
    pub fn of(ids: impl IntoIterator<Item = I>) -> Self {
        let mut sample = Self::of_list();
        (0..).zip(ids).for_each(|(place, id)| sample.offer(id, place));
        sample
    }

    fn of_list() -> Self {
        Self { drawn: Drawn::List(Vec::new()), taken: 0 }
    }

    /// Offers the id at this place of the list: in the end each was kept with the same probability (Vitter's algorithm R,
    /// <https://doi.org/10.1145/3147.3165>), and in no order.
    fn offer(&mut self, id: I, place: u64) {
        let Drawn::List(kept) = &mut self.drawn else { return };
        let seat = ((u128::from(scattered(place)) * u128::from(place + 1)) >> u64::BITS) as usize;
        if kept.len() < SAMPLED {
            kept.push(id);
            let last = kept.len() - 1;
            kept.swap(seat, last);
        } else if seat < SAMPLED {
            kept[seat] = id;
        }
    }

    /// How many ids there are to be taken at once.
    pub fn len(&self) -> u64 {
        match &self.drawn {
            Drawn::Range { ids, .. } => *ids,
            Drawn::List(kept) => kept.len() as u64,
        }
    }

    /// Whether there are none, which no input that was surveyed has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next ids, `most` at most and at least one, sorted and without repeats. From its beginning on, what was taken lies
    /// evenly over all of the input; a list begins again at its end.
    pub fn take(&mut self, most: usize) -> Vec<I> {
        /// The golden ratio's fraction of 2^64: its multiples lie evenly wherever one stops.
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let from = self.taken;
        let mut ids: Vec<I> = match &self.drawn {
            Drawn::Range { first, ids } => {
                let spread = |number: u64| {
                    let share = u128::from(number.wrapping_mul(GOLDEN)) * u128::from(*ids);
                    I::from_number(first + (share >> u64::BITS) as u64)
                };
                (from..from + (most as u64).min(*ids)).map(spread).collect()
            }
            Drawn::List(kept) => {
                let begin = from as usize % kept.len().max(1);
                kept.iter().cycle().skip(begin).take(most.min(kept.len())).cloned().collect()
            }
        };
        self.taken += ids.len() as u64;
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// A number that has nothing visible in common with its neighbours' (splitmix64's last steps).
fn scattered(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_add(1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Ids of one batch, sorted and without repeats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut<I> {
    /// The ids.
    pub ids: Vec<I>,
    /// How many were dropped because they were there already.
    pub repeats: u64,
}

/// Cuts a stream of ids into batches, by number and by size.
#[derive(Debug)]
pub struct Cutter<I> {
    ids: Vec<I>,
    bytes: usize,
    batch_ids: usize,
    max_bytes: usize,
}

impl<I: Id> Cutter<I> {
    /// Batches of `batch_ids` ids, fewer where they would not fit in `max_bytes`.
    pub fn new(batch_ids: u32, max_bytes: usize) -> Self {
        let batch_ids = batch_ids.clamp(1, MAX_BATCH_IDS) as usize;
        Self { ids: Vec::with_capacity(batch_ids), bytes: 0, batch_ids, max_bytes }
    }

    /// Whether it holds no id.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Batches are of this size from now on.
    pub fn resize(&mut self, batch_ids: u32) {
        self.batch_ids = batch_ids.clamp(1, MAX_BATCH_IDS) as usize;
    }

    /// Takes an id; gives the batch that it completes.
    pub fn push(&mut self, id: I) -> Option<Cut<I>> {
        let size = id.wire_size();
        let full = if !self.ids.is_empty() && self.bytes + size > self.max_bytes { self.cut() } else { None };
        self.bytes += size;
        self.ids.push(id);
        // Both at once cannot be: a batch cut by size leaves this id alone, unless one id makes a batch.
        if full.is_none() && self.ids.len() >= self.batch_ids { self.cut() } else { full }
    }

    /// The ids that are left.
    pub fn cut(&mut self) -> Option<Cut<I>> {
        if self.ids.is_empty() {
            return None;
        }
        self.bytes = 0;
        let mut ids = std::mem::replace(&mut self.ids, Vec::with_capacity(self.batch_ids));
        let given = ids.len();
        if !ids.is_sorted_by(|a, b| a < b) {
            ids.sort_unstable();
            ids.dedup();
        }
        let repeats = (given - ids.len()) as u64;
        Some(Cut { ids, repeats })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn file(text: &str, column: Option<&str>) -> (tempfile::NamedTempFile, Input) {
        let mut file = tempfile::NamedTempFile::new().expect("temp file");
        file.write_all(text.as_bytes()).expect("written");
        let path = file.path().to_owned();
        let input = Input::File { path, shown: "file `ids`".into(), column: column.map(str::to_owned) };
        (file, input)
    }

    fn read(input: &Input) -> Vec<u64> {
        input.ids().expect("opens").map(|id| id.expect("an id")).collect()
    }

    #[test]
    fn a_file_has_one_id_a_line() {
        let (_file, input) = file("3\r\n\n 1 \n2", None);
        assert_eq!(read(&input), [3, 1, 2]);
        assert_eq!(input.survey::<u64>().expect("sound").0.ids, 3);
    }

    /// Hands out one piece a read, as a pipe does.
    struct Pieces(Vec<&'static str>);

    impl Read for Pieces {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            (&mut self.0.remove(0).as_bytes()).read(into)
        }
    }

    #[test]
    fn lines_are_handed_over_as_they_come() {
        let reader = BufReader::new(Pieces(vec!["1\n2\n3", "4\n\n", "x\n", "5"]));
        let mut lines = PlainLines { reader, number: 0, bytes: Vec::new() };
        let mut seen = Vec::new();
        loop {
            let together: Vec<Line<u64>> = lines.together().expect("no pipe breaks here");
            if together.is_empty() {
                break;
            }
            seen.push(
                together
                    .into_iter()
                    .map(|line| match line {
                        Line::Id(id) => id.to_string(),
                        Line::Bad { number, .. } => format!("bad {number}"),
                    })
                    .collect::<Vec<_>>()
                    .join(" "),
            );
        }
        // What is left of a line is waited for only when what came before it is gone.
        assert_eq!(seen, ["1 2", "34", "bad 5", "5"]);
    }

    #[test]
    fn a_column_of_csv_is_taken_by_name() {
        let (_file, input) = file("name,id\n\"a,\nb\",7\nc,8\n", Some("id"));
        assert_eq!(read(&input), [7, 8]);
        let (_file, input) = file("name,id\na,7\n", Some("key"));
        let error = input.survey::<u64>().expect_err("no such column");
        assert_eq!(
            error.to_string(),
            "read column `key` of file `ids`: it has no such column, its columns are `name`, `id`"
        );
    }

    #[test]
    fn every_bad_line_is_found_before_anything_is_published() {
        let (_file, input) = file("1\nx\n3\n-4\n", None);
        let error = input.survey::<u64>().expect_err("two bad lines").to_string();
        assert!(error.contains("2 of its lines hold no id"), "{error}");
        assert!(error.contains("line 2: `x`") && error.contains("line 4: `-4`"), "{error}");
    }

    #[test]
    fn an_input_without_ids_is_refused() {
        let (_file, input) = file("\n\n", None);
        assert!(matches!(input.survey::<u64>(), Err(Error::NoIds { .. })));
    }

    #[test]
    fn the_fingerprint_follows_the_ids_and_not_the_file() {
        let (_a, a) = file("1\n2\n", None);
        let (_b, b) = file("2\n1", None);
        let (_c, c) = file("1\n3\n", None);
        let of = |input: &Input| input.survey::<u64>().expect("sound").0.fingerprint;
        assert_eq!(of(&a), of(&b));
        assert_ne!(of(&a), of(&c));
    }

    #[test]
    fn a_batch_is_cut_by_size_too() {
        let mut cutter = Cutter::new(100, 20);
        let mut cuts: Vec<Cut<u64>> = (0..5).filter_map(|id| cutter.push(id)).collect();
        cuts.extend(cutter.cut());
        assert_eq!(cuts.iter().map(|cut| cut.ids.len()).collect::<Vec<_>>(), [2, 2, 1]);
    }

    /// Of ten equal stretches of the input, the least and the most that the sample has of one.
    fn stretches(ids: &[u64], first: u64, all: u64) -> (usize, usize) {
        let mut counts = [0; 10];
        ids.iter().for_each(|id| counts[((id - first) * 10 / all) as usize] += 1);
        (*counts.iter().min().expect("ten"), *counts.iter().max().expect("ten"))
    }

    #[test]
    fn a_sample_lies_over_the_whole_input() {
        let (_, mut range) = Input::Range { first: 500, last: 1_000_499 }.survey::<u64>().expect("sound");
        for _ in 0..5 {
            let (least, most) = stretches(&range.take(100), 500, 1_000_000);
            assert!(least >= 8 && most <= 12, "{least} {most}");
        }
        let text: String = (0..50_000).map(|id| format!("{id}\n")).collect();
        let (_file, input) = file(&text, None);
        let (_, mut list) = input.survey::<u64>().expect("sound");
        let some = list.take(1000);
        let (least, most) = stretches(&some, 0, 50_000);
        assert!(least >= 60 && most <= 140, "{least} {most}");
        assert_ne!(list.take(1000), some);
        assert_eq!(list.take(1_000_000).len(), SAMPLED);
    }

    #[test]
    fn a_sample_of_few_ids_has_them_once_at_a_time() {
        let (_file, input) = file("7\n7\n9\n", None);
        let (_, mut list) = input.survey::<u64>().expect("sound");
        assert_eq!((list.take(50), list.take(50)), (vec![7, 9], vec![7, 9]));
        let (_, mut range) = Input::Range { first: u64::MAX, last: u64::MAX }.survey::<u64>().expect("sound");
        assert_eq!(range.take(8), [u64::MAX]);
    }

    proptest! {
        #[test]
        fn each_id_is_in_one_batch(ids in vec(0u64..500, 0..300), batch in 1u32..50, bytes in 8usize..500) {
            let mut cutter = Cutter::new(batch, bytes);
            let mut cuts: Vec<Cut<u64>> = ids.iter().filter_map(|id| cutter.push(*id)).collect();
            cuts.extend(cutter.cut());
            let repeats: u64 = cuts.iter().map(|cut| cut.repeats).sum();
            let batched: usize = cuts.iter().map(|cut| cut.ids.len()).sum();
            prop_assert_eq!(batched as u64 + repeats, ids.len() as u64);
            for cut in &cuts {
                prop_assert!(cut.ids.is_sorted_by(|a, b| a < b));
                prop_assert!(!cut.ids.is_empty() && cut.ids.len() <= batch as usize);
            }
            let mut all: Vec<u64> = cuts.into_iter().flat_map(|cut| cut.ids).collect();
            let mut given = ids;
            all.sort_unstable();
            all.dedup();
            given.sort_unstable();
            given.dedup();
            prop_assert_eq!(all, given);
        }
    }
}
