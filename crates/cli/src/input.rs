//! Ids from flags, files, standard input and queries.
//!
//! What cannot be read twice (standard input, a query's answer) is kept in a temporary file, so that every bad line is
//! found before anything is published, and memory does not depend on the number of ids.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::Context as _;
use millstream::Id;
use millstream::names::RunName;
use millstream_engine::Store;
use millstream_engine::error::Error;
use millstream_engine::source::{Input, Sample, Survey};

use crate::Usage;
use crate::args::{ProduceArgs, SourceArgs};
use crate::progress::Progress;

/// An input that was read once and found sound, and the temporary file behind it if there is one: it is removed when
/// this is dropped.
#[derive(Debug)]
pub(crate) struct Ids<I> {
    pub input: Input,
    pub survey: Survey,
    pub sample: Sample<I>,
    _kept: Option<Kept>,
}

/// The words of `--ids`, `--run` and `--batch`, checked before any server is looked for.
#[derive(Debug, Clone)]
pub(crate) struct Words {
    pub run: RunName,
    pub batch_ids: Option<u32>,
    pub priority: i8,
    pub rate: Option<u32>,
    range: Option<Input>,
}

impl Words {
    /// Checks the words.
    ///
    /// # Errors
    /// [`Usage`] with all that is wrong.
    pub fn check(args: &ProduceArgs) -> Result<Self, Usage> {
        let mut faults = Vec::new();
        let run = args.run.clone().unwrap_or_else(readable_name);
        let run = run.parse::<RunName>().map_err(|fault| faults.push(format!("--run: {fault}"))).ok();
        let batch_ids = parse_batch(&args.batch).map_err(|fault| faults.push(fault)).ok().flatten();
        let range = args.source.ids.as_deref().map(|text| parse_range("--ids", text)).transpose();
        let range = range.map_err(|fault| faults.push(fault)).ok().flatten();
        let range = range.map(|[first, last]| Input::Range { first, last });
        match run {
            Some(run) if faults.is_empty() => Ok(Self {
                run,
                batch_ids,
                priority: args.steer.priority.unwrap_or(0),
                rate: args.steer.rate.and_then(|rate| rate.0),
                range,
            }),
            _ if faults.len() == 1 => Err(Usage(faults.remove(0))),
            _ => Err(Usage(format!(
                "the command line has {} faults:\n  {}",
                faults.len(),
                faults.join("\n  ")
            ))),
        }
    }

    /// Reads the ids, unless ClickHouse has them: what is wrong with them is told before any server is started.
    pub async fn read<I: Id>(
        &self,
        args: &ProduceArgs,
        progress: &Progress,
    ) -> anyhow::Result<Option<Ids<I>>> {
        let (input, kept) = match (&self.range, &args.source) {
            (Some(range), _) => (range.clone(), None),
            (_, SourceArgs { query: Some(_), .. }) => return Ok(None),
            (_, SourceArgs { file: Some(path), .. }) => {
                let shown = format!("file `{}`", path.display());
                (Input::File { path: path.clone(), shown, column: args.column.clone() }, None)
            }
            _ => {
                let _step = progress.step("reading standard input");
                let kept = tokio::task::spawn_blocking(spool_stdin).await??;
                (Input::File { path: kept.path(), shown: "standard input".into(), column: None }, Some(kept))
            }
        };
        survey::<I>(input, kept, progress).await.map(Some)
    }

    /// Reads the ids that ClickHouse has.
    pub async fn ask<I: Id>(
        &self,
        args: &ProduceArgs,
        store: &Store,
        progress: &Progress,
    ) -> anyhow::Result<Ids<I>> {
        let query = args.source.query.as_deref().unwrap_or_default();
        let kept = {
            let _step = progress.step("reading the query's answer");
            spool_query::<I>(query, store).await?
        };
        let shown = format!("query `{}`", query.split_whitespace().collect::<Vec<_>>().join(" "));
        survey::<I>(Input::File { path: kept.path(), shown, column: None }, Some(kept), progress).await
    }
}

async fn survey<I: Id>(input: Input, kept: Option<Kept>, progress: &Progress) -> anyhow::Result<Ids<I>> {
    let long = matches!(input, Input::File { .. });
    let _step = long.then(|| progress.step(&format!("checking {}", input.shown())));
    let surveyed = input.clone();
    let (survey, sample) = tokio::task::spawn_blocking(move || surveyed.survey::<I>()).await??;
    Ok(Ids { input, survey, sample, _kept: kept })
}

