//! What the end-to-end tests share: pipelines that behave and misbehave, and real servers and processes around them.
//!
//! Every test has a data directory, servers and ports of its own; whatever it started ends with it. A wait carries the
//! state it waits for, and fails with it.

pub mod dice;
pub mod guest;
pub mod nats;
pub mod nats_server;
pub mod processes;
pub mod proxy;
pub mod stage;
pub mod variants;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use millstream::{Failure, Limits, Outcome, Pipeline};
use nix::sys::signal::{Signal, raise};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tempfile::TempDir;

/// Enough for anything that is not a first fetch of the servers, on a busy machine.
pub const SOON: Duration = Duration::from_secs(300);

/// Squares, with ids that misbehave: `n % 1000` of 901 rejects, 902 panics, 903 asks for another attempt for ever.
pub struct Trial;

/// A row of [`Trial`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Squared {
    /// `id * id`, wrapping.
    pub squared: u64,
}

impl Pipeline for Trial {
    const NAME: &'static str = "trial";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("squared", "UInt64")];
    // Ids that are never ready should not be waited for.
    const LIMITS: Limits = Limits { retry_for: Duration::ZERO, ..Limits::DEFAULT };
    type Id = u64;
    type Row = Squared;

    fn compute(&self, id: &u64) -> Outcome<Squared> {
        spin(micros("TRIAL_MICROS"));
        if std::env::var_os("TRIAL_TAME").is_none() {
            match id % 1000 {
                901 => return Err(Failure::reject("rejected")),
                902 => panic!("this id panics: {id}"),
                903 => return Err(Failure::retry("never ready")),
                _ => {}
            }
        }
        Ok(Squared { squared: id.wrapping_mul(*id) })
    }
}

/// Squares, with ids that end their process or never end: `n % 1000` of 101 panics, 102 aborts, 103 has a segmentation
/// fault, 104 loops for ever, 105 eats memory, 106 sleeps for an hour; `n % 100` of 97 asks for another attempt for ever.
pub struct Rogue;

impl Rogue {
    /// How an id becomes a dead letter, if it does: what its reason begins with.
    pub fn reason(id: u64) -> Option<&'static str> {
        match id % 1000 {
            101 => Some("panicked at "),
            102 => Some("crashed: signal 6"),
            103 => Some("crashed: signal 11"),
            104 | 106 => Some("timed out after 5 s"),
            105 => Some("out of memory: limit 256 MB"),
            _ if id % 100 == 97 => Some("gave up after every attempt: "),
            _ => None,
        }
    }
}

impl Pipeline for Rogue {
    const NAME: &'static str = "rogue";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("squared", "UInt64")];
    // Long enough that a machine which is busy with other things blames no other id.
    const LIMITS: Limits = Limits {
        hard: Some(Duration::from_secs(5)),
        memory: Some(256 << 20),
        retry_for: Duration::ZERO,
        ..Limits::DEFAULT
    };
    type Id = u64;
    type Row = Squared;

    fn compute(&self, id: &u64) -> Outcome<Squared> {
        match id % 1000 {
            101 => panic!("this id panics: {id}"),
            102 => std::process::abort(),
            103 => fault(),
            104 => spin(Duration::MAX),
            105 => eat(),
            106 => std::thread::sleep(Duration::from_secs(3600)),
            _ if id % 100 == 97 => return Err(Failure::retry("never ready")),
            _ => {}
        }
        Ok(Squared { squared: id.wrapping_mul(*id) })
    }
}

fn fault() {
    // Rust's own handler lets the first one pass.
    while raise(Signal::SIGSEGV).is_ok() {}
}

fn eat() {
    const PIECE: usize = 8 << 20;
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    // Far more than the limit and far less than any machine here has.
    while eaten.len() * PIECE < 4 << 30 {
        eaten.push(vec![1; PIECE]);
    }
    std::hint::black_box(eaten);
}

/// Lengths of words: ids are strings.
pub struct Words;

/// A row of [`Words`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Length {
    /// Characters of the id.
    pub length: u32,
}

