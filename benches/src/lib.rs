//! The pipeline of known weight that the benchmarks measure; the figures are in `benches/figures.rs`.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use millstream::{Outcome, Pipeline};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tempfile::TempDir;

/// Rounds of arithmetic for each id, given in the environment so that the bound and the run do the same.
pub const ROUNDS: &str = "HEAVY_ROUNDS";

/// A function of a fixed amount of arithmetic: real work, which a busy machine slows as it slows any other.
pub struct Heavy {
    rounds: u64,
}

/// A row of [`Heavy`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Mixed {
    /// Where the arithmetic ended.
    pub mixed: u64,
}

impl Heavy {
    /// As many rounds as given.
    pub fn new(rounds: u64) -> Self {
        Self { rounds }
    }

    /// As many rounds as the environment says.
    pub fn from_env() -> Self {
        let rounds = std::env::var(ROUNDS).ok().and_then(|text| text.parse().ok()).unwrap_or(1000);
        Self::new(rounds)
    }
}

impl Pipeline for Heavy {
    const NAME: &'static str = "heavy";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("mixed", "UInt64")];
    type Id = u64;
    type Row = Mixed;

    fn compute(&self, id: &u64) -> Outcome<Mixed> {
        Ok(Mixed { mixed: mix(*id, self.rounds) })
    }
}

/// A chain of multiplications that no compiler can shorten.
pub fn mix(id: u64, rounds: u64) -> u64 {
    (0..rounds)
        .fold(id | 1, |state, round| (state ^ (state >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ round)
}

/// The local stack of a fresh directory in a process of its own.
pub struct Up {
    program: &'static str,
    dir: TempDir,
    /// ClickHouse's address.
    pub clickhouse: String,
    _process: Stage,
}

/// A process that ends, in good order, when this is dropped.
pub struct Stage(Child);

impl Stage {
    /// Its process.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let told = Command::new("kill").arg(self.0.id().to_string()).status();
        assert!(told.is_ok_and(|status| status.success()), "a stage ended before it was told to");
        self.0.wait().expect("it ends");
    }
}

impl Up {
    /// Starts the servers of this pipeline's binary.
    pub fn start(program: &'static str) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let mut child = quiet(program, dir.path(), &["up"]).stdout(Stdio::piped()).spawn().expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let addresses: Vec<String> = lines.map_while(Result::ok).take(2).collect();
        let clickhouse = addresses[1].split_whitespace().last().expect("an address").to_owned();
        Self { program, dir, clickhouse, _process: Stage(child) }
    }

    /// A command on those servers.
    pub fn command(&self, args: &[&str]) -> Command {
        quiet(self.program, self.dir.path(), args)
    }

    /// A service on those servers.
    pub fn start_stage(&self, args: &[&str]) -> Stage {
        Stage(self.command(args).spawn().expect("starts"))
    }

    /// What `status --json` says of a run, if it says anything yet.
    pub fn status(&self, run: &str) -> Option<Value> {
        let output =
            self.command(&["status", run, "--json"]).stdout(Stdio::piped()).output().expect("starts");
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Whether a run is sealed.
    pub fn is_sealed(&self, run: &str) -> bool {
        self.status(run).is_some_and(|status| status["state"] == "sealed")
    }
}

fn quiet(program: &str, dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).args(["--log", "error"]).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::null());
    command
}
