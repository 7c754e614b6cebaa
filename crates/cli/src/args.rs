//! What may be typed, and its help.

mod examples;
mod produce;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::listen;
use crate::units::Durations;

pub(crate) use examples::command_line;
pub(crate) use produce::{ColumnArgs, MaxDead, ProduceArgs, PublishArgs, SourceArgs, SteerArgs};

/// How long `tune` may take.
const TUNE_FOR: Durations = Durations::new(Duration::from_secs(1), Duration::from_secs(3600));

const AFTER: &str = "\
Servers are named by flags, then the environment (NATS_URL, NATS_CREDS, NATS_CA, NATS_CERT, NATS_KEY, CLICKHOUSE_URL, CLICKHOUSE_USER, \
CLICKHOUSE_PASSWORD, CLICKHOUSE_DATABASE), then millstream.toml. The local stack provides what is not named: a private \
nats-server and a private ClickHouse under --data. MILLSTREAM_NAMESPACE, MILLSTREAM_DATA and MILLSTREAM_LOG stand for \
--namespace, --data and --log.

Results go to stdout, logs and progress to stderr.

Exit codes: 0 all done, 1 failed, 2 wrong usage, 3 done but with dead letters or bad lines, 4 there were no ids, \
130 interrupted.";

#[derive(Debug, Parser)]
#[command(version, after_help = AFTER, max_term_width = 110, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub options: Options,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Servers and logs")]
pub(crate) struct Options {
    /// NATS server, `nats://[user:password@]host:port` or `nats://TOKEN@host:port`, several with commas between
    #[arg(long, global = true, value_name = "URL")]
    pub nats: Option<String>,
    /// NATS credentials file, or one with an nkey's seed; read again at every connection
    #[arg(long, global = true, value_name = "FILE")]
    pub nats_creds: Option<PathBuf>,
    /// Certificates of the authority of NATS's certificate, where the system does not know it
    #[arg(long, global = true, value_name = "FILE")]
    pub nats_ca: Option<PathBuf>,
    /// Certificate that is shown to NATS, with --nats-key
    #[arg(long, global = true, value_name = "FILE")]
    pub nats_cert: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long, global = true, value_name = "FILE")]
    pub nats_key: Option<PathBuf>,
    /// ClickHouse's HTTP address, `http://host:port`
    #[arg(long, global = true, value_name = "URL")]
    pub clickhouse: Option<String>,
    /// ClickHouse user; the password comes from CLICKHOUSE_PASSWORD or millstream.toml, never from a flag
    #[arg(long, global = true, value_name = "NAME")]
    pub clickhouse_user: Option<String>,
    /// ClickHouse database that holds the tables [default: millstream, or millstream_NAMESPACE]
    #[arg(long, global = true, value_name = "NAME")]
    pub database: Option<String>,
    /// Environment, such as staging, of a pipeline that has several on the same servers: a part of every name in NATS
    #[arg(long, global = true, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Data directory of the local stack [default: .millstream]
    #[arg(long, global = true, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Configuration file [default: millstream.toml, where there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What is logged to stderr: `warn`, `info`, `debug`, or a filter such as `info,millstream_engine=debug`
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
}

