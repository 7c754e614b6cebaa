//! Every key of the configuration, once: what reads a value and what README's table says of it come from the same line.

use std::fmt;
use std::time::Duration;

use millstream::Limits;
use millstream::limits::{LEAST_MEMORY, LEAST_ROWS_WAIT};
use millstream_engine::model::moment::length;
use millstream_engine::model::rows::MAX_INSERT_ROWS;
use millstream_engine::sink::SinkPlan;
use millstream_engine::{Environment, StreamLimits};

use crate::units::{Durations, Sizes, size};

/// A key, and which values it takes.
pub(super) struct Key<T> {
    /// In `millstream.toml`, with dots between tables and keys.
    pub name: &'static str,
    /// The flag, which comes first.
    pub flag: Option<&'static str>,
    /// The environment's variable, which comes second.
    pub variable: Option<&'static str>,
    /// Which values are taken.
    pub takes: T,
    /// What it is for.
    #[cfg_attr(not(test), expect(dead_code, reason = "README's table says it, which a test makes"))]
    pub about: &'static str,
    /// What holds where it is set nowhere.
    #[cfg_attr(not(test), expect(dead_code, reason = "README's table says it, which a test makes"))]
    pub default: fn() -> String,
}

/// A text; what it is, in words.
pub(super) struct Text(
    #[cfg_attr(not(test), expect(dead_code, reason = "README's table says it, which a test makes"))]
    pub  &'static str,
);

/// `true` or `false`.
pub(super) struct Truth;

/// Whole numbers, both bounds included.
pub(super) struct Numbers {
    pub least: u64,
    pub most: u64,
}

impl Numbers {
    /// Whether a number is taken.
    pub fn hold(&self, number: u64) -> bool {
        (self.least..=self.most).contains(&number)
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} to {}", self.least, self.most)
    }
}

impl<T> Key<T> {
    const fn new(name: &'static str, takes: T, default: fn() -> String, about: &'static str) -> Self {
        Self { name, flag: None, variable: None, takes, about, default }
    }

    const fn flag(mut self, flag: &'static str) -> Self {
        self.flag = Some(flag);
        self
    }

    const fn variable(mut self, variable: &'static str) -> Self {
        self.variable = Some(variable);
        self
    }
}

const MONTH: Duration = Duration::from_secs(30 * 86400);
const TEN_YEARS: Duration = Duration::from_secs(3650 * 86400);
const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);
const STREAM_SIZES: Sizes = Sizes { least: 64 << 20, most: 1 << 50 };
const URL_OF_NATS: Text =
    Text("`nats://` or `tls://`, `[user:password@]host:port`, several with commas between");
const FILE: Text = Text("a file");

fn none() -> String {
    "none".to_owned()
}

fn code(text: impl std::fmt::Display) -> String {
    format!("`{text}`")
}

pub(super) const LOG: Key<Text> = Key::new(
    "log",
    Text("`warn`, `info`, `debug`, or a filter such as `info,millstream_engine=debug`"),
    || code("info"),
    "what is logged to stderr",
)
.flag("--log")
.variable("MILLSTREAM_LOG");
pub(super) const DATA: Key<Text> =
    Key::new("data", Text("a directory"), || code(".millstream"), "data directory of the local stack")
        .flag("--data")
        .variable("MILLSTREAM_DATA");
pub(super) const NAMESPACE: Key<Text> = Key::new(
    "namespace",
    Text("1 to 32 of `a-z 0-9 _`, a letter first"),
    none,
    "environment of a pipeline that has several on the same servers; a part of every name in NATS",
)
.flag("--namespace")
.variable("MILLSTREAM_NAMESPACE");
pub(super) const LISTEN: Key<Text> = Key::new(
    "listen",
    Text("no other, because the local stack has no passwords"),
    || code("127.0.0.1"),
    "where the local stack listens",
);

pub(super) const NATS_URL: Key<Text> =
    Key::new("nats.url", URL_OF_NATS, || "the local stack".to_owned(), "NATS server")
        .flag("--nats")
        .variable("NATS_URL");
