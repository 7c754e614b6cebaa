//! Where a run's ids come from, and how they become batches.
//!
//! Input is read twice: first to find every bad line and to compute count and digest, before anything is published;
//! then to publish. Neither reading keeps more than one batch; the first also draws a bounded sample, on which the
//! function is timed. The second reading sees exactly the bytes of the first, or fails (`blocks`).
//!
//! An id is taken byte for byte, or refused with its line and the reason (`text`). Ids come as lines (`lines`), as a
//! column of CSV (`fields`), or as a query's answer (`rows`).

mod blocks;
mod cut;
mod fields;
mod lines;
mod rows;
mod sample;
mod text;

use std::fs::File;
use std::io;
use std::sync::Arc;

use millstream::Id;
use tokio::sync::oneshot;

use crate::error::Error;
use crate::model::id_digest::IdDigest;
use blocks::{Blocks, Seen};
use fields::{Fields, NoFields};
use lines::PlainLines;
use rows::Rows;

pub use cut::{Cut, Cutter};
pub use fields::{At, Column};
pub use lines::{Lines, feed};
pub use rows::Value;
pub use sample::Sample;

/// How many bad lines an error shows.
pub const SHOWN_FAULTS: usize = 10;

/// The ids of a run as the user gave them.
#[derive(Debug, Clone)]
pub enum Input {
    /// Numbers from `first` to `last`, both included.
    Range {
        /// The first.
        first: u64,
        /// The last, not before the first.
        last: u64,
    },
    /// A file that can be read twice.
    File {
        /// The open file, so that another file under its name does not matter.
        file: Arc<File>,
        /// Its name in messages: the path, or `standard input`.
        shown: String,
        /// How the file holds ids.
        form: Form,
    },
}

/// How a file holds ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// One id a line.
    Lines,
    /// One id a record, in a column of CSV.
    Column(Column),
    /// A query's answer in RowBinary.
    Rows(Value),
}

/// What a producer knows of an input before it publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// The ids in words.
    pub source: String,
    /// Equal for equal sets of ids.
    pub fingerprint: String,
    /// How many ids there are, including repeats.
    pub ids: u64,
    /// Whether an id can occur twice.
    pub may_repeat: bool,
    /// Wrapping sum of `sipHash64(id)`, including repeats; `None` for a range, whose ends identify its ids.
    pub digest: Option<u64>,
    /// Empty lines, which are skipped.
    pub blank: u64,
    /// Lines without an id, skipped because the user allowed it.
    pub bad: u64,
    /// The first bad lines, by number and fault.
    pub first_bad: Vec<(u64, String)>,
    /// Hashes of the bytes that were read, which the second reading checks.
    seen: Option<Arc<Seen>>,
}

/// Ids one after the other, as the producer publishes them.
pub type Ids<I> = Box<dyn Iterator<Item = Result<I, Error>> + Send>;

impl Input {
    /// The input that has one id in each line of `file`.
    pub fn lines(file: File, shown: impl Into<String>) -> Self {
        Self::File { file: Arc::new(file), shown: shown.into(), form: Form::Lines }
    }

    /// The input in words.
    pub fn shown(&self) -> String {
        match self {
            Self::Range { first, last } => format!("ids {first}..={last}"),
            Self::File { shown, form: Form::Column(Column { at: At::Name(name), .. }), .. } => {
                format!("column `{name}` of {shown}")
            }
            Self::File { shown, form: Form::Column(Column { at: At::Number(number), .. }), .. } => {
                format!("column {number} of {shown}")
            }
            Self::File { shown, .. } => shown.clone(),
        }
    }

    /// Reads the whole input, but keeps only a sample. Blocks.
    ///
    /// # Errors
    /// [`Error::BadLines`] with the first bad lines and their number; [`Error::NoIds`], [`Error::NoColumn`],
    /// [`Error::Input`].
    pub fn survey<I: Id>(&self) -> Result<(Survey, Sample<I>), Error> {
        let (survey, sample) = self.survey_with(|_, _| Ok(()))?;
        match survey.bad {
            0 => Ok((survey, sample)),
            _ => Err(self.bad_lines(&survey)),
        }
    }

    /// Reads like [`Self::survey`], but skips lines without an id, and reports each to `bad` by number and fault.
    /// Blocks.
    ///
    /// # Errors
    /// Errors of [`Self::survey`]; [`Error::BadLines`] only if no line holds an id; errors of `bad`.
    pub fn survey_past_bad<I: Id>(
        &self,
        bad: impl FnMut(u64, &str) -> Result<(), Error>,
    ) -> Result<(Survey, Sample<I>), Error> {
        let (mut survey, sample) = self.survey_with(bad)?;
        if survey.bad > 0 {
            let lines = if survey.bad == 1 { "line" } else { "lines" };
            survey.source += &format!(" but for {} bad {lines}", survey.bad);
        }
        Ok((survey, sample))
    }

