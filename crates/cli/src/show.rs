//! Numbers and errors for people. The only writer of stdout and stderr beside the logs and the progress line.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use millstream_engine::Error as EngineError;
use millstream_engine::clickhouse::store::ViewFault;
use millstream_engine::error::Code;
use millstream_engine::model::record::Timing;
use millstream_engine::produce::sample::{Bound, Choice};

/// What the operator has to know of materialized views that read the rows table.
pub(crate) const FED: &str = "materialized views read the rows table: they see rows of passes that are not sealed, too, and \
    rows of an insert that was repeated once more, so what they sum up has to bear both";

/// Writes a line to stdout.
pub(crate) fn line(text: &str) {
    write(format!("{}\n", plain(text)).as_bytes());
}

/// Writes the answer to a query to stdout: as it is, but for a terminal.
pub(crate) struct Answer {
    terminal: bool,
    /// The begin of a character whose end is yet to come.
    cut: Vec<u8>,
}

impl Answer {
    pub fn new() -> Self {
        Self { terminal: std::io::stdout().is_terminal(), cut: Vec::new() }
    }

    /// Writes the next piece.
    pub fn piece(&mut self, bytes: &[u8]) {
        if self.terminal { write(self.shown(bytes).as_bytes()) } else { write(bytes) }
    }

    fn shown(&mut self, bytes: &[u8]) -> String {
        self.cut.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.cut) {
            Err(fault) if fault.error_len().is_none() => fault.valid_up_to(),
            _ => self.cut.len(),
        };
        let cut = self.cut.split_off(whole);
        let whole = std::mem::replace(&mut self.cut, cut);
        plain(&String::from_utf8_lossy(&whole)).into_owned()
    }
}

/// Why stdout takes nothing more: nothing is written to it after that, and what is under way goes on to its end.
static LOST: Mutex<Option<std::io::Error>> = Mutex::new(None);

/// The one place that writes to stdout: not by `Stdout`, which takes a descriptor that cannot be written for one that is not read.
fn write(bytes: &[u8]) {
    if failed() {
        return;
    }
    let out = std::io::stdout().lock();
    let own = out.as_fd().try_clone_to_owned().map(File::from);
    if let Err(error) = own.and_then(|mut out| out.write_all(bytes)) {
        *LOST.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// Whether stdout takes nothing more, so that a command which only writes can end.
pub(crate) fn failed() -> bool {
    LOST.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Says why stdout could not be written, if that is an error: a reader that went away has seen enough.
pub(crate) fn tell_failed() -> bool {
    let lost = LOST.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(fault) = lost.filter(|fault| fault.kind() != ErrorKind::BrokenPipe) else { return false };
    let hint = match fault.kind() {
        ErrorKind::StorageFull => {
            "the output is cut off: make room where it goes, then give the command again"
        }
        _ => "what was to be done is done: give the command an output that can be written, such as > FILE",
    };
    error("failed to write to standard output", &[fault.to_string()], Some(hint), Some(Code::OutputLost));
    true
}

/// Help and version, as clap words and colours them.
pub(crate) fn help(text: &clap::Error) {
    let text = text.render();
    if std::io::stdout().is_terminal() {
        write(text.ansi().to_string().as_bytes())
    } else {
        write(text.to_string().as_bytes())
    }
}

/// A JSON value on one line.
pub(crate) fn json(value: &impl serde::Serialize) {
    line(&json_text(value));
}

/// What serde leaves as it is and a terminal does not is spelt out: it can only be within a string.
fn json_text(value: &impl serde::Serialize) -> String {
    let text = serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    spelt_out(&text, |_| true, |symbol| format!("\\u{:04x}", u32::from(symbol))).into_owned()
}

/// Text as a terminal may have it. Ids, errors and names come from elsewhere, and must not move its cursor, recolour
/// what follows, or turn it round: control characters but for line ends and tabs, and what changes the direction of
/// writing, are shown as Rust spells them.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    spelt_out(text, |symbol| !matches!(symbol, '\n' | '\t'), |symbol| symbol.escape_default().to_string())
}

/// The same for one cell of a table, which is one line.
pub(crate) fn cell(text: &str) -> Cow<'_, str> {
    spelt_out(text, |_| true, |symbol| symbol.escape_default().to_string())
}

fn spelt_out(text: &str, among: impl Fn(char) -> bool, spell: impl Fn(char) -> String) -> Cow<'_, str> {
    let steers = |symbol: char| steers_terminal(symbol) && among(symbol);
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for symbol in text.chars() {
        if steers(symbol) { shown.push_str(&spell(symbol)) } else { shown.push(symbol) }
    }
    Cow::Owned(shown)
}

