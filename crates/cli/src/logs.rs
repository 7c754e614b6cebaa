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

/// Whether a text is a filter. A word alone is a level here: as the name of a target, `inof` would switch all logging off.
pub(crate) fn check(filter: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_word = |directive: &str| directive.chars().all(|symbol| symbol.is_ascii_alphabetic());
    let is_level = |directive: &str| LEVELS.contains(&directive.to_ascii_lowercase().as_str());
    let directives = filter.split(',').map(str::trim);
    if let Some(word) = directives.into_iter().find(|word| is_word(word) && !is_level(word)) {
        return Err(format!(
            "`{word}` is no level: {}; a target needs one, as in `{word}=debug`",
            LEVELS.join(", ")
        ));
    }
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
