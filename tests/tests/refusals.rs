//! Bad input is refused with what failed, the value and what to do about it, and leaves nothing behind.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;
use tests::nats::Nats;
use tests::nats_server::NatsServer;
use tests::{Called, Host, SOON, Up, wait_until};

/// How the local stack says that it must start, or does so.
const LOCAL: &str = ".millstream";

fn trial() -> Host {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    host
}

/// A refusal, without the log that may come before it.
fn refusal(called: &Called) -> &str {
    called.stderr.find("error: ").map_or("", |at| &called.stderr[at..])
}

/// Fails unless no server was started and nothing was written.
fn nothing_was_started(host: &Host) {
    assert!(!host.path().join(LOCAL).exists(), "the local stack was started");
}

/// Fails unless there is no run, no message and no row.
fn nothing_was_left(host: &Host, up: &Up) {
    assert_eq!(host.call(&["runs", "--json"]).expect(0).json(), serde_json::json!([]));
    let counts = ["trial_ids", "trial_rows"].map(|stream| messages(&up.nats, stream));
    assert_eq!(counts, [0, 0], "messages in the streams");
    assert_eq!(up.number("SELECT count() FROM millstream.trial_rows"), 0);
}

/// Messages of a stream, asked over plain TCP: no code of ours between.
fn messages(nats: &str, stream: &str) -> u64 {
    let mut socket = TcpStream::connect(nats.trim_start_matches("nats://")).expect("NATS listens");
    socket.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    let ask = format!(
        "CONNECT {{\"verbose\":false}}\r\nSUB answer 1\r\nPUB $JS.API.STREAM.INFO.{stream} answer 0\r\n\r\n"
    );
    socket.write_all(ask.as_bytes()).expect("NATS reads");
    let mut lines = BufReader::new(socket).lines().map_while(Result::ok);
    let answer = lines.find(|line| line.starts_with('{')).expect("an answer");
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    answer["state"]["messages"].as_u64().unwrap_or_else(|| panic!("no stream {stream}: {answer}"))
}