impl Pipeline for Words {
    const NAME: &'static str = "words";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("length", "UInt32")];
    // A word that no language has makes it fail, which ClickHouse finds out as it reads the rows.
    const SUMMARY: Option<&'static str> = Some(
        "SELECT count() AS words, max(length) AS longest, argMax(id, length) AS word FROM {rows} \
         WHERE throwIf(length > 40, 'a word of more than 40 symbols') = 0",
    );
    type Id = String;
    type Row = Length;

    fn compute(&self, id: &String) -> Outcome<Length> {
        Ok(Length { length: id.chars().count() as u32 })
    }
}

/// Rows of noise that does not compress, about 100 KB each; of ids that end in 77 one of 9 MiB, which no message may be.
/// Ids are numbers, or strings that end in one. With `BULKY_PLAIN` set all rows are of 100 KB that cost nothing to make.
pub struct Bulky<I> {
    /// Who computed a row; 0 stands for anybody.
    pub by: u64,
    /// Ids that were tried before: those that end in 33 ask for a second attempt.
    tried: Mutex<HashSet<I>>,
}

/// A row of [`Bulky`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Bulk {
    /// Who computed it.
    pub by: u64,
    /// Noise.
    pub noise: String,
}

impl<I> Bulky<I> {
    /// Rows signed by this number.
    pub fn new(by: u64) -> Self {
        Self { by, tried: Mutex::default() }
    }
}

impl<I: millstream::Id> Pipeline for Bulky<I> {
    const NAME: &'static str = "bulky";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("by", "UInt64"), ("noise", "String")];
    type Id = I;
    type Row = Bulk;

    fn compute(&self, id: &I) -> Outcome<Bulk> {
        if std::env::var_os("BULKY_PLAIN").is_some() {
            return Ok(Bulk { by: self.by, noise: "0".repeat(100_000) });
        }
        let text = id.to_string();
        if text.ends_with("33") && self.tried.lock().expect("no panic").insert(id.clone()) {
            return Err(Failure::retry("at the second attempt"));
        }
        let size = if text.ends_with("77") { 9 << 20 } else { 70_000 + (id.sip_hash() % 60_000) as usize };
        Ok(Bulk { by: self.by, noise: noise(id.sip_hash() ^ self.by, size) })
    }
}

fn noise(seed: u64, size: usize) -> String {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b'0' + (state % 75) as u8)
    };
    (0..size).map(|_| next()).collect()
}

/// A time in microseconds from the environment; none where it is not set.
pub fn micros(variable: &str) -> Duration {
    Duration::from_micros(std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(0))
}

