//! The command line of every pipeline's binary: [`main`] is all that a pipeline calls.
//!
//! | module | what it owns |
//! |---|---|
//! | `args` | what may be typed, and its help |
//! | `config` | flags, environment and `millstream.toml` as one checked plan, or every fault at once |
//! | `session` | the servers: named ones, or the local stack |
//! | `command` | one file a command |
//! | `input` | ids from flags, files, standard input, queries |
//! | `units` | durations and sizes, within bounds |
//! | `listen` | where the local stack listens, and why nowhere else |
//! | `show`, `progress`, `logs` | numbers for people, the progress line, tracing to stderr |
//!
//! Results go to stdout, everything else to stderr.

mod args;
mod command;
mod config;
mod input;
mod listen;
mod logs;
mod progress;
mod session;
mod show;
mod units;

use std::process::ExitCode;

use clap::FromArgMatches;
use millstream::schema::Faults;
use millstream::{Pipeline, SchemaFault};
use millstream_engine::compute::{AnyFunction, child_main};

use args::Cli;
use command::Context;

/// How a command ended, as the exit code says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// All done.
    Well,
    /// Done, but the answer is no: an unclean proof, a failed check.
    Badly,
    /// Done, and some ids are dead letters, or some lines held no id and were passed over.
    InPart,
    /// Stopped by a signal.
    Interrupted,
}

/// Wrong use of the command line that clap cannot see: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub String);

/// Runs the command that the process was started with.
///
/// Exit codes: 0 all done, 1 failed, 2 wrong usage, 3 done but with dead letters or bad lines, 4 there were no ids,
/// 130 interrupted.
pub fn main<P: Pipeline>(pipeline: P) -> ExitCode {
    start(P::NAME, AnyFunction::of(pipeline))
}

/// Compiled once, not for each pipeline.
fn start(name: &'static str, function: Result<AnyFunction, Vec<SchemaFault>>) -> ExitCode {
    #[cfg(feature = "local")]
    if let Some(code) = millstream_local::child_main() {
        return code;
    }
    // A pipeline with faults starts no child.
    if let Some(code) = function.as_ref().ok().and_then(child_main) {
        return code;
    }
    let command = args::command_line(name).about(about(name));
    let cli = match command.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout with code 0, faults to stderr with code 2.
            if !error.use_stderr() {
                show::help(&error);
                return if show::tell_failed() { ExitCode::from(1) } else { ExitCode::SUCCESS };
            }
            drop(error.print());
            return ExitCode::from(2);
        }
    };
    let function = match function {
        Ok(function) => function,
        Err(faults) => {
            let faults: Vec<String> = Faults(&faults).to_string().lines().map(str::to_owned).collect();
            let hint = "make COLUMNS and the fields of the row type agree: fields go into columns by name";
            show::error(&format!("failed to use pipeline `{name}`"), &faults, Some(hint), None);
            return ExitCode::from(2);
        }
    };
    let context = Context::start(function.spec().clone(), &cli);
    let outcome = context.and_then(|context| context.run(function, &cli.command));
    let untold = show::tell_failed();
    match outcome {
        Ok(_) if untold => ExitCode::from(1),
        Ok(Ended::Well) => ExitCode::SUCCESS,
        Ok(Ended::Badly) => ExitCode::from(1),
        Ok(Ended::InPart) => ExitCode::from(3),
        Ok(Ended::Interrupted) => ExitCode::from(130),
        Err(error) => {
            let usage = error.is::<Usage>() || error.is::<config::Faults>();
            show::report(&error);
            ExitCode::from(if usage {
                2
            } else if is_empty(&error) {
                4
            } else {
                1
            })
        }
    }
}

/// Whether the input was sound, and held no ids.
fn is_empty(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(millstream_engine::Error::NoIds { .. }))
}

fn about(pipeline: &str) -> String {
    format!(
        "Computes pipeline `{pipeline}` over lists of ids on every core of every host, stores every row in ClickHouse, and \
         proves it."
    )
}

/// The README's example, compiled by `cargo test`.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