#[test]
fn wrong_words_are_refused_before_anything_is_started() {
    let host = trial();
    let long = "r".repeat(65);
    let table: &[(&[&str], &[&str])] = &[
        (&["produce", "--ids", "5..5"], &["error: --ids: `5..5` is empty"]),
        (&["run", "--ids", "0..0"], &["error: --ids: `0..0` is empty"]),
        (&["produce", "--ids", "9..=3"], &["error: --ids: `9..=3` is reversed: it ends before it begins"]),
        (&["run", "--ids", "9..3"], &["error: --ids: `9..3` is reversed"]),
        (&["produce", "--ids", "ten"], &["error: --ids: `ten` is not a range like 1..=100 or 1..101"]),
        (
            &["produce", "--ids", "1..=18446744073709551616"],
            &["where a whole number from 0 to 2^64-1 should be"],
        ),
        (
            &["produce", "--ids", "1..=9", "--batch", "0"],
            &["error: --batch: `0` is neither `auto` nor a number in 1..=500000"],
        ),
        (&["produce", "--ids", "1..=9", "--batch", "many"], &["error: --batch: `many` is neither `auto`"]),
        (&["run", "--ids", "1..=9", "--batch", "500001"], &["error: --batch: `500001` is neither `auto`"]),
        (&["run", "--ids", "1..=9", "--threads", "0"], &["--threads: 0 is outside 1 to 4096"]),
        (&["work", "--threads", "5000"], &["--threads: 5000 is outside 1 to 4096"]),
        (&["work", "--threads", "two"], &["invalid value 'two' for '--threads <N>'"]),
        (
            &["produce", "--ids", "1..=9", "--run", "a b"],
            &["--run: run name `a b` is not 1 to 64 of A-Z a-z 0-9 _ -"],
        ),
        (&["produce", "--ids", "1..=9", "--run", "a.b"], &["--run: run name `a.b` is not"]),
        (&["produce", "--ids", "1..=9", "--run", ""], &["--run: run name `` is not"]),
        (&["produce", "--ids", "1..=9", "--run", &long], &["--run: run name `rrr"]),
        (
            &["run", "--ids", "2..1", "--run", "*", "--batch", "1.5"],
            &[
                "error: the command line has 3 faults:",
                "\n  --ids: `2..1`",
                "\n  --run: run name `*`",
                "\n  --batch: `1.5`",
            ],
        ),
        (&["produce"], &["<--ids <RANGE>|--file <FILE>|--stdin|--query <SQL>>"]),
        (&["produce", "--ids", "1..=9", "--stdin"], &["'--ids <RANGE>' cannot be used with '--stdin'"]),
        (
            &["produce", "--ids", "1..=9", "--column", "id"],
            &["error: --column is for CSV in a --file or on --stdin"],
        ),
        (
            &["run", "--file", "a", "--delimiter", ";"],
            &["error: --delimiter is for CSV, whose column --column names"],
        ),
        (&["run", "--file", "a", "--no-header"], &["error: --no-header is for CSV"]),
        (
            &["run", "--file", "a", "--no-header", "--column", "id"],
            &["error: --column: `id` is not a number from 1, as --no-header wants it"],
        ),
        (
            &["produce", "--query", "SELECT 1 FORMAT CSV"],
            &["error: --query: `FORMAT CSV` has no place here, every value is read as it is: leave it out"],
        ),
        (&["run", "--file", "-"], &["error: --file: `-` is no file here; --stdin reads standard input"]),
        (
            &["produce", "--stdin", "--follow", "--column", "id"],
            &["'--follow' cannot be used with '--column <NAME>'"],
        ),
        (&["status", "a b"], &["error: run name `a b` is not"]),
        (&["verify", "a b"], &["error: run name `a b` is not"]),
        (&["dead", "a b"], &["error: run name `a b` is not"]),
        (&["dead"], &["<RUN>"]),
        (
            &["runs", "--nats", "somewhere:4222"],
            &["--nats: `somewhere:4222` is not an address like nats://host:port"],
        ),
        (
            &["runs", "--clickhouse", "somewhere"],
            &["--clickhouse: `somewhere` is not an address like http://host:port"],
        ),
        (&["runs", "--database", "a/b"], &["--database: `a/b` is not a database name"]),
        (&["runs", "--log", "a=b=c"], &["--log: `a=b=c` is not a log filter"]),
        (
            &["runs", "--log", "inof"],
            &["--log: `inof` is not a log filter: `inof` is no level: off, error, warn"],
        ),
        (&["replay", "a", "--since", "10M"], &["10M"]),
        (&["runs", "--config", "no.toml"], &["no.toml: No such file or directory"]),
        (&["grind"], &["unrecognized subcommand 'grind'"]),
        (&["work"], &["no servers are named", "hint: start `up`"]),
        (&["sink"], &["no servers are named", "hint: start `up`"]),
    ];
    for (args, parts) in table {
        let called = host.call(args).expect(2).says(parts);
        assert_eq!(called.stdout, "", "{args:?}");
        assert_eq!(called.stderr.matches("error:").count(), 1, "{}", called.stderr);
    }
}