pub(super) const NATS_CREDS: Key<Text> = Key::new(
    "nats.creds",
    FILE,
    none,
    "credentials file for NATS, or one with an nkey's seed; read again at every connection",
)
.flag("--nats-creds")
.variable("NATS_CREDS");
pub(super) const NATS_CA: Key<Text> = Key::new(
    "nats.ca",
    FILE,
    || "the system's".to_owned(),
    "certificates of the authority of NATS's certificate, where the system does not know it",
)
.flag("--nats-ca")
.variable("NATS_CA");
pub(super) const NATS_CERT: Key<Text> =
    Key::new("nats.cert", FILE, none, "certificate that is shown to NATS, together with its key")
        .flag("--nats-cert")
        .variable("NATS_CERT");
pub(super) const NATS_KEY: Key<Text> =
    Key::new("nats.key", FILE, none, "key of that certificate").flag("--nats-key").variable("NATS_KEY");

pub(super) const CLICKHOUSE_URL: Key<Text> = Key::new(
    "clickhouse.url",
    Text("`http://` or `https://`, `[user[:password]@]host:port`"),
    || "the local stack".to_owned(),
    "ClickHouse's HTTP address; never with a password as a flag",
)
.flag("--clickhouse")
.variable("CLICKHOUSE_URL");
pub(super) const CLICKHOUSE_USER: Key<Text> =
    Key::new("clickhouse.user", Text("a name"), || code("default"), "ClickHouse user")
        .flag("--clickhouse-user")
        .variable("CLICKHOUSE_USER");
pub(super) const CLICKHOUSE_PASSWORD: Key<Text> = Key::new(
    "clickhouse.password",
    Text("a text"),
    none,
    "that user's password; no flag, which `ps` would show",
)
.variable("CLICKHOUSE_PASSWORD");
pub(super) const CLICKHOUSE_DATABASE: Key<Text> = Key::new(
    "clickhouse.database",
    Text("1 to 64 of `A-Z a-z 0-9 _ -`, no `-` first"),
    || format!("`{}`, or `millstream_NAMESPACE`", Environment::usual_database(None)),
    "ClickHouse database that holds the tables",
)
.flag("--database")
.variable("CLICKHOUSE_DATABASE");

pub(super) const IDS_BYTES: Key<Sizes> = Key::new(
    "streams.ids_bytes",
    STREAM_SIZES,
    || format!("{}, doubled when full", size(StreamLimits::default().ids_bytes)),
    "size of the stream of ids",
);
pub(super) const ROWS_BYTES: Key<Sizes> = Key::new(
    "streams.rows_bytes",
    STREAM_SIZES,
    || format!("{}, doubled when full", size(StreamLimits::default().rows_bytes)),
    "size of the stream of rows: how much finished work waits while ClickHouse is away",
);
pub(super) const KEEP_IDS: Key<Durations> = Key::new(
    "streams.keep_ids",
    Durations::new(HOUR, TEN_YEARS),
    || code(length(StreamLimits::default().ids_age)),
    "how long the ids of a run are kept, so that it can be computed again",
);
pub(super) const KEEP_ROWS: Key<Durations> = Key::new(
    "streams.keep_rows",
    // Shorter than that, rows could go before ClickHouse is back from an outage.
    Durations { or_none: true, ..Durations::new(HOUR, TEN_YEARS) },
    || code(length(StreamLimits::default().rows_age)),
    "how long rows stay in their stream after their pass is sealed, for `rebuild`",
);
pub(super) const REPLICAS: Key<Numbers> = Key::new(
    "streams.replicas",
    Numbers { least: 1, most: 5 },
    || code(StreamLimits::default().replicas),
    "copies of each stream in a cluster of NATS servers",
);