/// Controls, separators of lines, and the marks of bidirectional text
/// (<https://www.unicode.org/reports/tr9/#Directional_Formatting_Characters>).
fn steers_terminal(symbol: char) -> bool {
    let turns = matches!(symbol, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    symbol.is_control() || turns || matches!(symbol, '\u{2028}' | '\u{2029}')
}

/// A note to the person, on stderr.
pub(crate) fn note(text: &str) {
    painted(&plain(text));
}

fn painted(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

/// One error with its causes and what to do about it.
pub(crate) fn report(error: &anyhow::Error) {
    let text = failure(error);
    // What was wrong with the words that were typed, and what to type instead, is one text.
    match text.split_once("\nhint: ") {
        Some((text, hint)) => self::error(text, &causes(error), Some(hint), code(error)),
        None => self::error(&text, &causes(error), hint(error).as_deref(), code(error)),
    }
}

/// What failed, without its causes.
pub(crate) fn failure(error: &anyhow::Error) -> String {
    let engine = error.is::<EngineError>();
    #[cfg(feature = "local")]
    let engine = engine || error.is::<millstream_local::Error>();
    if engine { format!("failed to {error}") } else { error.to_string() }
}

/// Why, the nearest cause first. Libraries like to repeat their cause in their own text: then it is left away.
pub(crate) fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut last = error.to_string();
    let mut causes = Vec::new();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !cause.is_empty() && !last.ends_with(&cause) {
            causes.push(cause.clone());
        }
        last = cause;
    }
    causes
}

/// What to do about it.
pub(crate) fn hint(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        let hint = cause.downcast_ref::<EngineError>().and_then(EngineError::hint);
        #[cfg(feature = "local")]
        let hint = hint.or_else(|| cause.downcast_ref::<millstream_local::Error>()?.hint());
        hint
    })
}

/// The row of README's table of troubles that says more about it.
pub(crate) fn code(error: &anyhow::Error) -> Option<Code> {
    error.chain().find_map(|cause| {
        let waits = cause.downcast_ref::<NothingWorks>().map(|_| Code::StackNotUp);
        waits.or_else(|| cause.downcast_ref::<EngineError>()?.code())
    })
}

/// A command that waits for others, on a local stack that it has started itself, to which no other process can come
/// meanwhile, not even `up`.
#[derive(Debug, thiserror::Error)]
#[error(
    "failed to wait for run `{run}`: the local stack of `{data}` is not up, so that no process works on it\n\
     hint: start `up`, `work` and `sink` first; or the same `run` again, which goes on with it"
)]
pub(crate) struct NothingWorks {
    /// The run.
    pub run: String,
    /// The data directory.
    pub data: String,
}

/// Prints `error:`, the causes below each other, `hint:`; the code stands behind the hint, or the error where there is none.
pub(crate) fn error(text: &str, causes: &[String], hint: Option<&str>, code: Option<Code>) {
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let paint =
        |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let marked = |text: &str| code.map_or_else(|| text.to_owned(), |code| code.mark(text));
    let text = if hint.is_some() { text.to_owned() } else { marked(text) };
    let mut shown = format!("{} {}", paint("1;31", "error:"), plain(&text));
    for cause in causes {
        shown.push_str(&format!("\n  {}", plain(cause).replace('\n', "\n  ")));
    }
    if let Some(hint) = hint {
        shown.push_str(&format!("\n{} {}", paint("1;36", "hint:"), plain(&marked(hint))));
    }
    painted(&shown);
}