#[test]
fn files_are_refused_before_anything_is_started() {
    let host = trial();
    let write = |name: &str, bytes: &[u8]| fs::write(host.path().join(name), bytes).expect("written");
    write("bad.txt", b"1\nx\n3\n-4\n");
    write("one.txt", b"1\n2\n3 4\n");
    write("many.txt", "x\n".repeat(12).as_bytes());
    write("bytes.txt", b"1\n\xff\xfe\n");
    write("users.csv", b"name,id\nann,1\nbob,two\ncid\ndot,4\n");
    fs::create_dir(host.path().join("folder")).expect("made");
    let table: &[(&[&str], &str)] = &[
        (
            &["--file", "bad.txt"],
            "error: failed to read file `bad.txt`: 2 of its lines hold no id\n  \
             line 2: `x` is not a whole number from 0 to 18446744073709551615\n  \
             line 4: `-4` is not a whole number from 0 to 18446744073709551615\n\
             hint: nothing was published; mend these lines and try again, or pass them over with --skip-bad\n",
        ),
        (
            &["--file", "one.txt"],
            "error: failed to read file `one.txt`: a line of it holds no id\n  line 3: `3 4` is not",
        ),
        (
            &["--file", "many.txt"],
            "error: failed to read file `many.txt`: 12 of its lines hold no id\n  line 1: `x`",
        ),
        (&["--file", "bytes.txt"], "a line of it holds no id\n  line 2: it is not UTF-8: `\\xff\\xfe`\n"),
        (
            &["--file", "missing.txt"],
            "error: failed to read file `missing.txt`\n  No such file or directory (os error 2)\n\
             hint: name a file that is there; a relative path begins at the working directory\n",
        ),
        (
            &["--file", "folder"],
            "error: failed to read file `folder`\n  is a directory\nhint: name a file in it\n",
        ),
        (
            &["--file", "users.csv", "--column", "key"],
            "error: failed to read column `key` of file `users.csv`: it has no such column, its columns are `name`, `id`\n\
             hint: choose one of them with --column; where the first line is no header, --no-header takes columns by number: \
             --column 1\n",
        ),
        (
            &["--file", "users.csv", "--column", "id"],
            "error: failed to read column `id` of file `users.csv`: 2 of its lines hold no id\n  line 3: `two` is not a whole \
             number from 0 to 18446744073709551615\n  line 4: it has 1 field, the header has 2 fields\n",
        ),
        (
            &["--file", "users.csv"],
            "hint: nothing was published; one id a line is wanted, or the column of a CSV file with",
        ),
    ];
    for (source, text) in table {
        for command in ["produce", "run"] {
            let called = host.call(&[&[command], *source].concat()).expect(1);
            assert!(refusal(&called).contains(text), "{source:?}: `{text}` is not in\n{}", called.stderr);
            assert_eq!(called.stdout, "", "{source:?}");
        }
    }
    let many = host.call(&["produce", "--file", "many.txt"]).expect(1);
    assert!(many.stderr.contains("\n  … and 2 more\n"), "{}", many.stderr);
    let input = host.call_with_input(&["run", "--stdin"], b"7\nseven\n").expect(1);
    assert!(
        refusal(&input)
            .starts_with("error: failed to read standard input: a line of it holds no id\n  line 2: `seven`"),
        "{}",
        input.stderr
    );
    nothing_was_started(&host);
}

#[test]
fn queries_that_give_no_ids_are_refused() {
    let host = trial();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    let table: &[(&str, &[&str])] = &[
        ("SELEC 1", &["failed to run the query in ClickHouse", "code 62: Syntax error"]),
        (
            "SELECT 1, 2",
            &[
                "its columns are `1` UInt8, `2` UInt8, one of type UInt64 is needed",
                "hint: select one column",
            ],
        ),
        (
            "SELECT 'one' AS id",
            &[
                "its columns are `id` String, one of type UInt64 is needed",
                "SELECT accurateCast(id, 'UInt64') …",
            ],
        ),
        ("SELECT toInt64(-1) AS id", &["its columns are `id` Int64, one of type UInt64 is needed"]),
        ("SELECT id FROM users", &["code 60: ", "users"]),
        ("SELECT toNullable(1) AS id", &["`id` Nullable(UInt8)", "hint: a NULL is no id: "]),
    ];
    for (query, parts) in table {
        host.call(&["produce", "--query", query]).expect(1).says(parts).says(&["error: failed to"]);
    }
    host.call(&["run", "--query", "SELECT 1, 2"]).expect(1);
    nothing_was_left(&host, &up);
}

#[test]
fn an_unreachable_server_is_named_with_the_place_its_address_came_from() {
    let host = trial();
    fs::write(
        host.path().join("servers.toml"),
        "[nats]\nurl = 'nats://127.0.0.1:1'\n[clickhouse]\nurl = 'http://127.0.0.1:1'\n",
    )
    .expect("written");
    let hint = "hint: start nats-server there, name another with --nats URL or NATS_URL, or name none to use the local stack";
    let nats =
        |origin: &str| format!("error: failed to connect to NATS at `nats://127.0.0.1:1` ({origin})\n");
    let call = |args: &[&str], env: &[(&str, &str)]| {
        let output = host.command(args).envs(env.iter().copied()).output().expect("it starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let named = [
        call(
            &[
                "produce",
                "--ids",
                "1..=9",
                "--nats",
                "nats://127.0.0.1:1",
                "--clickhouse",
                "http://127.0.0.1:1",
            ],
            &[],
        ),
        call(&["work"], &[("NATS_URL", "nats://127.0.0.1:1"), ("CLICKHOUSE_URL", "http://127.0.0.1:1")]),
        call(&["sink", "--config", "servers.toml"], &[]),
    ];
    for ((code, said), origin) in named.into_iter().zip(["--nats", "NATS_URL", "nats.url in servers.toml"]) {
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(&nats(origin)) && said.contains("refused") && said.contains(hint), "{said}");
    }
    // A password in an address is nobody's to read.
    let (_, said) =
        call(&["runs", "--nats", "nats://me:secret@127.0.0.1:1", "--clickhouse", "http://127.0.0.1:1"], &[]);
    assert!(said.contains("failed to connect to NATS") && !said.contains("secret"), "{said}");
    nothing_was_started(&host);

    let hint = "hint: start ClickHouse there, name another with --clickhouse URL or CLICKHOUSE_URL, or name none to use the local stack";
    let store =
        |origin: &str| format!("error: failed to connect to ClickHouse at `http://127.0.0.1:1` ({origin})\n");
    let up = host.up();
    fs::write(host.path().join("servers.toml"), "[clickhouse]\nurl = 'http://127.0.0.1:1'\n")
        .expect("written");
    let named = [
        call(&["produce", "--ids", "1..=9", "--clickhouse", "http://127.0.0.1:1"], &[]),
        call(&["runs"], &[("CLICKHOUSE_URL", "http://127.0.0.1:1")]),
        call(&["sql", "SELECT 1", "--config", "servers.toml"], &[]),
    ];
    for ((code, said), origin) in
        named.into_iter().zip(["--clickhouse", "CLICKHOUSE_URL", "clickhouse.url in servers.toml"])
    {
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(&store(origin)) && said.contains("refused") && said.contains(hint), "{said}");
    }
    host.call(&["setup"]).expect(0);
    nothing_was_left(&host, &up);
}

