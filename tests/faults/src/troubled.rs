//! Pipeline `trial` again, whose ids are trouble: they start programs, take their time, or need a service. The variable
//! [`VARIABLE`] says which.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use millstream::{Failure, Outcome, Pipeline};
use tests::{Squared, Trial};

/// Says what the trouble is.
pub const VARIABLE: &str = "TRIAL_TROUBLE";
/// For how long programs of ids sleep, in seconds: a number by which they are told from others.
pub const SLEEP: &str = "TRIAL_SLEEP";
/// The service that ids need is there while this file is.
pub const SERVICE: &str = "service";
/// Has a line for each time that the straggler was begun.
pub const BEGUN: &str = "straggler";
/// The id that takes [`STRAGGLES`].
pub const STRAGGLER: u64 = 777;
/// Longer than a killed worker's batches take to come again would be too long for a scenario.
pub const STRAGGLES: Duration = Duration::from_secs(20);
/// The ids that are dead letters because of what they started, in SQL.
pub const DEAD: &str = "id % 1000 = 3";

/// The pipeline.
pub struct Troubled;

impl Pipeline for Troubled {
    const NAME: &'static str = Trial::NAME;
    const COLUMNS: &'static [(&'static str, &'static str)] = Trial::COLUMNS;
    type Id = u64;
    type Row = Squared;

    fn compute(&self, id: &u64) -> Outcome<Squared> {
        let trouble = std::env::var(VARIABLE).unwrap_or_default();
        match trouble.as_str() {
            "stubborn" if id % 1000 == 3 => stubborn(),
            "holds-pipe" if id % 1000 == 3 => holds_pipe(),
            "straggler" if *id == STRAGGLER => straggle(),
            "service" if !Path::new(SERVICE).exists() => return Err(Failure::retry("the service is away")),
            _ => {}
        }
        let squared = Trial.compute(id)?.squared;
        Ok(Squared { squared: squared.wrapping_add(u64::from(trouble == "shifted")) })
    }
}

fn seconds() -> String {
    std::env::var(SLEEP).unwrap_or_default()
}

/// A program that ignores SIGTERM: `timeout` sends it one, and waits for ever.
fn stubborn() {
    let ignores = format!("trap '' TERM; while :; do sleep {}; done", seconds());
    let _ended = Command::new("timeout").args(["1", "sh", "-c", &ignores]).status();
}

/// A crash that leaves a program of a program, which holds all that this process had open for its output.
fn holds_pipe() {
    let leaves = format!("setsid sleep {} & exec true", seconds());
    let _ended = Command::new("sh").args(["-c", &leaves]).status();
    std::process::abort();
}

fn straggle() {
    let file = File::options().create(true).append(true).open(BEGUN);
    let _noted = file.and_then(|mut file| writeln!(file, "begun"));
    std::thread::sleep(STRAGGLES);
}

/// How often the straggler was begun, in a host's directory.
pub fn begun(directory: &Path) -> usize {
    fs::read_to_string(directory.join(BEGUN)).unwrap_or_default().lines().count()
}