/// Keeps a core busy, as a heavy function does.
pub fn spin(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// How one process is started beside the others of its host.
#[derive(Debug, Clone, Default)]
pub struct Launch {
    /// The command's words.
    pub words: Vec<String>,
    /// Set for this process alone.
    pub env: Vec<(String, String)>,
    /// A command that executes the binary in its own place: `prlimit --nofile=64`, `ip netns exec a`.
    pub under: Vec<String>,
}

impl From<&[&str]> for Launch {
    fn from(words: &[&str]) -> Self {
        Self { words: words.iter().map(|word| (*word).to_owned()).collect(), ..Self::default() }
    }
}

/// A pipeline's binary with a data directory: commands run there, servers come up there.
pub struct Host {
    program: PathBuf,
    dir: TempDir,
    /// Set for every command.
    pub env: Vec<(String, String)>,
}

impl Host {
    /// A fresh directory for `program`, which is `env!("CARGO_BIN_EXE_…")`.
    pub fn new(program: &str) -> Self {
        let dir =
            tempfile::Builder::new().prefix("millstream-test-").tempdir().expect("a temporary directory");
        Self { program: program.into(), dir, env: Vec::new() }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A command of the binary, in the directory, without the environment's own servers.
    pub fn command(&self, args: &[&str]) -> Command {
        self.launch(&Launch::from(args))
    }

    fn launch(&self, launch: &Launch) -> Command {
        // A test binary that is killed takes what it started with it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).args(&launch.under).arg(&self.program);
        command.args(&launch.words).current_dir(self.path()).stdin(Stdio::null());
        for name in [
            "NATS_URL",
            "NATS_CREDS",
            "CLICKHOUSE_URL",
            "CLICKHOUSE_USER",
            "CLICKHOUSE_PASSWORD",
            "CLICKHOUSE_DATABASE",
        ] {
            command.env_remove(name);
        }
        command.envs(self.env.iter().chain(&launch.env).map(|(name, value)| (name, value)));
        command
    }

    /// Runs a command to its end.
    pub fn call(&self, args: &[&str]) -> Called {
        Called::from(self.command(args).output().expect("the binary starts"), args)
    }

    /// The same for a process that is not started as the others are.
    pub fn call_as(&self, launch: &Launch) -> Called {
        let words: Vec<&str> = launch.words.iter().map(String::as_str).collect();
        Called::from(self.launch(launch).output().expect("the binary starts"), &words)
    }

    /// Runs a command to its end, with this in its environment.
    pub fn call_with_env(&self, args: &[&str], env: &[(&str, &str)]) -> Called {
        let mut command = self.command(args);
        command.envs(env.iter().copied());
        Called::from(command.output().expect("the binary starts"), args)
    }

    /// Runs a command with this on its standard input.
    pub fn call_with_input(&self, args: &[&str], input: &[u8]) -> Called {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        child.stdin.take().expect("piped").write_all(input).expect("it reads its input");
        Called::from(child.wait_with_output().expect("it ends"), args)
    }

    /// Starts a command that goes on; its output is kept in a file of this name.
    pub fn start(&self, name: &str, args: &[&str]) -> Process {
        self.start_as(name, &Launch::from(args))
    }

    /// The same for a process that is not started as the others are.
    pub fn start_as(&self, name: &str, launch: &Launch) -> Process {
        let log = self.path().join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("a log file");
        let child = self
            .launch(launch)
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file)
            .spawn()
            .expect("the binary starts");
        Process { child, log }
    }

    /// Starts the local stack in the foreground of another process, and waits until it is up.
    pub fn up(&self) -> Up {
        let mut child = self
            .command(&["up"])
            .stdout(Stdio::piped())
            .stderr(
                File::options()
                    .create(true)
                    .append(true)
                    .open(self.path().join("up.log"))
                    .expect("a log file"),
            )
            .spawn()
            .expect("the binary starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
        let mut address = |name: &str| {
            let line = lines.next().unwrap_or_else(|| panic!("`up` ended: {}", self.log("up")));
            line.strip_prefix(name)
                .unwrap_or_else(|| panic!("`{line}` does not begin with {name}"))
                .trim()
                .to_owned()
        };
        let (nats, clickhouse) = (address("NATS"), address("ClickHouse"));
        Up {
            process: Process { child, log: self.path().join("up.log") },
            nats,
            clickhouse,
            data: self.path().join(".millstream"),
        }
    }

    /// What a process of that name has written so far.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Waits until a process of that name has written this.
    pub fn wait_log(&self, name: &str, part: &str) {
        wait_until(part, SOON, || {
            let log = self.log(name);
            if log.contains(part) { Ok(()) } else { Err(log) }
        });
    }

    /// What `doctor --json` says of one thing that it checks.
    pub fn check(&self, what: &str) -> Value {
        let doctor = self.call(&["doctor", "--json"]).json();
        let found =
            doctor["checks"].as_array().and_then(|checks| checks.iter().find(|check| check["what"] == what));
        found.unwrap_or_else(|| panic!("doctor has no `{what}`: {doctor}")).clone()
    }

    /// Copies every log to a place that outlives this host.
    ///
    /// # Errors
    /// When a file cannot be copied; the others are then not tried.
    pub fn keep_logs(&self, into: &Path) -> std::io::Result<()> {
        fs::create_dir_all(into)?;
        let dirs = [self.path().to_owned(), self.path().join(".millstream/logs")];
        let files = dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
        for file in files.filter(|file| file.path().extension().is_some_and(|ending| ending == "log")) {
            fs::copy(file.path(), into.join(file.file_name()))?;
        }
        Ok(())
    }

    /// `status --json` of a run.
    pub fn status(&self, run: &str) -> Value {
        self.call(&["status", run, "--json"]).json()
    }

    /// `verify --json` of a run.
    pub fn verify(&self, run: &str) -> Value {
        self.call(&["verify", run, "--json"]).json()
    }

    /// Waits until the run is sealed.
    pub fn wait_sealed(&self, run: &str, within: Duration) {
        wait_until(&format!("run `{run}` sealed"), within, || {
            let called = self.call(&["status", run, "--json"]);
            if called.stdout.contains("\"state\":\"sealed\"") {
                Ok(())
            } else {
                Err(format!("{} {}", called.stdout, called.stderr))
            }
        });
    }
}

/// A command that ended.
#[derive(Debug)]
pub struct Called {
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    args: Vec<String>,
}

impl Called {
    fn from(output: Output, args: &[&str]) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        }
    }

    /// Fails the test unless it ended with this code.
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{:?}\nstdout:\n{}\nstderr:\n{}", self.args, self.stdout, self.stderr);
        self
    }

    /// Fails the test unless stderr has all of these.
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "`{part}` is not said by {:?}:\n{}", self.args, self.stderr);
        }
        self
    }

    /// Its output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| {
            panic!("{:?}: {error}\nstdout:\n{}\nstderr:\n{}", self.args, self.stdout, self.stderr)
        })
    }
}