    fn survey_with<I: Id>(
        &self,
        mut bad: impl FnMut(u64, &str) -> Result<(), Error>,
    ) -> Result<(Survey, Sample<I>), Error> {
        let mut survey = Survey {
            source: self.shown(),
            fingerprint: self.shown(),
            ids: 0,
            may_repeat: true,
            digest: None,
            blank: 0,
            bad: 0,
            first_bad: Vec::new(),
            seen: None,
        };
        let file = match self {
            Self::Range { first, last } => {
                let too_many = || Error::TooManyBatches { input: self.shown() };
                survey.ids = (last - first).checked_add(1).ok_or_else(too_many)?;
                survey.may_repeat = false;
                let sample = Sample::of_range(*first, survey.ids);
                return Ok((survey, sample));
            }
            Self::File { file, .. } => file,
        };
        let mut sample = Sample::of_list();
        let mut listed = IdDigest::default();
        let mut reader = self.reader::<I>(Blocks::see(file.clone()))?;
        while let Some(line) = reader.next::<I>().map_err(|source| self.unreadable(source))? {
            match line {
                Line::Id(id) => {
                    listed.add(&id);
                    sample.offer(id, survey.ids);
                    survey.ids += 1;
                }
                Line::Bad { number, fault } => {
                    bad(number, &fault)?;
                    survey.bad += 1;
                    if survey.first_bad.len() < SHOWN_FAULTS {
                        survey.first_bad.push((number, fault));
                    }
                }
            }
        }
        survey.blank = reader.blank();
        survey.seen = Some(Arc::new(reader.into_blocks().into_seen()));
        survey.digest = Some(listed.digest);
        survey.fingerprint = listed.to_string();
        match (survey.ids, survey.bad) {
            (0, 0) => Err(Error::NoIds { input: survey.source }),
            (0, _) => Err(self.bad_lines(&survey)),
            _ => Ok((survey, sample)),
        }
    }

    /// The surveyed ids, one after the other. Blocks.
    ///
    /// # Errors
    /// [`Error::Input`] when the input cannot be read any more, or has changed.
    pub fn ids<I: Id>(&self, survey: &Survey) -> Result<Ids<I>, Error> {
        let file = match self {
            Self::Range { first, last } => {
                return Ok(Box::new((*first..=*last).map(|number| Ok(I::from_number(number)))));
            }
            Self::File { file, .. } => file.clone(),
        };
        let input = self.clone();
        let mut reader = self.reader::<I>(Blocks::check(file, survey.seen.clone().unwrap_or_default()))?;
        Ok(Box::new(std::iter::from_fn(move || {
            loop {
                match reader.next::<I>() {
                    Ok(Some(Line::Id(id))) => return Some(Ok(id)),
                    // The survey counted and skipped this line.
                    Ok(Some(Line::Bad { .. })) => {}
                    Ok(None) => return None,
                    Err(source) => return Some(Err(input.unreadable(source))),
                }
            }
        })))
    }

    fn reader<I: Id>(&self, blocks: Blocks) -> Result<Reader, Error> {
        let Self::File { form, .. } = self else { return Ok(Reader::Lines(PlainLines::new(blocks))) };
        Ok(match form {
            Form::Lines => Reader::Lines(PlainLines::new(blocks)),
            Form::Rows(value) => Reader::Rows(Rows::new(blocks, *value)),
            Form::Column(column) => {
                let opened = Fields::open::<I>(blocks, column);
                Reader::Fields(Box::new(opened.map_err(|fault| match fault {
                    NoFields::Read(source) => self.unreadable(source),
                    NoFields::Column(fault) => Error::NoColumn { input: self.shown(), fault },
                })?))
            }
        })
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::Input { input: self.shown(), source }
    }

    fn bad_lines(&self, survey: &Survey) -> Error {
        let of = match self {
            Self::File { form: Form::Rows(_), .. } => "row",
            _ => "line",
        };
        Error::BadLines { input: self.shown(), of, count: survey.bad, first: survey.first_bad.clone() }
    }
}

