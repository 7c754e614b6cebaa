//! What may be typed to name ids, and how a run of them is made.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use millstream_engine::control::steer::PRIORITIES;

use crate::units::Durations;

const LINGER: Durations = Durations::new(Duration::ZERO, Duration::from_secs(3600));

#[derive(Debug, Clone, Default, Args)]
#[group(id = "source", required = true, multiple = false)]
pub(crate) struct SourceArgs {
    /// A range of numbers: `1..=100` with its end, `1..101` without
    #[arg(long, group = "source", value_name = "RANGE")]
    pub ids: Option<String>,
    /// A file with one id a line; with --column, a CSV file. A pipe is kept in a temporary file, as --stdin is
    #[arg(long, group = "source", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Standard input, written as a --file is; it is kept in a temporary file until the run is published
    #[arg(long, group = "source")]
    pub stdin: bool,
    /// The one column that a query in ClickHouse answers, each value byte for byte, in the order of its values
    #[arg(long, group = "source", value_name = "SQL")]
    pub query: Option<String>,
}

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ProduceArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub column: ColumnArgs,
    /// Pass over lines that hold no id: they are counted, the first ten are shown, and FILE lists all; the exit code is 3
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    #[expect(clippy::option_option, reason = "clap's way to say that a flag may have a value")]
    pub skip_bad: Option<Option<PathBuf>>,
    /// An input without ids is a success, with nothing to do; without this the exit code is 4
    #[arg(long)]
    pub allow_empty: bool,
    /// Name of the run: 1 to 64 letters, digits, `-` and `_`; a readable one is made up without it
    #[arg(long, value_name = "NAME")]
    pub run: Option<String>,
    /// Ids a batch; `auto` times a sample of the ids, so that one host works two seconds on a batch [default: auto]
    #[arg(long, value_name = "auto|N", default_value = "auto", hide_default_value = true)]
    pub batch: String,
    #[command(flatten)]
    pub steer: SteerArgs,
    /// Pause the run once it has more dead letters than this, a number or a share of its ids: `100`, `0.5%`
    #[arg(long, value_name = "N|P%", value_parser = max_dead)]
    pub max_dead: Option<MaxDead>,
    /// A command for `sh -c` once the run is sealed or cancelled, with what it came to in MILLSTREAM_RUN, _PASS, _STATE,
    /// _IDS, _ROWS, _DEAD, _BAD, _SECONDS and _SUMMARY; with --allow-empty also when there are no ids: _STATE is `empty`
    #[arg(long, value_name = "COMMAND")]
    pub then: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Which column of CSV holds the ids.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ColumnArgs {
    /// The column of a CSV --file or --stdin that holds the ids, as its first line names it; its number with --no-header
    #[arg(long, value_name = "NAME")]
    pub column: Option<String>,
    /// What stands between two fields of CSV: one symbol, or `\t` [default: ,]
    #[arg(long, value_name = "SYMBOL", value_parser = delimiter)]
    pub delimiter: Option<u8>,
    /// The first line of CSV has ids, too, and no names: --column is a number, from 1
    #[arg(long)]
    pub no_header: bool,
}

fn delimiter(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        b"\\t" | b"tab" => Ok(b'\t'),
        [symbol] if !symbol.is_ascii_alphanumeric() && !matches!(symbol, b'"' | b'\n' | b'\r') => Ok(*symbol),
        _ => Err("it is one symbol such as , or ; or |, or \\t".into()),
    }
}

/// What may be changed of a run while it is computed, too.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SteerArgs {
    /// Priority, from -5 to 5: each step up doubles the run's share of the cores [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i8).range(*PRIORITIES.start() as i64..=*PRIORITIES.end() as i64))]
    pub priority: Option<i8>,
    /// Ids a second that the whole fleet begins at most, or `none` [default: none]
    #[arg(long, value_name = "N|none", value_parser = rate)]
    pub rate: Option<Rate>,
}

/// A limit in ids a second, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate(pub Option<u32>);

fn rate(text: &str) -> Result<Rate, String> {
    match text {
        "none" => Ok(Rate(None)),
        _ => match text.parse() {
            Ok(0) => Err("`0` would never let it end: `pause` holds a run back".into()),
            Ok(number) => Ok(Rate(Some(number))),
            Err(_) => Err("it is a number of ids a second, or `none`".into()),
        },
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PublishArgs {
    #[command(flatten)]
    pub produce: ProduceArgs,
    /// Publish the lines of --stdin as they come, until they end; lines that hold no id are passed over and reported
    // `requires` would be satisfied by whatever excludes it.
    #[arg(long, requires = "stdin", conflicts_with_all = ["ids", "file", "query", "then", "column", "delimiter", "no_header", "skip_bad"])]
    pub follow: bool,
    /// How long an id waits for others that go into the same batch, with --follow: `500ms`, `2s`, `1m` [default: 1s]
    #[arg(long, value_name = "TIME", default_value = "1s", hide_default_value = true, value_parser = |text: &str| LINGER.read(text))]
    pub linger: Duration,
    /// Wait until the run is sealed or cancelled, and print its summary; --then waits, too
    #[arg(long, conflicts_with = "follow")]
    pub wait: bool,
}

/// How many dead letters a run may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum MaxDead {
    /// So many.
    Ids(u64),
    /// This share of its ids.
    Percent(f64),
}

impl MaxDead {
    /// How many that are of so many ids.
    pub fn of(self, ids: u64) -> u64 {
        match self {
            Self::Ids(most) => most,
            Self::Percent(percent) => (ids as f64 * percent / 100.0) as u64,
        }
    }
}

fn max_dead(text: &str) -> Result<MaxDead, String> {
    let most = match text.strip_suffix('%') {
        Some(percent) => {
            percent.parse().ok().filter(|percent| (0.0..=100.0).contains(percent)).map(MaxDead::Percent)
        }
        None => text.parse().ok().map(MaxDead::Ids),
    };
    most.ok_or_else(|| "a number such as 100 is wanted, or a share such as 0.5%".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lingering_is_an_hour_at_most() {
        for (text, millis) in [("500ms", 500), ("0s", 0), ("2s", 2_000), ("1h", 3_600_000)] {
            assert_eq!(LINGER.read(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert!(LINGER.read("61m").is_err());
    }

    #[test]
    fn dead_letters_are_limited_by_number_or_share() {
        for (text, most) in [("0", 0), ("17", 17), ("1%", 10), ("0.5%", 5), ("100%", 1000)] {
            assert_eq!(max_dead(text).map(|most| most.of(1000)), Ok(most), "{text}");
        }
        for text in ["", "%", "-1", "101%", "NaN%", "1.5", "many"] {
            assert!(max_dead(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_delimiter_is_one_symbol() {
        for (text, symbol) in
            [(",", b','), (";", b';'), ("|", b'|'), ("\\t", b'\t'), ("\t", b'\t'), ("tab", b'\t')]
        {
            assert_eq!(delimiter(text), Ok(symbol), "{text}");
        }
        for text in ["", "::", "a", "\"", "\n", "§"] {
            assert!(delimiter(text).is_err(), "{text}");
        }
    }
}
