//! The fault suite: every row of the fault matrix on real servers and processes, each judged by a checker that shares no
//! code with the engine.
//!
//! `cargo run --release -p faults` plays all of them. The binary is its own pipeline, too: with [`PIPELINE`] set it is
//! what `produce`, `work` and `sink` are started from, so the two can never be of different builds.

mod checker;
mod cluster;
mod disk;
mod inject;
mod matrix;
mod netns;
mod old_clickhouse;
mod runner;
mod scenarios;
mod scene;
mod soak;
mod table;
mod troubled;
mod watch;
mod weather;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// Set for the processes that are the pipeline under test.
const PIPELINE: &str = "FAULTS_PIPELINE";

#[derive(Debug, Parser)]
#[command(about = "Plays the fault matrix on real servers and processes, and judges what is stored.")]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Print the matrix and play nothing
    #[arg(long)]
    list: bool,
    /// Play only these rows or scenarios: `13,14b`
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    only: Vec<String>,
    /// Play the subset that the design rests on: under eight minutes on two cores
    #[arg(long)]
    ci: bool,
    /// Play scaled rows at the length that the matrix names
    #[arg(long)]
    long: bool,
    /// Draw the random moments from this seed
    #[arg(long, global = true, value_name = "N")]
    seed: Option<u64>,
    /// Scenarios that are played at once [default: 1]
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true)]
    parallel: usize,
    /// Print one JSON object a row
    #[arg(long, global = true)]
    json: bool,
    /// Write the table to this file, as Markdown
    #[arg(long, global = true, value_name = "FILE")]
    markdown: Option<std::path::PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put a random fault every 5 to 20 s on a running load, then be quiet: it must seal unattended
    Soak {
        /// How long faults go on
        #[arg(long, value_name = "N", default_value_t = 20)]
        minutes: u64,
    },
}

/// What every scenario is told.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Random moments are drawn from it.
    pub seed: u64,
    /// Whether scaled rows take the time that the matrix names.
    pub long: bool,
}

impl Plan {
    /// The one or the other length of a scaled row.
    pub fn lasting(self, scaled_s: u64, whole_s: u64) -> Duration {
        Duration::from_secs(if self.long { whole_s } else { scaled_s })
    }
}

fn main() -> ExitCode {
    if std::env::var_os(PIPELINE).is_some() {
        return scenarios::pipeline();
    }
    let args = Args::parse();
    let plan = Plan { seed: args.seed.unwrap_or_else(tests::dice::clock), long: args.long };
    let table = table::Table::new(args.json, args.markdown.clone());
    if args.list {
        return table::list(&matrix::ROWS);
    }
    match args.command {
        Some(Command::Soak { minutes }) => soak::run(plan, Duration::from_secs(60 * minutes), table),
        None => match runner::choose(&args.only, args.ci) {
            Ok(chosen) => runner::run(chosen, plan, args.parallel.max(1), table),
            Err(unknown) => table::refuse(&unknown),
        },
    }
}