#[test]
fn a_wrong_nats_password_is_told_from_a_server_that_is_away() {
    let host = trial();
    let nats = NatsServer::start(&host.path().join("nats"), "authorization { user: mill, password: stream }");
    let address = |credentials: &str| nats.url("nats", credentials);
    for (credentials, hint) in [
        ("", "hint: the server wants credentials and none were given: give them with --nats-creds FILE"),
        (
            "mill:brook@",
            "hint: the server wants other credentials than user `mill` and the password in the address: give them with",
        ),
    ] {
        host.call(&["produce", "--ids", "1..=9", "--nats", &address(credentials)]).expect(1).says(&[
            &format!(
                "error: failed to connect to NATS at `{}` (--nats)\n  authorization violation",
                address("")
            ),
            hint,
        ]);
    }
    let called = host.call(&["runs", "--nats", &address(""), "--nats-creds", "no.creds"]).expect(1);
    called.says(&[
        "failed to read NATS credentials from `no.creds`",
        "No such file",
        "hint: name a credentials file",
    ]);
    // The right one, so that the test is of the password.
    host.call(&["setup", "--nats", &address("mill:stream@")]).expect(0);
    assert_eq!(
        host.call(&["runs", "--json", "--nats", &address("mill:stream@")]).expect(0).json(),
        serde_json::json!([])
    );
}

#[test]
fn a_wrong_clickhouse_password_is_told_from_a_server_that_is_away() {
    let host = trial();
    let address = refuse_password();
    let output = host
        .command(&["sql", "SELECT 1", "--clickhouse", &address])
        .env("CLICKHOUSE_PASSWORD", "wrong")
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in [
        &format!(
            "error: failed to connect to ClickHouse at `{address}` (--clickhouse)\n  code 516: default: Authentication failed"
        )[..],
        "hint: give the right ones with CLICKHOUSE_USER and CLICKHOUSE_PASSWORD",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!said.contains("wrong\n") && !said.contains("`wrong`"), "{said}");
    let nats = NatsServer::start(&host.path().join("nats"), "");
    let named = ["doctor", "--clickhouse", &address, "--nats", &nats.url("nats", "")];
    let doctor = host.call(&named).expect(1);
    assert!(
        doctor.stdout.contains("FAIL  ClickHouse     failed to connect to ClickHouse"),
        "{}",
        doctor.stdout
    );
}

/// Answers every request as a ClickHouse does whose password is another; the local one has none.
fn refuse_password() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("bound"));
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(socket);
            let mut length = 0;
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|bytes| bytes > 2) {
                let header = line.to_ascii_lowercase();
                length = header
                    .strip_prefix("content-length:")
                    .map_or(length, |text| text.trim().parse().unwrap_or(0));
                line.clear();
            }
            let mut body = vec![0; length];
            let text = "Code: 516. DB::Exception: default: Authentication failed: password is incorrect, or there is no user \
                        with such name. (AUTHENTICATION_FAILED) (version 26.5.1.1)\n";
            let answer = format!(
                "HTTP/1.1 403 Forbidden\r\nX-ClickHouse-Exception-Code: 516\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            );
            // A client that is gone needs no answer.
            drop(reader.read_exact(&mut body).and_then(|()| reader.get_mut().write_all(answer.as_bytes())));
        }
    });
    address
}

