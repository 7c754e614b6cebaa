//! Plays what was chosen, one scenario at a time or several side by side.

use std::any::Any;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use crate::Plan;
use crate::matrix::{ROWS, Row, Scenario};
use crate::table::{Line, Outcome, Table};

/// A scenario of a row.
pub struct Choice {
    row: &'static Row,
    label: String,
    scenario: &'static Scenario,
}

/// The scenarios of these rows and labels; of all rows without any.
///
/// # Errors
/// A word that is neither.
pub fn choose(only: &[String], ci: bool) -> Result<Vec<Choice>, String> {
    let all: Vec<Choice> = all().collect();
    let is = |word: &str, choice: &Choice| word == choice.label || word.parse() == Ok(choice.row.number);
    if let Some(unknown) = only.iter().find(|word| !all.iter().any(|choice| is(word, choice))) {
        return Err(unknown.clone());
    }
    let wanted = |choice: &Choice| only.is_empty() || only.iter().any(|word| is(word, choice));
    let in_ci = |choice: &Choice| !ci || choice.scenario.ci;
    Ok(all.into_iter().filter(|choice| wanted(choice) && in_ci(choice)).collect())
}

fn all() -> impl Iterator<Item = Choice> {
    ROWS.iter().flat_map(|row| {
        let scenarios = row.scenarios.iter().enumerate();
        scenarios.map(|(at, scenario)| Choice { row, label: row.label(at), scenario })
    })
}

/// Plays them all.
pub fn run(chosen: Vec<Choice>, plan: Plan, parallel: usize, table: Table) -> std::process::ExitCode {
    table.begin();
    let left_out = all().count() - chosen.len();
    let waiting = Mutex::new(chosen.into_iter());
    thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().expect("nobody panics with it").next();
                    let Some(choice) = next else { break };
                    table.add(play(choice, plan));
                }
            });
        }
    });
    table.close(left_out)
}

fn play(choice: Choice, plan: Plan) -> Line {
    let Choice { row, label, scenario } = choice;
    let begun = Instant::now();
    let thread = thread::Builder::new().name(label.clone());
    // A scenario ends early by a panic, as a test does.
    let played = thread.spawn(move || (scenario.play)(plan)).expect("a thread").join();
    let outcome = match played {
        Ok(report) => Outcome::Judged(scenario.raw, report),
        Err(panic) => Outcome::Broke(said(panic)),
    };
    Line { label, fault: row.fault, moment: scenario.moment.to_owned(), outcome, took: begun.elapsed() }
}

/// What a scenario said when it ended early.
pub fn said(panic: Box<dyn Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => {
            panic.downcast_ref::<&str>().map_or_else(|| "a panic".to_owned(), |text| (*text).to_owned())
        }
    }
}
