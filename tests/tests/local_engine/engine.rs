//! A child that serves the engine, and requests to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use clickhouse::Client;
use millstream_local::{ClickHouse, Progress};
use tempfile::TempDir;

pub const DEADLINE: Duration = Duration::from_secs(60);

/// Fetched into the user's cache by the first test that needs it, unless it is there.
pub fn library() -> PathBuf {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND
        .get_or_init(|| std::env::var_os("MILLSTREAM_TEST_LIBCHDB").map_or_else(cached, PathBuf::from))
        .clone()
}

/// On a thread of its own, since some tests are within a runtime.
fn cached() -> PathBuf {
    let find = || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let progress: Progress = Arc::new(|_| {});
        runtime.block_on(millstream_local::find_clickhouse(&progress)).expect("a ClickHouse")
    };
    match std::thread::spawn(find).join().expect("a ClickHouse") {
        ClickHouse::Library(library) => library,
        ClickHouse::Server(binary) => {
            panic!("`{}` is on PATH: name libchdb.so in MILLSTREAM_TEST_LIBCHDB", binary.display())
        }
    }
}

pub fn command(lib: &Path, path: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_probe"));
    command.arg("__local-engine").arg("--lib").arg(lib).arg("--path").arg(path).args(["--port", "0"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// A child that serves `dir`; killed when dropped.
pub struct Engine {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub port: u16,
}

impl Engine {
    pub fn start(dir: &TempDir) -> Self {
        let mut child = command(&library(), &dir.path().join("data")).spawn().expect("the probe starts");
        let stdin = child.stdin.take();
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let ready: serde_json::Value = serde_json::from_str(&line).expect("one JSON line when ready");
        let port = ready["port"].as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port");
        Self { child, stdin, port }
    }

    pub fn client(&self) -> Client {
        Client::default().with_url(format!("http://127.0.0.1:{}", self.port))
    }

    /// Runs `sql`; answers its status and text.
    pub fn ask(&self, parameters: &str, sql: impl AsRef<[u8]>) -> (u16, String) {
        let answer = self.send(&post(parameters, sql.as_ref()));
        (answer.status, answer.text)
    }

    pub fn must(&self, sql: impl AsRef<[u8]>) -> String {
        let (status, text) = self.ask("", sql.as_ref());
        assert_eq!(status, 200, "{}: {text}", String::from_utf8_lossy(sql.as_ref()));
        text.trim_end().to_owned()
    }

    pub fn send(&self, request: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request).expect("the request is taken");
        read(stream)
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream
    }

    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "the child does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs");
        assert!(status.success());
    }

    /// Waits until `sql` answers `expected`.
    pub fn until(&self, sql: &str, expected: &str) {
        let start = Instant::now();
        loop {
            let found = self.must(sql);
            if found == expected {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "{sql}: {found} instead of {expected}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }
}

pub fn post(parameters: &str, body: &[u8]) -> Vec<u8> {
    coded("", parameters, body)
}

/// A body of the Content-Encoding `coding`; of none if that is empty.
pub fn coded(coding: &str, parameters: &str, body: &[u8]) -> Vec<u8> {
    let header = match coding {
        "" => String::new(),
        coding => format!("Content-Encoding: {coding}\r\n"),
    };
    let head = format!(
        "POST /?{parameters} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}Content-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub bytes: Vec<u8>,
    pub text: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

pub fn read(mut stream: TcpStream) -> Answer {
    const BLANK: &[u8] = b"\r\n\r\n";
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an answer");
    let end = bytes.windows(BLANK.len()).position(|window| window == BLANK).unwrap_or(bytes.len());
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    bytes.drain(..(end + BLANK.len()).min(bytes.len()));
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Answer { status, head, bytes, text }
}

/// For a query string.
pub fn escaped(sql: &str) -> String {
    sql.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

pub fn served() -> (TempDir, Engine) {
    let dir = tempfile::tempdir().expect("a directory");
    let engine = Engine::start(&dir);
    (dir, engine)
}

/// Runs until it is killed.
pub const ENDLESS: &str = "SELECT count() FROM numbers(1000000000000) WHERE sipHash64(number) = 1";

pub fn seen(query_id: &str) -> String {
    format!("SELECT count() FROM system.processes WHERE query_id = '{query_id}'")
}