#[test]
fn a_table_with_other_columns_is_refused_column_by_column() {
    let host = trial();
    let up = host.up();
    up.ask("CREATE DATABASE millstream");
    up.ask(
        "CREATE TABLE millstream.trial_rows (run String, pass UInt32, batch UInt32, id String, squared Int8, note String) \
         ENGINE = MergeTree ORDER BY id",
    );
    for args in [&["produce", "--ids", "1..=9"][..], &["setup"], &["work"], &["sink"]] {
        let called = host.call(args).expect(1).says(&[
            "error: failed to use table `millstream`.`trial_rows`, which does not take the pipeline's rows:\n",
            "\n  its engine is MergeTree, which does not replace rows: ReplacingMergeTree is needed\n",
            "\n  it is sorted by `id`, not by `run, pass, batch, id`\n",
            "\n  column `id` is Millstream's own and has type String, it must be UInt64\n",
            "\n  column `squared`: the table has Int8, a row takes UInt64; `ALTER TABLE ",
            "\n  column `error` is missing: `setup --yes` adds it, as String\n",
            "hint: change the pipeline's columns, alter the table, or use another database with --database",
        ]);
        assert_eq!(called.stdout, "");
    }
    assert_eq!(up.number("SELECT count() FROM millstream.trial_rows"), 0);
    host.call(&["produce", "--ids", "1..=9", "--database", "other"]).expect(0);
    assert_eq!(
        up.number("SELECT count() FROM system.tables WHERE database = 'other' AND name = 'trial_rows'"),
        1
    );
}

/// A file system in memory, unmounted when dropped. `None` where this process may not mount.
struct Mount(PathBuf);