pub(super) const THREADS: Key<Numbers> = Key::new(
    "work.threads",
    Numbers { least: 1, most: 4096 },
    || "the cores that the process may use".to_owned(),
    "compute threads of a worker",
)
.flag("--threads");
pub(super) const DRAIN: Key<Durations> = Key::new(
    "work.drain",
    Durations::new(SECOND, HOUR),
    || code(length(WORK_DRAIN)),
    "how long held batches may take to finish after a stop",
);
pub(super) const ATTEMPTS: Key<Numbers> = Key::new(
    "work.attempts",
    Numbers { least: 1, most: 1000 },
    || own(Limits::DEFAULT.attempts),
    "how often an id is tried that asks for another attempt",
);
pub(super) const RETRY_FOR: Key<Durations> = Key::new(
    "work.retry_for",
    Durations::new(Duration::ZERO, MONTH),
    || own(length(Limits::DEFAULT.retry_for)),
    "for how long such an id is tried at least, however many attempts that takes",
);
pub(super) const START_WITHIN: Key<Durations> = Key::new(
    "work.start_within",
    Durations::new(SECOND, MONTH),
    || own(length(Limits::DEFAULT.start_within)),
    "how long the pipeline's `start` may take in each process that computes",
);
pub(super) const SOFT_LIMIT: Key<Durations> = Key::new(
    "work.soft_limit",
    Durations::new(SECOND, MONTH),
    || limit(Limits::DEFAULT.soft.map(length)),
    "an id that takes longer is warned about",
);
pub(super) const HARD_LIMIT: Key<Durations> = Key::new(
    "work.hard_limit",
    Durations::new(SECOND, MONTH),
    || limit(Limits::DEFAULT.hard.map(length)),
    "an id that takes longer is ended, and is a dead letter",
);
pub(super) const MEMORY_LIMIT: Key<Sizes> = Key::new(
    "work.memory_limit",
    Sizes { least: LEAST_MEMORY, most: 1 << 50 },
    || limit(Limits::DEFAULT.memory.map(size)),
    "an id that takes more memory is ended, and is a dead letter",
);
pub(super) const ROWS_WAIT: Key<Durations> = Key::new(
    "work.rows_wait",
    Durations::new(LEAST_ROWS_WAIT, MONTH),
    || own(length(Limits::DEFAULT.rows_wait)),
    "rows that are done wait no longer than this for the rest of their batch; 128 MiB of them do not wait",
);
pub(super) const ISOLATE: Key<Truth> = Key::new(
    "work.isolate",
    Truth,
    || own(Limits::DEFAULT.isolate),
    "whether each id is computed alone in a child process, always",
);

pub(super) const GROUP_ROWS: Key<Numbers> = Key::new(
    "sink.group_rows",
    Numbers { least: 1, most: MAX_INSERT_ROWS },
    || code(SinkPlan::default().group_rows),
    "rows that are inserted together at most",
);
pub(super) const GROUP_AGE: Key<Durations> = Key::new(
    "sink.group_age",
    Durations::new(Duration::from_millis(1), Duration::from_secs(60)),
    || code(length(SinkPlan::default().group_age)),
    "how long rows wait for others that are inserted together with them",
);
pub(super) const HELD_BYTES: Key<Sizes> = Key::new(
    "sink.held_bytes",
    Sizes { least: 16 << 20, most: 4 << 30 },
    || code(size(SinkPlan::default().held_bytes as u64)),
    "messages that a sink holds at once: what bounds its memory",
);
pub(super) const INSERTS: Key<Numbers> = Key::new(
    "sink.inserts",
    Numbers { least: 1, most: 64 },
    || code(SinkPlan::default().inserts),
    "inserts under way at once",
);
pub(super) const SINK_DRAIN: Key<Durations> = Key::new(
    "sink.drain",
    Durations::new(SECOND, HOUR),
    || code(length(SinkPlan::default().drain)),
    "how long held rows may take to land after a stop",
);

/// How long a worker's held batches may take after a stop, where nothing else is set.
pub(super) const WORK_DRAIN: Duration = Duration::from_secs(30);

/// A default that a pipeline's `LIMITS` may set otherwise.
fn own(usual: impl std::fmt::Display) -> String {
    format!("the pipeline's `LIMITS`, else `{usual}`")
}