/// 1234567 as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// A number in at most five symbols: 1234567 as `1.23M`, below 10,000 as it is.
pub(crate) fn short(number: u64) -> String {
    const UNITS: [(u64, &str); 6] = [
        (1_000_000_000_000_000_000, "E"),
        (1_000_000_000_000_000, "P"),
        (1_000_000_000_000, "T"),
        (1_000_000_000, "G"),
        (1_000_000, "M"),
        (1_000, "k"),
    ];
    let Some((unit, letter)) = UNITS.into_iter().find(|(unit, _)| number >= 10_000.max(*unit)) else {
        return grouped(number);
    };
    // Cut, not rounded: what is not done yet must not look done.
    let whole = number / unit;
    let hundredths = number % unit / (unit / 100);
    match whole {
        0..10 => format!("{whole}.{hundredths:02}{letter}"),
        10..100 => format!("{whole}.{}{letter}", hundredths / 10),
        _ => format!("{whole}{letter}"),
    }
}

/// Seconds as a clock shows them: `0:42`, `3:05`, `2:07:00`.
pub(crate) fn clock(seconds: f64) -> String {
    let whole = seconds.ceil() as u64;
    match whole {
        0..3600 => format!("{}:{:02}", whole / 60, whole % 60),
        _ => format!("{}:{:02}:{:02}", whole / 3600, whole % 3600 / 60, whole % 60),
    }
}

/// Seconds in words: `42 s`, `3 min 5 s`, `2 h 7 min`.
///
/// Not as `humantime` prints them, which is exact to the nanosecond: `3m 5s 234ms 12us 31ns`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Nanoseconds in words: `640 ns`, `4.2 µs`, `0.95 ms`, `1.3 s`.
pub(crate) fn nanos(nanos: u64) -> String {
    let nanos = nanos as f64;
    let (number, unit) = match nanos {
        0.0..950.0 => return format!("{nanos} ns"),
        950.0..950e3 => (nanos / 1e3, "µs"),
        950e3..950e6 => (nanos / 1e6, "ms"),
        _ => (nanos / 1e9, "s"),
    };
    match number {
        0.0..1.0 => format!("{number:.2} {unit}"),
        1.0..10.0 => format!("{number:.1} {unit}"),
        _ => format!("{number:.0} {unit}"),
    }
}

/// Which size of batches was chosen, and why.
pub(crate) fn choice(choice: &Choice) -> String {
    let Choice { batch_ids, threads, bound, timing, untimed } = choice;
    let size = format!("batches of {}: ", counted(u64::from(*batch_ids), "id"));
    let shared = "so that hosts can share the run";
    let Some(Timing { ids, id_nanos, id_bytes, row_bytes, raw_bytes }) = *timing else {
        let why = untimed.as_ref().map(|why| format!("the function could not be timed ({why}), "));
        return format!("{size}{}{shared}", why.unwrap_or_default());
    };
    let cores = counted(*threads as u64, "core");
    let costs = match ids {
        0 => format!("an id takes more than {}", nanos(id_nanos)),
        _ => format!("an id takes {}", nanos(id_nanos)),
    };
    let works = nanos(id_nanos * u64::from(*batch_ids) / *threads as u64);
    let works = format!("one host of {cores} works {works} on a batch");
    let bytes = |number| counted(number, "byte");
    match bound {
        Bound::Time => format!("{size}{costs}, so {works}"),
        Bound::Sharing => format!("{size}{shared}; {costs}, {works}"),
        Bound::Ids => format!("{size}a batch has no more; {costs}, {works}"),
        Bound::IdBytes => {
            format!("{size}a message takes no more of {} each; {costs}, {works}", bytes(id_bytes))
        }
        Bound::RowBytes => {
            format!("{size}a message takes no more rows of {} each; {costs}, {works}", bytes(row_bytes))
        }
        Bound::InsertBytes => {
            format!("{size}an insert takes no more rows of {} each; {costs}, {works}", bytes(raw_bytes))
        }
    }
}