/// `A..=B` or `A..B`: the first and the last number.
pub(crate) fn parse_range(flag: &str, text: &str) -> Result<[u64; 2], String> {
    let fault = |why: &str| format!("{flag}: `{text}` {why}");
    let (first, last) =
        text.split_once("..").ok_or_else(|| fault("is not a range like 1..=100 or 1..101"))?;
    let (last, inclusive) = last.strip_prefix('=').map_or((last, false), |last| (last, true));
    let number = |part: &str| {
        let digits = part.replace('_', "");
        digits
            .parse::<u64>()
            .map_err(|_| fault(&format!("has `{part}` where a whole number from 0 to 2^64-1 should be")))
    };
    let (first, end) = (number(first)?, number(last)?);
    let empty = || fault(if first == end { "is empty" } else { "is reversed: it ends before it begins" });
    let last = if inclusive { Some(end) } else { end.checked_sub(1) };
    last.filter(|last| first <= *last).map(|last| [first, last]).ok_or_else(empty)
}

fn parse_batch(text: &str) -> Result<Option<u32>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let most = millstream::MAX_BATCH_IDS;
    match text.replace('_', "").parse::<u32>() {
        Ok(batch) if (1..=most).contains(&batch) => Ok(Some(batch)),
        _ => Err(format!("--batch: `{text}` is neither `auto` nor a number in 1..={most}")),
    }
}

/// A name that can be said aloud, and is unlikely to have been used.
fn readable_name() -> String {
    const ADJECTIVES: [&str; 16] = [
        "amber", "brisk", "calm", "dusty", "eager", "fresh", "green", "hidden", "ivory", "jolly", "keen",
        "lucky", "mossy", "noble", "quiet", "rapid",
    ];
    const NOUNS: [&str; 16] = [
        "badger", "brook", "cedar", "crane", "ember", "falcon", "harbor", "heron", "island", "lantern",
        "maple", "meadow", "otter", "pebble", "raven", "willow",
    ];
    // Seeded by the system, and different at each call.
    let seed = RandomState::new().hash_one(0u8);
    let pick = |list: &[&'static str; 16], shift: u64| list[(seed >> shift) as usize % list.len()];
    format!("{}-{}-{:05x}", pick(&ADJECTIVES, 32), pick(&NOUNS, 48), seed & 0xfffff)
}

/// A temporary file without a name: it is gone with this process, however that ends.
#[derive(Debug)]
struct Kept(File);

impl Kept {
    fn new(what: &str) -> anyhow::Result<Self> {
        let file = tempfile::tempfile();
        file.map(Self).with_context(|| format!("failed to make a temporary file for {what}"))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

fn spool_stdin() -> anyhow::Result<Kept> {
    let mut kept = Kept::new("standard input")?;
    std::io::copy(&mut std::io::stdin().lock(), &mut kept.0).with_context(kept_where("standard input"))?;
    Ok(kept)
}

fn kept_where(what: &str) -> impl Fn() -> String {
    move || format!("failed to keep {what} in a temporary file in `{}`", std::env::temp_dir().display())
}

async fn spool_query<I: Id>(query: &str, store: &Store) -> anyhow::Result<Kept> {
    let columns = store.describe_query(query).await?;
    let fits = |kind: &str| kind == I::CLICKHOUSE || kind == format!("LowCardinality({})", I::CLICKHOUSE);
    let is_number = |kind: &str| I::CLICKHOUSE == "UInt64" && kind.starts_with("UInt") && kind.len() <= 6;
    if !matches!(&columns[..], [(_, kind)] if fits(kind) || is_number(kind)) {
        let found: Vec<String> = columns.iter().map(|(name, kind)| format!("`{name}` {kind}")).collect();
        return Err(Error::QueryColumns { found: found.join(", "), expected: I::CLICKHOUSE }.into());
    }
    let mut kept = Kept::new("the query's answer")?;
    let mut written = Ok(());
    let keep = |piece: bytes::Bytes| {
        if written.is_ok() {
            written = kept.0.write_all(&piece);
        }
    };
    store.sql(query.trim().trim_end_matches(';'), "TSVRaw", keep).await?;
    written.with_context(kept_where("the query's answer"))?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_with_and_without_their_end() {
        let table = [
            ("1..=100", [1, 100]),
            ("1..101", [1, 100]),
            ("0..=18446744073709551615", [0, u64::MAX]),
            ("1..=10_000_000", [1, 10_000_000]),
            ("7..=7", [7, 7]),
        ];
        for (text, range) in table {
            assert_eq!(parse_range("--ids", text), Ok(range));
        }
    }

    #[test]
    fn other_ranges_are_refused_with_the_reason() {
        let table = [
            ("5..5", "`5..5` is empty"),
            ("0..0", "`0..0` is empty"),
            ("9..=3", "`9..=3` is reversed"),
            ("9..3", "`9..3` is reversed"),
            ("1-5", "is not a range like 1..=100"),
            ("a..=5", "has `a` where a whole number"),
            ("1..=99999999999999999999", "has `99999999999999999999` where a whole number"),
            ("..5", "has `` where a whole number"),
        ];
        for (text, why) in table {
            let fault = parse_range("--ids", text).expect_err(text);
            assert!(fault.contains(why), "{fault}");
        }
    }

    #[test]
    fn a_name_that_is_made_up_is_legal() {
        assert!(readable_name().parse::<RunName>().is_ok());
    }
}