/// A process that goes on; killed when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// Sends a signal by name: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for the end.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let log = self.log.clone();
        wait_until("the end of a process", within, || {
            self.child
                .try_wait()
                .expect("it can be waited for")
                .ok_or_else(|| fs::read_to_string(&log).unwrap_or_default())
        })
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.ended().is_none()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it can be waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.runs() {
            self.kill();
        }
        if std::thread::panicking() {
            eprint_log(&self.log);
        }
    }
}

/// The local stack in a process of its own.
pub struct Up {
    /// The process.
    pub process: Process,
    /// NATS's address.
    pub nats: String,
    /// ClickHouse's address.
    pub clickhouse: String,
    data: PathBuf,
}

impl Up {
    /// SIGKILL to nats-server, which the stack then starts again.
    pub fn kill_nats(&self) {
        for pid in self.pids("nats-server") {
            signal(pid, "KILL");
        }
    }

    /// SIGKILL to ClickHouse, which the stack then starts again.
    pub fn kill_clickhouse(&self) {
        for pid in self.pids("__local-engine") {
            signal(pid, "KILL");
        }
    }

    /// Servers of this data directory whose command line names `what`; not their guards.
    pub fn pids(&self, what: &str) -> Vec<u32> {
        let data = self.data.to_string_lossy().into_owned();
        let processes = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
        processes
            .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                line.contains(&data) && line.contains(what) && !line.contains("__local-guard")
            })
            .collect()
    }

    /// What ClickHouse answers to a query, asked over plain HTTP: no code of ours between.
    pub fn ask(&self, query: &str) -> String {
        wait_until(&format!("an answer to {query}"), SOON, || {
            ask_clickhouse(&self.clickhouse, query).map_err(|error| error.to_string())
        })
    }

    /// The same as a number.
    pub fn number(&self, query: &str) -> u64 {
        let answer = self.ask(query);
        answer.trim().parse().unwrap_or_else(|_| panic!("{query}: {answer}"))
    }
}

/// What the ClickHouse at `url` answers to a query over plain HTTP.
///
/// # Errors
/// When it does not answer, or not with 200: then the error is its answer.
pub fn ask_clickhouse(url: &str, body: &str) -> std::io::Result<String> {
    let host = url.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(stream, "POST / HTTP/1.0\r\nHost: {host}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
        _ => Err(std::io::Error::other(answer)),
    }
}

/// Sends a signal by name.
pub fn signal(pid: u32, name: &str) {
    // A process that is gone already is what the signal is for.
    Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .stderr(Stdio::null())
        .status()
        .expect("`kill` runs");
}

/// Asks until the answer is there; fails the test with the last state after `within`.
pub fn wait_until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let limit = Instant::now() + within;
    loop {
        match look() {
            Ok(found) => return found,
            Err(state) if Instant::now() > limit => panic!("no {what} within {within:?}: {state}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[expect(clippy::print_stderr, reason = "the log of a failed test's process")]
fn eprint_log(path: &Path) {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(40)..];
    eprintln!("--- {}\n{}", path.display(), tail.join("\n"));
}
