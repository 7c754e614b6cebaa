//! The words that say which ids a run has, checked before any server is looked for.

use std::hash::{BuildHasher, RandomState};

use millstream::names::RunName;
use millstream_engine::produce::input::{At, Column, Form, Input};

use crate::Usage;
use crate::args::{ColumnArgs, MaxDead, ProduceArgs};

/// The words of `--ids`, `--column`, `--run` and `--batch`.
#[derive(Debug, Clone)]
pub(crate) struct Words {
    pub run: RunName,
    pub batch_ids: Option<u32>,
    pub priority: i8,
    pub max_dead: Option<MaxDead>,
    pub rate: Option<u32>,
    pub(super) range: Option<Input>,
    pub(super) form: Form,
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
        let form = form(args).map_err(|fault| faults.push(fault)).unwrap_or(Form::Lines);
        faults.extend(args.source.query.as_deref().and_then(format_of));
        if args.source.file.as_deref().is_some_and(|path| path.as_os_str() == "-") {
            faults.push("--file: `-` is no file here; --stdin reads standard input".to_owned());
        }
        match run {
            Some(run) if faults.is_empty() => Ok(Self {
                run,
                batch_ids,
                priority: args.steer.priority.unwrap_or(0),
                max_dead: args.max_dead,
                rate: args.steer.rate.and_then(|rate| rate.0),
                range,
                form,
            }),
            _ if faults.len() == 1 => Err(Usage(faults.remove(0))),
            _ => Err(Usage(format!(
                "the command line has {} faults:\n  {}",
                faults.len(),
                faults.join("\n  ")
            ))),
        }
    }
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
    let first = number(first)?;
    let end = number(last)?;
    let empty = || fault(if first == end { "is empty" } else { "is reversed: it ends before it begins" });
    let last = if inclusive { Some(end) } else { end.checked_sub(1) };
    last.filter(|last| first <= *last).map(|last| [first, last]).ok_or_else(empty)
}

/// What is wrong with a query that says how its answer is to be written.
fn format_of(query: &str) -> Option<String> {
    let mut words = query.trim_end().trim_end_matches(';').split_whitespace().rev();
    let format = words.next()?;
    let word = words.next()?;
    word.eq_ignore_ascii_case("format").then(|| {
        format!("--query: `{word} {format}` has no place here, every value is read as it is: leave it out")
    })
}

/// How ids are written in a file.
fn form(args: &ProduceArgs) -> Result<Form, String> {
    let ColumnArgs { column, delimiter, no_header } = &args.column;
    let Some(column) = column else {
        return match (delimiter, no_header) {
            (None, false) => Ok(Form::Lines),
            (Some(_), _) => Err("--delimiter is for CSV, whose column --column names".to_owned()),
            (None, true) => {
                Err("--no-header is for CSV, whose column --column names by its number".to_owned())
            }
        };
    };
    if args.source.file.is_none() && !args.source.stdin {
        return Err("--column is for CSV in a --file or on --stdin".to_owned());
    }
    let at = if *no_header {
        match column.parse() {
            Ok(number) if number > 0 => At::Number(number),
            _ => return Err(format!("--column: `{column}` is not a number from 1, as --no-header wants it")),
        }
    } else {
        At::Name(column.clone())
    };
    Ok(Form::Column(Column { at, delimiter: delimiter.unwrap_or(b',') }))
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
    fn a_query_has_no_format() {
        assert!(format_of("SELECT 1 format CSV ;").is_some_and(|fault| fault.contains("`format CSV`")));
        for query in ["SELECT format('{}', id) FROM t", "SELECT 1", "", "FORMAT"] {
            assert_eq!(format_of(query), None);
        }
    }

    #[test]
    fn a_name_that_is_made_up_is_legal() {
        assert!(readable_name().parse::<RunName>().is_ok());
    }
}