/// Which rows a materialized view did not get, or may not have got.
pub(crate) fn view_fault(fault: &ViewFault) -> String {
    let ViewFault { run, pass, view, error, batches, .. } = fault;
    let of = if *batches == 1 { "batch" } else { "batches" };
    format!(
        "view {view} may lack the rows of {} {of} of run `{run}`, pass {pass}: {error}",
        grouped(*batches)
    )
}

/// That a pass was sealed without what the pipeline's author wanted to know of it.
pub(crate) fn summary_fault(fault: &str) -> String {
    format!("the pipeline's SUMMARY failed, and the pass was sealed without it: {fault}")
}

/// Codes on one line, and where they are explained; nothing where there are none.
pub(crate) fn codes(codes: &BTreeSet<Code>) -> Option<String> {
    let named: Vec<String> = codes.iter().map(Code::to_string).collect();
    (!named.is_empty()).then(|| format!("{}: see \"When something fails\" in README.md", named.join(", ")))
}

/// `1 id`, `4,200 ids`.
pub(crate) fn counted(number: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(number), if number == 1 { "" } else { "s" })
}

/// Rows of text as a table: columns as wide as their widest cell, numbers to the right.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let columns = head.len();
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|text| cell(text).into_owned()).collect()).collect();
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([head[column].len()]).max().unwrap_or(0)
    };
    let numeric = |column: usize| {
        !rows.is_empty()
            && rows.iter().all(|row| row[column].starts_with(|symbol: char| symbol.is_ascii_digit()))
    };
    let shape: Vec<(usize, bool)> = (0..columns).map(|column| (width(column), numeric(column))).collect();
    let head: Vec<String> = head.iter().map(|name| (*name).to_owned()).collect();
    std::iter::once(&head)
        .chain(&rows)
        .map(|row| {
            let cells = row.iter().zip(&shape).map(|(cell, (width, numeric))| {
                if *numeric { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (number, shown) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(grouped(number), shown);
        }
    }

    #[test]
    fn short_numbers_take_five_symbols() {
        let table = [
            (0, "0"),
            (9_999, "9,999"),
            (10_000, "10.0k"),
            (999_999, "999k"),
            (1_000_000, "1.00M"),
            (9_999_999, "9.99M"),
            (12_345_678, "12.3M"),
            (u64::MAX, "18.4E"),
        ];
        for (number, shown) in table {
            assert_eq!(short(number), shown);
        }
    }

    #[test]
    fn clocks_show_seconds() {
        for (seconds, shown) in [(0.2, "0:01"), (42.0, "0:42"), (185.0, "3:05"), (7620.0, "2:07:00")] {
            assert_eq!(clock(seconds), shown);
        }
    }

    #[test]
    fn durations_are_as_said() {
        for (seconds, shown) in
            [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (185.0, "3 min 5 s"), (7620.0, "2 h 7 min")]
        {
            assert_eq!(duration(seconds), shown);
        }
    }

    #[test]
    fn nanoseconds_are_as_said() {
        let table = [
            (640, "640 ns"),
            (4_230, "4.2 µs"),
            (12_600, "13 µs"),
            (950_000, "0.95 ms"),
            (1_300_000_000, "1.3 s"),
            (0, "0 ns"),
        ];
        for (number, shown) in table {
            assert_eq!(nanos(number), shown);
        }
    }

    #[test]
    fn a_size_says_why() {
        let timing = Timing { ids: 900, id_nanos: 950_000, id_bytes: 8, row_bytes: 4_000, raw_bytes: 9_000 };
        let told = |batch_ids, bound, timing, untimed: Option<&str>| {
            choice(&Choice { batch_ids, threads: 2, bound, timing, untimed: untimed.map(str::to_owned) })
        };
        assert_eq!(
            told(4_200, Bound::Time, Some(timing), None),
            "batches of 4,200 ids: an id takes 0.95 ms, so one host of 2 cores works 2.0 s on a batch"
        );
        assert_eq!(
            told(1_000, Bound::RowBytes, Some(timing), None),
            "batches of 1,000 ids: a message takes no more rows of 4,000 bytes each; an id takes 0.95 ms, one host of 2 \
             cores works 475 ms on a batch"
        );
        assert_eq!(
            told(1, Bound::Time, Some(Timing { ids: 0, id_nanos: 5_000_000_000, ..timing }), None),
            "batches of 1 id: an id takes more than 5.0 s, so one host of 2 cores works 2.5 s on a batch"
        );
        assert_eq!(
            told(39, Bound::Sharing, None, Some("every id of the sample became a dead letter")),
            "batches of 39 ids: the function could not be timed (every id of the sample became a dead letter), so that \
             hosts can share the run"
        );
        assert_eq!(told(1, Bound::Sharing, None, None), "batches of 1 id: so that hosts can share the run");
    }

    #[test]
    fn tables_line_up() {
        let rows = vec![vec!["a".to_owned(), "1,000".to_owned()], vec!["long".to_owned(), "7".to_owned()]];
        assert_eq!(table(&["run", "ids"], &rows), "run     ids\na     1,000\nlong      7");
    }

    #[test]
    fn text_from_elsewhere_cannot_steer_the_terminal() {
        let table = [
            ("plain, ünïcode 👩‍🔬 \\ and\n\tlines", "plain, ünïcode 👩‍🔬 \\ and\n\tlines"),
            ("\u{1b}[2J\u{1b}]0;title\u{7}", "\\u{1b}[2J\\u{1b}]0;title\\u{7}"),
            ("over\rwritten\u{8}", "over\\rwritten\\u{8}"),
            ("\u{9b}31mred \u{7f}", "\\u{9b}31mred \\u{7f}"),
            ("\u{202e}dlrow\u{2066} \u{2028}", "\\u{202e}dlrow\\u{2066} \\u{2028}"),
        ];
        for (text, shown) in table {
            assert_eq!(plain(text), shown);
        }
        assert_eq!(cell("a\nb\tc"), "a\\nb\\tc");
    }

    #[test]
    fn a_cell_stays_one_line_and_its_column_straight() {
        let rows =
            vec![vec!["a\nb".to_owned(), "x".to_owned()], vec!["\u{1b}[1m".to_owned(), "y".to_owned()]];
        assert_eq!(table(&["id", "error"], &rows), "id         error\na\\nb       x\n\\u{1b}[1m  y");
    }

    #[test]
    fn json_keeps_its_meaning_without_what_steers() {
        let text = "\u{1b}\u{9b}\u{7f}\u{202e}\n\"\\";
        let shown = json_text(&text);
        assert!(!shown.contains(steers_terminal), "{shown}");
        assert_eq!(serde_json::from_str::<String>(&shown).expect("JSON"), text);
    }

    #[test]
    fn an_answer_in_pieces_is_shown_as_if_whole() {
        let text = "─ ü \u{9b}1m \u{1b}[0m\n".as_bytes();
        for piece in 1..=text.len() {
            let mut answer = Answer { terminal: true, cut: Vec::new() };
            let shown: String = text.chunks(piece).map(|piece| answer.shown(piece)).collect();
            assert_eq!(shown, "─ ü \\u{9b}1m \\u{1b}[0m\n", "{piece}");
        }
    }
}