/// Runs blocking work on a thread of its own that ends with the work or with the process. Not on a tokio thread: tokio
/// waits for its threads at the end, and nothing can interrupt a read.
///
/// # Errors
/// When the system gives no thread; when the work panicked.
pub fn aside<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = io::Result<T>> {
    let (sender, receiver) = oneshot::channel();
    // The work begins now, not at the first await.
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // A caller that is gone wants no answer.
        drop(sender.send(work()));
    });
    async {
        started?;
        receiver.await.map_err(|_| io::Error::other("the thread that reads it panicked"))
    }
}

/// The ends of the range that a source or fingerprint names, in the form of [`Input::shown`].
pub(crate) fn range_in(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("ids ")?.split_once("..=")?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// A line of an input.
#[derive(Debug)]
pub enum Line<I> {
    /// An id.
    Id(I),
    /// No id.
    Bad {
        /// The number of the line, from 1.
        number: u64,
        /// Why the line is no id.
        fault: String,
    },
}

impl<I> Line<I> {
    fn of(number: u64, id: Result<I, String>) -> Self {
        match id {
            Ok(id) => Self::Id(id),
            Err(fault) => Self::Bad { number, fault },
        }
    }
}

/// A reader for any form of ids.
enum Reader {
    Lines(PlainLines<Blocks>),
    Fields(Box<Fields<Blocks>>),
    Rows(Rows<Blocks>),
}

impl Reader {
    fn next<I: Id>(&mut self) -> io::Result<Option<Line<I>>> {
        match self {
            Self::Lines(lines) => lines.next(),
            Self::Fields(fields) => fields.next(),
            Self::Rows(rows) => rows.next(),
        }
    }

    fn blank(&self) -> u64 {
        match self {
            Self::Lines(lines) => lines.blank,
            Self::Fields(fields) => fields.blank,
            Self::Rows(_) => 0,
        }
    }

    fn into_blocks(self) -> Blocks {
        match self {
            Self::Lines(lines) => lines.into_reader(),
            Self::Fields(fields) => fields.into_reader(),
            Self::Rows(rows) => rows.into_reader(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::sample::SAMPLED;
    use super::*;
    use crate::model::input_fault::ReadFault;

    fn file(text: &str, column: Option<&str>) -> (File, Input) {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("written");
        let form = match column {
            None => Form::Lines,
            Some(name) => Form::Column(Column { at: At::Name(name.to_owned()), delimiter: b',' }),
        };
        let shared = Arc::new(file.try_clone().expect("a second handle"));
        (file, Input::File { file: shared, shown: "file `ids`".into(), form })
    }

    fn read(input: &Input) -> Vec<u64> {
        let (survey, _) = input.survey::<u64>().expect("sound");
        input.ids(&survey).expect("opens").map(|id| id.expect("an id")).collect()
    }

    #[test]
    fn a_file_has_one_id_a_line() {
        let (_file, input) = file("3\r\n\n 1 \n2", None);
        assert_eq!(read(&input), [3, 1, 2]);
        assert_eq!(input.survey::<u64>().expect("sound").0.ids, 3);
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

    /// The least and the most that a sample has of any of ten equal stretches of the input.
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

    #[test]
    fn bad_lines_are_passed_over_where_the_user_says_so() {
        let (_file, input) = file("1\nx\n3\n", None);
        let mut reported = Vec::new();
        let (survey, _) = input
            .survey_past_bad::<u64>(|line, _| {
                reported.push(line);
                Ok(())
            })
            .expect("two ids");
        assert_eq!((survey.ids, survey.bad, survey.first_bad[0].0), (2, 1, 2));
        assert_eq!((reported, &*survey.source), (vec![2], "file `ids` but for 1 bad line"));
        let ids: Vec<u64> = input.ids(&survey).expect("opens").map(|id| id.expect("an id")).collect();
        assert_eq!(ids, [1, 3]);
        // A whole file without an id is the wrong file.
        let (_file, input) = file("x\ny\n", None);
        assert!(matches!(input.survey_past_bad::<u64>(|_, _| Ok(())), Err(Error::BadLines { count: 2, .. })));
    }

    #[test]
    fn what_is_published_is_what_was_surveyed() {
        let (mut file, input) = file("1\n2\n", None);
        let (survey, _) = input.survey::<u64>().expect("sound");
        file.write_all(b"3\n").expect("written");
        let ids = |survey| input.ids::<u64>(survey).expect("opens").collect::<Result<Vec<u64>, Error>>();
        // Later lines belong to another run.
        assert_eq!(ids(&survey).expect("the same"), [1, 2]);
        file.set_len(2).expect("cut");
        let error = ids(&survey).expect_err("shorter");
        assert!(
            matches!(&error, Error::Input { source, .. } if ReadFault::of(source) == Some(&ReadFault::Changed))
        );
    }
}
