//! The table: one row a scenario, printed as it finishes, and the line that closes it.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::json;

use crate::matrix::{Raw, Row, Scenario};
use crate::scene::Report;

const HEAD: [&str; 8] = ["row", "fault", "moment", "lost", "doubled", "raw doubled", "recovered", "verdict"];
const WIDTHS: [usize; 8] = [4, 42, 50, 6, 8, 12, 10, 7];

/// How one scenario came out.
pub struct Line {
    /// Its row's number with its letter.
    pub label: String,
    /// Its row's fault.
    pub fault: &'static str,
    /// Its moment.
    pub moment: String,
    /// What was found, or why there is nothing.
    pub outcome: Outcome,
    /// What it took, from the first process to the last.
    pub took: Duration,
}

/// How a scenario ended.
pub enum Outcome {
    /// It was played and judged.
    Judged(Raw, Report),
    /// It broke off: an expectation of its own was not met, or its fault did not happen.
    Broke(String),
}

impl Outcome {
    /// Why it is not as it should be.
    fn faults(&self) -> Vec<String> {
        match self {
            Self::Broke(why) => vec![why.clone()],
            Self::Judged(raw, report) => {
                let mut faults = report.found.named.clone();
                if !report.found.is_right() && faults.is_empty() {
                    faults.push("what is stored is not what was submitted".to_owned());
                }
                if report.found.raw_doubled > 0 {
                    faults.push(format!("{} raw duplicates are left", report.found.raw_doubled));
                }
                if *raw == Raw::Never && report.raw_seen > 0 {
                    faults.push(format!("{} raw duplicates were seen before the seal", report.raw_seen));
                }
                if report.proofs.is_empty() {
                    faults.push("nothing shows that the fault happened".to_owned());
                }
                faults
            }
        }
    }

    fn verdict(&self) -> &'static str {
        match self {
            _ if self.faults().is_empty() => "pass",
            _ => "FAIL",
        }
    }
}

impl Line {
    fn cells(&self) -> [String; 8] {
        let [lost, doubled, raw, recovered] = match &self.outcome {
            Outcome::Judged(_, Report { found, raw_seen, recovered, .. }) => [
                found.lost.to_string(),
                found.doubled.to_string(),
                format!("{raw_seen}, {}", found.raw_doubled),
                format!("{:.1} s", recovered.as_secs_f64()),
            ],
            _ => ["-", "-", "-", "-"].map(str::to_owned),
        };
        let verdict = self.outcome.verdict().to_owned();
        [
            self.label.clone(),
            self.fault.to_owned(),
            self.moment.clone(),
            lost,
            doubled,
            raw,
            recovered,
            verdict,
        ]
    }

    fn json(&self) -> serde_json::Value {
        let mut object = json!({
            "row": self.label, "fault": self.fault, "moment": self.moment, "verdict": self.outcome.verdict(),
            "faults": self.outcome.faults(), "took_s": self.took.as_secs_f64(),
        });
        match &self.outcome {
            Outcome::Judged(_, report) => {
                object["lost"] = report.found.lost.into();
                object["doubled"] = report.found.doubled.into();
                object["unexpected"] = report.found.unexpected.into();
                object["wrong"] = report.found.wrong.into();
                object["raw_doubled_seen"] = report.raw_seen.into();
                object["raw_doubled_left"] = report.found.raw_doubled.into();
                object["recovered_s"] = report.recovered.as_secs_f64().into();
                object["proofs"] = json!(report.proofs);
            }
            Outcome::Broke(_) => {}
        }
        object
    }
}

/// Prints lines as they come, and counts them.
pub struct Table {
    json: bool,
    markdown: Option<PathBuf>,
    lines: Mutex<Vec<Line>>,
}

impl Table {
    /// An empty one.
    pub fn new(json: bool, markdown: Option<PathBuf>) -> Self {
        Self { json, markdown, lines: Mutex::default() }
    }

    /// A file of this ending beside its own; among the temporary files where it has none.
    pub fn beside(&self, ending: &str, usual: &str) -> PathBuf {
        match &self.markdown {
            Some(file) => file.with_extension(ending),
            None => std::env::temp_dir().join(usual).with_extension(ending),
        }
    }

    /// Prints the heads of its columns.
    pub fn begin(&self) {
        if !self.json {
            say(&aligned(&HEAD.map(str::to_owned)));
        }
    }

