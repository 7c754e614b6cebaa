//! What errors say, put into words.

use std::fmt::Write as _;

use super::Error;

pub(super) fn refused_types(faults: &[(String, String, String)]) -> String {
    let told = faults.iter().map(|(name, kind, words)| format!("column `{name}` of type {kind}: {words}"));
    told.collect::<Vec<_>>().join("\n  ")
}

pub(super) fn are(names: &[String]) -> String {
    format!("{} {}", quoted(names), if names.len() == 1 { "is" } else { "are" })
}

pub(super) fn held(of: &str, lines: u64) -> String {
    if lines == 1 { format!("a {of} of it holds") } else { format!("{lines} of its {of}s hold") }
}

pub(super) fn listed(of: &str, count: u64, lines: &[(u64, String)]) -> String {
    let mut text = String::new();
    for (line, fault) in lines {
        write!(text, "\n  {of} {line}: {fault}").expect("writing to a String cannot fail");
    }
    match count.saturating_sub(lines.len() as u64) {
        0 => text,
        more => format!("{text}\n  … and {more} more"),
    }
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

pub(super) fn passes(known: &[u32]) -> String {
    match known {
        [] => "it has none".to_owned(),
        [only] => format!("there is pass {only}"),
        known => format!("there are {}", known.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
    }
}

pub(super) fn run_named(run: &str) -> String {
    if run.is_empty() { "a run".to_owned() } else { format!("run `{run}`") }
}

/// An error with its causes on one line; what a cause repeats of the text before it is left out.
pub(crate) fn full_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let next = inner.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = inner.source();
    }
    text
}

/// An error with its causes, what helps and its code, on one line.
pub(crate) fn full_hint(error: &Error) -> String {
    let hint = error.hint().map(|hint| format!("; {hint}"));
    let told = format!("{}{}", full_cause(error), hint.unwrap_or_default());
    match error.code() {
        Some(code) => code.mark(&told),
        None => told,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lines_are_listed_one_below_the_other() {
        let first = vec![(3, "`x` is not a number".to_owned()), (9, "`y` is not a number".to_owned())];
        let error = Error::BadLines { input: "file `ids.txt`".into(), of: "line", count: 12, first };
        assert_eq!(
            error.to_string(),
            "read file `ids.txt`: 12 of its lines hold no id\n  line 3: `x` is not a number\n  line 9: `y` is not a number\n  \
             … and 10 more"
        );
    }
}