impl Mount {
    fn new(dir: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir_all(&dir).expect("made");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&dir).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(dir)),
            Ok(output) => say_skipped(&String::from_utf8_lossy(&output.stderr)),
            Err(error) => say_skipped(&error.to_string()),
        }
    }

    fn data(&self) -> &str {
        self.0.to_str().expect("UTF-8")
    }

    /// Fills it but for so many bytes; the file frees it again.
    fn fill_but(&self, bytes: usize) -> PathBuf {
        let ballast = self.0.join("ballast");
        let mut file = fs::File::create(&ballast).expect("created");
        let block = vec![0u8; 1 << 20];
        while file.write_all(&block).is_ok() {}
        while file.write_all(&block[..4096]).is_ok() {}
        let length = file.metadata().expect("known").len();
        file.set_len(length.saturating_sub(bytes as u64)).expect("cut");
        ballast
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[expect(clippy::print_stderr, reason = "what could not be tested here says why")]
fn say_skipped<T>(why: &str) -> Option<T> {
    eprintln!("skipped: a file system cannot be mounted here: {}", why.trim());
    None
}

/// One hint for each cause, from servers that are there.
#[test]
fn why_a_server_cannot_be_reached_is_told_by_its_cause() {
    let host = trial();
    let up = host.up();
    let port = |url: &str| url.rsplit(':').next().expect("a port").to_owned();
    let (nats, clickhouse) = (port(&up.nats), port(&up.clickhouse));
    for (url, hint) in [
        (format!("http://127.0.0.1:{nats}"), "does not speak HTTP"),
        (format!("https://127.0.0.1:{clickhouse}"), "does not speak TLS: write http://"),
        ("http://nowhere.invalid:8123".to_owned(), "the host's name is not known"),
    ] {
        host.call(&["sql", "SELECT 1", "--clickhouse", &url]).expect(1).says(&["hint: ", hint]);
    }
    for (url, hint) in [
        (format!("nats://127.0.0.1:{clickhouse}"), "says nothing that NATS would"),
        (format!("tls://127.0.0.1:{nats}"), "does not speak TLS: write nats://"),
        ("nats://nowhere.invalid:1".to_owned(), "the host's name is not known"),
        ("nats://a:b@127.0.0.1:1,nats://c:d@127.0.0.1:2".to_owned(), "the same user and password"),
    ] {
        let called = host.call(&["runs", "--nats", &url, "--clickhouse", &up.clickhouse]).expect(1);
        called.says(&["hint: ", hint]);
    }
}

#[test]
fn a_disk_that_is_full_at_the_start_is_told() {
    let host = trial();
    let Some(disk) = Mount::new(host.path().join("small"), "size=8M") else { return };
    // Streams reserve little at first, so a small disk is enough for a small run.
    host.call(&["run", "--ids", "1..=9", "--data", disk.data()]).expect(0);
    let ballast = disk.fill_but(0);
    let called = host.call(&["run", "--ids", "1..=9", "--data", disk.data()]).expect(1);
    called.says(&["error: failed to ", "o space left on device", "hint: free some space"]);
    fs::remove_file(ballast).expect("removed");
}

#[test]
fn doctor_says_that_a_disk_is_full() {
    let host = trial();
    let Some(disk) = Mount::new(host.path().join("small"), "size=8M") else { return };
    host.call(&["setup", "--data", disk.data()]).expect(0);
    let doctor = host.call(&["doctor", "--data", disk.data()]).expect(1).stdout;
    for part in ["FAIL  disk ", "FAIL  table disk ", "it is full\n", "hint: free some space there [MS0013]\n"]
    {
        assert!(doctor.contains(part), "`{part}` is not in {doctor}");
    }
}

#[test]
fn a_disk_that_fills_up_is_told_and_the_run_goes_on_when_there_is_space() {
    let host = trial();
    let Some(disk) = Mount::new(host.path().join("small"), "size=1000M") else { return };
    host.call(&["run", "--ids", "1..=9", "--run", "first", "--data", disk.data()]).expect(0);
    let ballast = disk.fill_but(512 << 10);
    let args = ["run", "--ids", "1..=100000", "--batch", "10000", "--run", "full", "--data", disk.data()];
    let mut run = host.start("run", &args);
    wait_until("a word about the disk", SOON, || {
        let log = host.log("run");
        assert!(run.runs(), "{log}");
        if log.contains("ot enough space") || log.contains("o space left on device") {
            Ok(())
        } else {
            Err(log)
        }
    });
    fs::remove_file(ballast).expect("removed");
    assert_eq!(run.wait(SOON).code(), Some(0), "{}", host.log("run"));
    let report = host.call(&["verify", "full", "--json", "--data", disk.data()]).expect(0).json();
    assert_eq!((&report["rows"], &report["sealed"]), (&100_000.into(), &true.into()));
}

#[test]
fn a_data_directory_that_cannot_be_written_is_refused() {
    let host = trial();
    fs::write(host.path().join("file"), "").expect("written");
    for data in ["file", "file/below", "/proc/millstream"] {
        host.call(&["run", "--ids", "1..=9", "--data", data]).expect(1).says(&[
            &format!("error: failed to use `{data}`"),
            "(os error ",
            "hint: name a directory that can be written with --data",
        ]);
    }
    let Some(disk) = Mount::new(host.path().join("fixed"), "size=1M,ro") else { return };
    let called = host.call(&["run", "--ids", "1..=9", "--data", disk.data()]).expect(1);
    called.says(&["Read-only file system", "hint: name a directory that can be written with --data"]);
}

#[test]
fn a_run_name_that_is_taken_by_other_ids_is_refused() {
    let host = trial();
    let up = host.up();
    let write = |name: &str, text: &str| fs::write(host.path().join(name), text).expect("written");
    write("a.txt", "1\n2\n3\n");
    write("b.txt", "1\n2\n4\n");
    host.call(&["produce", "--ids", "1..=100", "--batch", "10", "--run", "range"]).expect(0);
    host.call(&["produce", "--file", "a.txt", "--batch", "10", "--run", "file"]).expect(0);
    let messages_before = messages(&up.nats, "trial_ids");
    let (range, file) =
        ("`--ids 1..=100 --run range` goes on", "`--file a.txt --run file`, with the ids that were in it,");
    let table: &[(&[&str], &str, &str)] = &[
        (
            &["--ids", "1..=101", "--batch", "10", "--run", "range"],
            "error: failed to add to run `range`: it was made of ids 1..=100 in batches of 10, not of ids 1..=101 in batches",
            range,
        ),
        (
            &["--ids", "1..=100", "--batch", "50", "--run", "range"],
            "not of ids 1..=100 in batches of 50",
            "the same without --batch, or with --batch 10, goes on",
        ),
        (
            &["--file", "a.txt", "--run", "range"],
            "it was made of ids 1..=100 in batches of 10, not of file `a.txt` (3 ids",
            range,
        ),
        (&["--file", "b.txt", "--run", "file"], "it was made of file `a.txt` (3 ids with digest ", file),
        (&["--ids", "2..=4", "--run", "file"], "it was made of file `a.txt` (3 ids with digest ", file),
    ];
    for (source, text, goes_on) in table {
        let hint = "hint: name a new run with --run for what was given now; ";
        host.call(&[&["produce"], *source].concat()).expect(1).says(&[text, hint, goes_on]);
    }
    assert_eq!(messages(&up.nats, "trial_ids"), messages_before);
    let ids: Vec<_> = host
        .call(&["runs", "--json"])
        .json()
        .as_array()
        .expect("a list")
        .iter()
        .map(|run| run["ids"].clone())
        .collect();
    assert_eq!(ids, [100, 3]);
    // The same ids from another file are the same run.
    write("c.txt", "3\n2\n1\n");
    host.call(&["produce", "--file", "c.txt", "--run", "file"]).expect(0);
    // So are they as a range, and those of a range from a file.
    host.call(&["produce", "--ids", "1..=3", "--run", "file"]).expect(0);
    write("d.txt", &(1..=100).map(|id| format!("{id}\n")).collect::<String>());
    host.call(&["produce", "--file", "d.txt", "--run", "range"]).expect(0);
    assert_eq!(messages(&up.nats, "trial_ids"), messages_before);
}

/// Begun as a file and lost in part, a run is completed by the range of its ids: order and batches are the same.
#[test]
fn a_run_of_a_file_is_resumed_by_the_range_of_its_ids() {
    let host = trial();
    let up = host.up();
    let ids = (1..=100).map(|id| format!("{id}\n")).collect::<String>();
    fs::write(host.path().join("ids.txt"), ids).expect("written");
    host.call(&["produce", "--file", "ids.txt", "--batch", "10", "--run", "a"]).expect(0);
    let gone = Nats::connect(&up.nats).api("STREAM.PURGE.trial_ids", &json!({ "filter": "trial.ids.a.7" }));
    assert_eq!(gone["purged"], 1, "{gone}");
    let again = host.call(&["run", "--ids", "1..=100", "--run", "a", "--json"]).expect(0).json();
    assert_eq!((&again["rows"], &again["sealed"]), (&100.into(), &true.into()), "{again}");
    host.call(&["verify", "a", "--values"]).expect(0);
}

#[test]
fn repeated_ids_are_dropped_within_a_batch_and_reported_across_batches() {
    let host = trial();
    let ids = b"1\n2\n2\n3\n1\n2\n";
    let called =
        host.call_with_input(&["run", "--stdin", "--batch", "3", "--run", "r", "--json"], ids).expect(0);
    assert_eq!(called.json()["rows"], 5);
    let report = host.verify("r");
    assert_eq!((&report["ids"], &report["repeated_ids"]), (&5.into(), &2.into()));
    assert_eq!((&report["sealed"], &report["raw_duplicates"]), (&true.into(), &0.into()));
    let again =
        host.call_with_input(&["produce", "--stdin", "--batch", "3", "--run", "r", "--json"], ids).expect(0);
    assert_eq!(again.json()["dropped_repeats"], 1);
    let text = host.call_with_input(&["produce", "--stdin", "--batch", "3", "--run", "r"], ids).expect(0);
    assert_eq!(
        text.stdout,
        "published run `r`: 5 ids in 2 batches, 1 repeated ids dropped; all of it had been published before\n"
    );
}

#[test]
fn every_fault_of_the_configuration_is_told_at_once() {
    let host = trial();
    fs::write(
        host.path().join("millstream.toml"),
        "data = 5\nlog = 'a=b=c'\n[nats]\nurl = 'localhost'\n[work]\nthreads = 0\nthread = 4\n[sink]\ngroup_rows = 'many'\n\
         [streams]\nrows_bytes = '12 parsecs'\nids_bytes = '7KiB'\nreplicas = 9\n\
         [clickhouse]\npassword = 123456\n",
    )
    .expect("written");
    let called = host.call(&["run", "--ids", "1..=9", "--database", "a.b"]).expect(2).says(&[
        "error: the configuration has 11 faults:\n",
        "\n  --database: `a.b` is not a database name",
        "\n  millstream.toml: data: 5 is not a text in quotes",
        "\n  log in millstream.toml: `a=b=c` is not a log filter",
        "\n  nats.url in millstream.toml: `localhost` is not an address like nats://host:port",
        "\n  millstream.toml: work.threads: 0 is outside 1 to 4096",
        "\n  millstream.toml: work.thread: no such key, there are ",
        "\n  millstream.toml: sink.group_rows: \"many\" is not a whole number",
        "\n  millstream.toml: streams.rows_bytes: `12 parsecs` is not a size such as",
        "\n  millstream.toml: streams.ids_bytes: `7KiB` is outside 64 MiB to 1 PiB",
        "\n  millstream.toml: streams.replicas: 9 is outside 1 to 5",
        "\n  millstream.toml: clickhouse.password: the value is not a text in quotes",
    ]);
    assert!(!called.stderr.contains("123456"), "a password is told: {}", called.stderr);
    assert_eq!(called.stdout, "");
    fs::write(host.path().join("millstream.toml"), "[work\nthreads = 1\n").expect("written");
    host.call(&["runs"])
        .expect(2)
        .says(&["error: the configuration has a fault:\n  millstream.toml line 1: "]);
    nothing_was_started(&host);
}

#[test]
fn a_pipeline_whose_columns_do_not_match_its_row_type_does_nothing() {
    let host = Host::new(env!("CARGO_BIN_EXE_misfit"));
    let called = host.call(&["run", "--ids", "1..=9"]).expect(2);
    insta::assert_snapshot!("misfit", called.stderr);
    nothing_was_started(&host);
}

#[test]
fn a_second_run_on_one_data_directory_says_so_and_stops() {
    let mut host = trial();
    host.env.push(("TRIAL_MICROS".into(), "2000".into()));
    let mut first = host.start("first", &["run", "--ids", "1..=200000", "--run", "first"]);
    wait_until("a first run that is under way", SOON, || {
        let log = host.log("first");
        if log.contains("of run `first`") { Ok(()) } else { Err(log) }
    });
    host.call(&["run", "--ids", "1..=9", "--run", "second"]).expect(1).says(&[
        &format!(
            "error: failed to open the data directory `.millstream`, which is in use by `run` (pid {})",
            first.pid()
        ),
        "hint: wait until it ends, or use another --data directory",
    ]);
    let runs = host.call(&["runs", "--json"]).expect(0).json();
    assert_eq!(runs.as_array().expect("a list").len(), 1, "{runs}");
    first.signal("INT");
    assert_eq!(first.wait(SOON).code(), Some(130), "{}", host.log("first"));
}

#[test]
fn an_unknown_run_is_refused_with_the_names_there_are() {
    let host = trial();
    let _up = host.up();
    host.call(&["status"]).expect(1).says(&["error: there are no runs yet: `produce` or `run` makes one\n"]);
    host.call(&["verify", "nope"])
        .expect(1)
        .says(&["error: failed to find run `nope`\n", "hint: there are no runs yet"]);
    host.call(&["setup"]).expect(0);
    for command in ["status", "verify", "dead"] {
        host.call(&[command, "nope"]).expect(1).says(&[
            "error: failed to find run `nope`\n",
            "hint: there are no runs yet: `produce` makes one",
        ]);
    }
    host.call(&["produce", "--ids", "1..=9", "--run", "one"]).expect(0);
    host.call(&["produce", "--ids", "1..=9", "--run", "two"]).expect(0);
    for command in ["status", "verify", "dead"] {
        let called = host.call(&[command, "nope", "--json"]).expect(1);
        assert_eq!(called.stdout, "");
        called.says(&["error: failed to find run `nope`\n", "hint: there are `two`, `one`\n"]);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let host = trial();
    let _up = host.up();
    host.call(&["setup"]).expect(0);
    for args in [
        &["sql", "SELECT number FROM numbers(1000000) FORMAT TSV"][..],
        &["--help"],
        &["doctor"],
        &["produce", "--ids", "1..=9"],
        &["runs", "--json"],
    ] {
        let mut child = host
            .command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut reader = BufReader::new(child.stdout.take().expect("piped"));
        if args[0] == "sql" {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a line");
            assert_eq!(line, "0\n");
        }
        drop(reader);
        let output = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("panicked") && !said.contains("error:"), "{args:?}: {said}");
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said}");
    }
}
