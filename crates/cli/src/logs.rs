//! Tracing to stderr, with a filter, around the progress line.

use std::io::{self, IsTerminal, Write};

use indicatif::MultiProgress;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Writes to stderr while the progress line stands aside.
#[derive(Clone)]
struct AroundProgress(MultiProgress);

impl Write for AroundProgress {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().lock().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for AroundProgress {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Whether a text is a filter.
pub(crate) fn check(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter).map(drop).map_err(|error| error.to_string())
}

/// Starts logging. `filter` has been checked.
pub(crate) fn start(filter: &str, progress: &MultiProgress) {
    // async-nats logs every message at debug; what it and the local stack warn of, our events say too.
    let quiet =
        ["async_nats=off", "millstream_local=error", "hyper=warn", "hyper_util=warn", "clickhouse=warn"];
    let mut env = EnvFilter::new(filter);
    for directive in
        quiet.iter().filter(|directive| !filter.contains(directive.split('=').next().unwrap_or_default()))
    {
        if let Ok(directive) = directive.parse() {
            env = env.add_directive(directive);
        }
    }
    tracing_subscriber::fmt()
        .with_env_filter(env)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_target(false)
        // It would tell of a line that cannot be written by `eprintln!`, which panics when it cannot write either: a full
        // disk under the logs must not end a service.
        .log_internal_errors(false)
        .with_writer(AroundProgress(progress.clone()))
        .init();
}