    /// Prints a line, and what is wrong with it below.
    pub fn add(&self, line: Line) {
        let mut lines = self.lines.lock().expect("nobody panics with it");
        if self.json {
            say(&line.json().to_string());
        } else {
            say(&aligned(&line.cells()));
            line.outcome
                .faults()
                .iter()
                .for_each(|fault| say(&format!("     ! {}", fault.replace('\n', "\n       "))));
        }
        lines.push(line);
    }

    /// Prints a line of words.
    pub fn note(&self, text: &str) {
        if !self.json {
            say(text);
        }
    }

    /// Writes the file if one is wanted, and closes with the counts; `skipped` scenarios were not chosen.
    pub fn close(self, skipped: usize) -> ExitCode {
        let mut lines = self.lines.into_inner().expect("nobody panics with it");
        lines.sort_by_key(|line| order(&line.label));
        let count = |verdict: &str| lines.iter().filter(|line| line.outcome.verdict() == verdict).count();
        let (passed, failed) = (count("pass"), count("FAIL"));
        if let Some(path) = &self.markdown
            && let Err(error) = fs::write(path, markdown(&lines))
        {
            say(&format!("{}: {error}", path.display()));
            return ExitCode::FAILURE;
        }
        let counts = if self.json {
            json!({ "passed": passed, "failed": failed, "skipped": skipped }).to_string()
        } else {
            format!("{passed} passed, {failed} failed, {skipped} skipped")
        };
        say(&counts);
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Rows in the order of the matrix: by number, then by letter.
fn order(label: &str) -> (u32, String) {
    let number = label.trim_end_matches(|symbol: char| symbol.is_ascii_alphabetic());
    (number.parse().unwrap_or(u32::MAX), label.to_owned())
}

fn aligned(cells: &[String; 8]) -> String {
    let cells = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:<width$}"));
    cells.collect::<Vec<_>>().join(" ").trim_end().to_owned()
}

fn markdown(lines: &[Line]) -> String {
    let mut text = format!("| {} |\n|{}\n", HEAD.join(" | "), " --- |".repeat(HEAD.len()));
    for line in lines {
        text += &format!("| {} |\n", line.cells().map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    text
}

/// Prints the matrix.
pub fn list(rows: &[Row]) -> ExitCode {
    for row in rows {
        say(&format!("{:>2}  {} ({})", row.number, row.fault, row.means));
        for (at, Scenario { moment, ci, .. }) in row.scenarios.iter().enumerate() {
            say(&format!("      {:<4} {moment}{}", row.label(at), if *ci { " [ci]" } else { "" }));
        }
    }
    ExitCode::SUCCESS
}

/// Says what cannot be chosen.
pub fn refuse(unknown: &str) -> ExitCode {
    say(&format!("error: no row or scenario `{unknown}`: --list shows them"));
    ExitCode::from(2)
}

fn say(text: &str) {
    // Nobody who reads is left to be told if this fails.
    drop(writeln!(io::stdout().lock(), "{text}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::Found;

    fn report(found: Found, raw_seen: u64, proofs: &[&str]) -> Report {
        let proofs = proofs.iter().map(|proof| (*proof).to_owned()).collect();
        Report { found, raw_seen, recovered: Duration::ZERO, proofs }
    }

    #[test]
    fn only_a_fault_that_happened_and_left_nothing_passes() {
        let (clean, lost) = (Found::default(), Found { lost: 1, ..Found::default() });
        let left = Found { raw_doubled: 1, ..Found::default() };
        let verdicts = [
            (Raw::Never, report(clean.clone(), 0, &["killed"]), "pass"),
            (Raw::Never, report(clean.clone(), 0, &[]), "FAIL"),
            (Raw::Never, report(clean.clone(), 7, &["killed"]), "FAIL"),
            (Raw::Merged, report(clean, 7, &["killed"]), "pass"),
            (Raw::Merged, report(lost, 0, &["killed"]), "FAIL"),
            (Raw::Merged, report(left, 0, &["killed"]), "FAIL"),
        ];
        for (raw, report, verdict) in verdicts {
            let outcome = Outcome::Judged(raw, report.clone());
            assert_eq!(outcome.verdict(), verdict, "{raw:?} {report:?}");
        }
    }

    #[test]
    fn rows_are_in_the_order_of_the_matrix() {
        let mut labels = ["soak", "10", "8b", "8a", "9"];
        labels.sort_by_key(|label| order(label));
        assert_eq!(labels, ["8a", "8b", "9", "10", "soak"]);
    }
}