fn limit(usual: Option<String>) -> String {
    usual.map_or_else(|| "the pipeline's `LIMITS`, else none".to_owned(), own)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use clap::CommandFactory;

    use super::*;
    use crate::args::{Cli, Options};
    use crate::config::file::File;
    use crate::config::{Config, Reader};

    const BEGIN: &str = "<!-- keys: made from crates/cli/src/config/keys.rs -->\n";
    const END: &str = "<!-- end of keys -->\n";
    /// Set, it makes the test write the table anew.
    const RENEW: &str = "MILLSTREAM_RENEW_README";

    /// A line of README's table.
    struct Row {
        name: &'static str,
        flag: Option<&'static str>,
        variable: Option<&'static str>,
        about: &'static str,
        default: String,
        range: String,
    }

    trait Range {
        fn range(&self) -> String;
    }

    impl Range for Text {
        fn range(&self) -> String {
            self.0.to_owned()
        }
    }

    impl Range for Truth {
        fn range(&self) -> String {
            "`true` or `false`".to_owned()
        }
    }

    impl Range for Numbers {
        fn range(&self) -> String {
            self.to_string()
        }
    }

    impl Range for Durations {
        fn range(&self) -> String {
            self.to_string()
        }
    }

    impl Range for Sizes {
        fn range(&self) -> String {
            self.to_string()
        }
    }

    fn row<T: Range>(key: &Key<T>) -> Row {
        let Key { name, flag, variable, takes, about, default } = key;
        Row { name, flag: *flag, variable: *variable, about, default: default(), range: takes.range() }
    }

    /// All of them, in the order of README.
    fn rows() -> Vec<Row> {
        vec![
            row(&LOG),
            row(&DATA),
            row(&NAMESPACE),
            row(&LISTEN),
            row(&NATS_URL),
            row(&NATS_CREDS),
            row(&NATS_CA),
            row(&NATS_CERT),
            row(&NATS_KEY),
            row(&CLICKHOUSE_URL),
            row(&CLICKHOUSE_USER),
            row(&CLICKHOUSE_PASSWORD),
            row(&CLICKHOUSE_DATABASE),
            row(&IDS_BYTES),
            row(&ROWS_BYTES),
            row(&KEEP_IDS),
            row(&KEEP_ROWS),
            row(&REPLICAS),
            row(&THREADS),
            row(&DRAIN),
            row(&ATTEMPTS),
            row(&RETRY_FOR),
            row(&START_WITHIN),
            row(&SOFT_LIMIT),
            row(&HARD_LIMIT),
            row(&MEMORY_LIMIT),
            row(&ROWS_WAIT),
            row(&ISOLATE),
            row(&GROUP_ROWS),
            row(&GROUP_AGE),
            row(&HELD_BYTES),
            row(&INSERTS),
            row(&SINK_DRAIN),
        ]
    }

    fn table() -> String {
        let cell = |text: Option<&str>| text.map_or_else(|| "-".to_owned(), code);
        let line = |row: &Row| {
            let Row { name, flag, variable, about, default, range } = row;
            let flag = cell(*flag);
            let variable = cell(*variable);
            format!("| `{name}` | {flag} | {variable} | {about} | {default} | {range} |\n")
        };
        let head =
            "| key | flag | environment | what it is | default | values |\n|---|---|---|---|---|---|\n";
        format!("{head}{}", rows().iter().map(line).collect::<String>())
    }

    #[test]
    fn readme_has_the_table_of_keys() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
        let readme = fs::read_to_string(&path).expect("README.md is read");
        let (before, rest) = readme.split_once(BEGIN).expect("README.md has the begin of the table of keys");
        let (found, after) = rest.split_once(END).expect("README.md has the end of the table of keys");
        let wanted = table();
        if std::env::var_os(RENEW).is_some() {
            fs::write(&path, format!("{before}{BEGIN}{wanted}{END}{after}")).expect("README.md is written");
            return;
        }
        assert_eq!(
            found, wanted,
            "README.md's table of keys is not the code's: `{RENEW}=1 cargo test --workspace --lib keys` writes it anew"
        );
    }

    #[test]
    fn every_key_that_is_read_is_in_the_table() {
        let mut faults = Vec::new();
        let mut file = File::read(Path::new("/no/such.toml"), false, &mut faults);
        let mut reader = Reader { file: &mut file, faults: &mut faults };
        Config::merge(&Options::default(), None, Limits::DEFAULT, &mut reader);
        let mut listed: Vec<&str> = rows().iter().map(|row| row.name).collect();
        listed.sort_unstable();
        assert_eq!(file.asked(), listed);
    }

    #[test]
    fn every_flag_and_variable_of_the_table_is_known_to_the_command_line() {
        let command = Cli::command();
        let known: Vec<String> = command
            .get_arguments()
            .chain(command.get_subcommands().flat_map(clap::Command::get_arguments))
            .filter_map(|flag| Some(format!("--{}", flag.get_long()?)))
            .collect();
        let help = command.get_after_help().expect("help on the environment").to_string();
        for row in rows() {
            assert!(row.flag.is_none_or(|flag| known.iter().any(|known| known == flag)), "{}", row.name);
            assert!(row.variable.is_none_or(|variable| help.contains(variable)), "{}", row.name);
        }
        let global =
            command.get_arguments().filter(|flag| flag.is_global_set()).filter_map(|flag| flag.get_long());
        for flag in global.filter(|flag| *flag != "config") {
            assert!(
                rows().iter().any(|row| row.flag == Some(&format!("--{flag}"))),
                "--{flag} is not in the table"
            );
        }
    }
}