impl Options {
    /// The program as it was called, with those of its options that say where runs are: what another command on the same run
    /// begins with. An address with a password in it is left to the reader.
    pub fn typed(&self) -> String {
        let program = std::env::args_os().next().unwrap_or_default();
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let named = [
            ("--config", self.config.as_ref().map(path)),
            ("--data", self.data.as_ref().map(path)),
            ("--nats", self.nats.clone()),
            ("--nats-creds", self.nats_creds.as_ref().map(path)),
            ("--nats-ca", self.nats_ca.as_ref().map(path)),
            ("--nats-cert", self.nats_cert.as_ref().map(path)),
            ("--nats-key", self.nats_key.as_ref().map(path)),
            ("--clickhouse", self.clickhouse.clone()),
            ("--clickhouse-user", self.clickhouse_user.clone()),
            ("--database", self.database.clone()),
            ("--namespace", self.namespace.clone()),
        ];
        let mut typed = quoted(&program.to_string_lossy());
        for (flag, value) in named {
            match value {
                Some(value) if value.contains('@') => typed.push_str(&format!(" {flag} URL")),
                Some(value) => typed.push_str(&format!(" {flag} {}", quoted(&value))),
                None => {}
            }
        }
        typed
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "-_./:=+,%".contains(char);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Publish, compute, store and seal a run in this one process
    ///
    /// Starts the local stack where no servers are named, shows one line of progress, and ends with a summary once
    /// the run is sealed. Interrupted or killed, it resumes when it is started again with the same --run and ids.
    Run(RunArgs),
    /// Start the local stack alone, in the foreground, and print its two addresses
    ///
    /// produce, work, sink and every other command of the same --data directory then use it. Ends with Ctrl-C.
    Up(UpArgs),
    /// Publish a run for workers to compute
    ///
    /// Killed and started again with the same words it resumes, and publishes nothing twice. With --follow the run is open:
    /// ids are published as they come, a start with the same --run adds to it, and the end of the input closes it.
    Produce(PublishArgs),
    /// Compute batches of all running passes until told to stop
    ///
    /// The first SIGTERM or Ctrl-C drains: no more batches are taken, held ones are finished or handed back. The
    /// second leaves at once. Being killed is safe at any moment.
    Work(WorkArgs),
    /// Store computed rows in ClickHouse and seal passes until told to stop
    ///
    /// Any number of sinks may run side by side. Signals as for `work`.
    Sink,
    /// Create streams, bucket, consumer and tables, where they are missing
    ///
    /// produce, run and sink do this too; alone it serves where they may not create anything. What the pipeline's columns
    /// need of a table that is there (columns to add, types to widen) it shows, and changes with --yes alone.
    Setup(SetupArgs),
    /// List all runs, the oldest first
    Runs(JsonArg),
    /// Show where a run stands: batches and ids done, rate, time left, dead letters
    Status(StatusArgs),
    /// Prove a run id by id, and repair it
    ///
    /// Compares what ClickHouse holds with the run's record: number of batches and ids, digest, batches that are
    /// missing or short, rows that are there twice. Exit code 1 when anything is not as it should be.
    Verify(VerifyArgs),
    /// Hold a run back on every host until it is resumed
    ///
    /// Within three seconds nothing of it is computed any more; rows that are computed are stored. It stays paused after
    /// a restart of everything.
    Pause(RunJsonArgs),
    /// Let a paused run go on
    Resume(RunJsonArgs),
    /// End a run for good, on every host
    ///
    /// It is never sealed. What is computed stays in the view `_live`; its messages are removed. `replay` computes it
    /// again as a new pass where the ids are still there, `forget` removes all of it.
    Cancel(RunJsonArgs),
    /// Change the priority or the rate of a run while it is computed
    Set(SetArgs),
    /// List a run's dead letters: the ids that yielded no row, and why
    Dead(DeadArgs),
    /// Compute a run again, or some of its ids, as a new pass
    ///
    /// A pass over some ids takes over the rows of all others from the newest sealed pass. Readers see the pass before
    /// it until the new one is proven, and then the whole of the new one, in one step. Killed and started again with
    /// the same words it goes on.
    Replay(ReplayArgs),
    /// Forget a run, or one pass of it, and free its space
    ///
    /// Removes its rows from ClickHouse, its messages from all streams, its consumers and its records. Asks nothing.
    /// Killed and started again with the same words it goes on.
    Forget(ForgetArgs),
    /// Insert a sealed run's rows again, from the stream that keeps them
    ///
    /// Fills a table that lost them, or a new one, and computes nothing. Proves it, and lets readers see it. It needs rows
    /// to be kept: [streams] keep_rows in millstream.toml. Killed and started again with the same words it goes on.
    Rebuild(RebuildArgs),
    /// Ask the configured ClickHouse, and print a table
    ///
    /// A query that names its own FORMAT is printed as it comes.
    Sql(SqlArgs),
    /// Measure how fast this machine computes ids, by threads and by the size of batches
    ///
    /// Computes and encodes ids from all over the input as a worker does, and stores nothing: no servers are needed.
    /// Prints the curve, the best of it, and what `--batch auto` would choose.
    Tune(TuneArgs),
    /// Say what would go wrong before it does, with a hint each
    ///
    /// Looks at the pipeline, the cores, NATS and ClickHouse, and changes nothing there. Exit code 1 when a check fails.
    Doctor(DoctorArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RunJsonArgs {
    /// The run
    pub run: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
#[group(id = "settings", required = true, multiple = true, args = ["priority", "rate"])]
pub(crate) struct SetArgs {
    /// The run
    pub run: String,
    #[command(flatten)]
    pub settings: SteerArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub produce: ProduceArgs,
    #[command(flatten)]
    pub work: WorkArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct WorkArgs {
    /// Compute threads [default: the cores that this process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<u64>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    /// Port of nats-server; without it, or 0, one is picked and kept
    #[arg(long, value_name = "PORT", default_value = "0", hide_default_value = true, value_parser = listen::port)]
    pub nats_port: u16,
    /// HTTP port of ClickHouse; without it, or 0, one is picked and kept
    #[arg(long, value_name = "PORT", default_value = "0", hide_default_value = true, value_parser = listen::port)]
    pub clickhouse_port: u16,
    /// Address that both listen on: 127.0.0.1 and no other, because they have no passwords
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1", hide_default_value = true, value_parser = listen::address)]
    pub listen: Ipv4Addr,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct JsonArg {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct StatusArgs {
    /// The run; the newest one without it
    pub run: Option<String>,
    /// Print one JSON object (with --watch one after each look)
    #[arg(long)]
    pub json: bool,
    /// Go on until the run is sealed
    #[arg(long)]
    pub watch: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct SetupArgs {
    /// Change the table of rows as it was shown
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DoctorArgs {
    /// Forget the faults of materialized views, once they are shown
    #[arg(long)]
    pub acknowledge: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct VerifyArgs {
    /// The run
    pub run: String,
    /// Prove the values too: that each row holds what a worker computed, column by column
    ///
    /// A sealed pass was proven so once. This does it again, from what ClickHouse holds now.
    #[arg(long)]
    pub values: bool,
    /// Merge raw duplicates away, have missing, short or wrong batches computed again, make a sealed pass visible again
    ///
    /// Values are looked at too.
    #[arg(long)]
    pub repair: bool,
    /// Also have those batches computed again whose rows are computed and cannot be stored
    ///
    /// ClickHouse may refuse rows because of the build that computed them. Deploy a mended build to the workers first: the
    /// computed rows are removed from their stream, and the ids are computed by the workers that run now.
    #[arg(long, requires = "repair")]
    pub recompute: bool,
    /// Name the hosts that each build ran on
    #[arg(long)]
    pub hosts: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DeadArgs {
    /// The run
    pub run: String,
    #[command(flatten)]
    pub letters: LettersArgs,
    /// How many are listed [default: 100]
    #[arg(long, value_name = "N", default_value_t = 100, hide_default_value = true)]
    pub limit: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Which dead letters are meant.
#[derive(Debug, Clone, Args)]
pub(crate) struct LettersArgs {
    /// Only those whose error holds this text
    #[arg(long, value_name = "TEXT")]
    pub error: Option<String>,
    /// Only those of this batch
    #[arg(long, value_name = "N")]
    pub batch: Option<u32>,
    /// Only those that this host computed
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// Only those that this build computed, as `dead` and `verify` name it
    #[arg(long, value_name = "NAME")]
    pub build: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ReplayArgs {
    /// The run; its newest pass must be sealed or cancelled
    pub run: String,
    /// Only batches of these numbers: `3..=5` with its end, `3..6` without
    #[arg(long, value_name = "RANGE", conflicts_with_all = ["since", "until", "dead", "where"])]
    pub batches: Option<String>,
    /// Only batches published then or later: 2026-11-25T18:00:00Z, or 90s, 10m, 2h, 3d ago
    #[arg(long, value_name = "TIME", conflicts_with_all = ["dead", "where"])]
    pub since: Option<String>,
    /// Only batches published before then
    #[arg(long, value_name = "TIME", conflicts_with_all = ["dead", "where"])]
    pub until: Option<String>,
    /// Only dead letters
    #[arg(long, conflicts_with = "where")]
    pub dead: bool,
    /// Only ids whose row in the newest sealed pass fulfils this condition, over the columns of the view `…_live`
    #[arg(long, value_name = "SQL")]
    pub r#where: Option<String>,
    #[command(flatten)]
    pub letters: LettersArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Ids that can be looked at without a server.
#[derive(Debug, Clone, Args)]
#[group(id = "sampled", required = true, multiple = false)]
pub(crate) struct SampledArgs {
    /// A range of numbers: `1..=100` with its end, `1..101` without
    #[arg(long, value_name = "RANGE")]
    pub ids: Option<String>,
    /// A file with one id a line; with --column, a CSV file with a header
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct TuneArgs {
    #[command(flatten)]
    pub sampled: SampledArgs,
    #[command(flatten)]
    pub column: ColumnArgs,
    /// Compute threads at most [default: the cores that this process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<u64>,
    /// How long all of it takes, about: `20s`, `5m` [default: 20s]
    #[arg(long, value_name = "TIME", default_value = "20s", hide_default_value = true, value_parser = |text: &str| TUNE_FOR.read(text))]
    pub r#for: Duration,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ForgetArgs {
    /// The run; none of its passes may be running or paused
    #[arg(required_unless_present = "pipeline")]
    pub run: Option<String>,
    /// Remove a whole pipeline instead, by its name: tables, views, streams and records, with all of its runs
    ///
    /// Says what that is; --yes does it. Any pipeline's program can remove any other's of the same namespace and database,
    /// so one that was renamed or mistyped can be removed too. No process may work for it.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["run", "pass"])]
    pub pipeline: Option<String>,
    /// Remove the pipeline
    #[arg(long, requires = "pipeline")]
    pub yes: bool,
    /// Only this pass, which must not be the one that readers see
    #[arg(long, value_name = "N")]
    pub pass: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RebuildArgs {
    /// The run
    pub run: String,
    /// This pass, and those that it took rows over from, as far as they are missing [default: the newest sealed one]
    #[arg(long, value_name = "N")]
    pub pass: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct SqlArgs {
    /// The query; without a FORMAT of its own it is printed as a table
    pub query: String,
}
