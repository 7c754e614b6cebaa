//! What is published is what was asked for: every id byte for byte, or refused by its line and the reason.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tests::nats::{Nats, stream_messages};
use tests::{Host, SOON, Up, signal, wait_until};

fn trial() -> Host {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    host
}

fn words() -> Host {
    Host::new(env!("CARGO_BIN_EXE_words"))
}

/// How a script ended.
#[derive(Debug)]
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.err.contains(part), "`{part}` is not said:\n{}", self.err);
        }
        self
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Has bash run this beside the files of a host; `$P` is the pipeline's binary.
fn bash(host: &Host, program: &str, script: &str) -> Said {
    let mut command = Command::new("bash");
    command.args(["-c", script]).env("P", program).current_dir(host.path()).stdin(Stdio::null());
    for name in ["NATS_URL", "NATS_CREDS", "CLICKHOUSE_URL", "CLICKHOUSE_DATABASE"] {
        command.env_remove(name);
    }
    let output = command.envs(host.env.iter().cloned()).output().expect("bash starts");
    Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn sh(host: &Host, script: &str) -> Said {
    bash(host, env!("CARGO_BIN_EXE_trial"), script)
}

/// Publishes an input of the words pipeline, computes it, and returns the ids that are stored, as ClickHouse spells them.
fn stored(host: &Host, up: &Up, input: &str, code: i32) -> Value {
    let run = format!("{input} --run stored --json");
    let published = bash(host, env!("CARGO_BIN_EXE_words"), &format!("\"$P\" produce {run}")).expect(code);
    let run = published.json()["run"].as_str().expect("a name").to_owned();
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    host.wait_sealed(&run, SOON);
    let ids = up.ask(&format!(
        "SELECT groupArray(id) AS ids FROM (SELECT id FROM millstream.words WHERE run = '{run}' ORDER BY id) FORMAT JSONEachRow"
    ));
    host.call(&["forget", &run]).expect(0);
    let row: Value = serde_json::from_str(&ids).expect("JSON");
    row["ids"].clone()
}

#[test]
fn what_can_be_read_only_once_is_published_whole() {
    let host = trial();
    let _up = host.up();
    let table = [
        ("\"$P\" produce --file <(seq 1 10) --json", 10),
        ("seq 1 11 | \"$P\" produce --file /dev/stdin --json", 11),
        ("\"$P\" produce --file /proc/self/fd/7 --json 7< <(seq 1 12)", 12),
        ("mkfifo fifo; seq 1 13 > fifo & \"$P\" produce --file fifo --json", 13),
        ("(printf 'n,id\\n'; seq -f 'a,%g' 14) | \"$P\" produce --stdin --column id --json", 14),
        ("\"$P\" produce --column id --json --file <(printf 'n,id\\n'; seq -f 'a,%g' 15)", 15),
        ("seq 16 > file; \"$P\" produce --file /dev/stdin --json < file", 16),
        ("seq 17 > file; (read line; \"$P\" produce --stdin --json) < <(cat file)", 16),
    ];
    for (script, ids) in table {
        let said = sh(&host, script).expect(0);
        assert_eq!(said.json()["ids"], ids, "{script}");
    }
    // A script that gives the same again resumes.
    let again = "\"$P\" produce --file <(seq 1 10) --run again --json";
    assert_eq!(sh(&host, again).expect(0).json()["batches_found"], 0);
    assert_eq!(sh(&host, again).expect(0).json()["batches_written"], 0);
    for device in ["/dev/zero", "/dev/urandom"] {
        sh(&host, &format!("\"$P\" produce --file {device}"))
            .expect(1)
            .says(&[&format!("error: failed to read file `{device}`\n  it is a device, which has no end\n")]);
    }
    sh(&host, "\"$P\" produce --stdin < /dev/zero").expect(1).says(&["it is a device, which has no end"]);
}

/// Starts `produce` of a file of 1000 ids, and does this while a sample of them is timed: after the check, before the
/// first batch.
fn produce_and_change(host: &Host, run: &str, change: impl FnOnce()) -> (Option<i32>, String) {
    let lines: String = (1..=1000).map(|id| format!("{id}\n")).collect();
    fs::write(host.path().join("ids.txt"), lines).expect("written");
    // Ids that take long, so that timing them does.
    let mut launch = tests::Launch::from(&["produce", "--file", "ids.txt", "--run", run][..]);
    launch.env.push(("TRIAL_MICROS".into(), "4000000".into()));
    let mut producing = host.start_as(run, &launch);
    wait_until("a sample that is timed", SOON, || {
        let log = host.log(run);
        if log.contains("timing a sample") { Ok(()) } else { Err(log) }
    });
    change();
    (producing.wait(SOON).code(), host.log(run))
}

#[test]
fn published_is_surveyed_or_the_run_stays_open() {
    let host = trial();
    let _up = host.up();
    let path = host.path().join("ids.txt");
    let edited: [(&str, &dyn Fn()); 3] = [
        ("edited", &|| {
            File::options()
                .write(true)
                .open(&path)
                .and_then(|mut file| file.write_all(b"7\n8\n"))
                .expect("edited");
        }),
        ("cut", &|| File::options().write(true).open(&path).and_then(|file| file.set_len(10)).expect("cut")),
        ("emptied", &|| drop(File::create(&path).expect("emptied"))),
    ];
    for (run, change) in edited {
        let (code, log) = produce_and_change(&host, run, change);
        assert_eq!(code, Some(1), "{run}: {log}");
        for part in [
            &format!(
                "error: failed to publish run `{run}`: file `ids.txt` changed after it was checked: it had 1000 ids with digest "
            ),
            "; the run is not closed\n",
            &format!("`cancel {run}` and `forget {run}` give it up"),
        ] {
            assert!(log.contains(part), "{run}: `{part}` is not in\n{log}");
        }
        assert_eq!(host.status(run)["state"], "publishing");
    }
    // Given up, or gone on with.
    host.call(&["cancel", "cut"]).expect(0);
    host.call(&["forget", "cut"]).expect(0);
    let lines: String = (1..=1000).map(|id| format!("{id}\n")).collect();
    let whole = host.call_with_input(&["produce", "--stdin", "--run", "edited", "--json"], lines.as_bytes());
    assert_eq!(whole.expect(0).json()["ids"], 1000);
}

#[test]
fn published_is_surveyed_of_a_file_that_grows_or_is_replaced() {
    let host = trial();
    let _up = host.up();
    let path = host.path().join("ids.txt");
    let (code, log) = produce_and_change(&host, "grows", || {
        File::options()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(b"1001\n"))
            .expect("grown");
    });
    assert!(code == Some(0) && log.contains("published run `grows`: 1,000 ids"), "{log}");
    let (code, log) = produce_and_change(&host, "replaced", || {
        fs::write(host.path().join("other.txt"), "5\n").expect("written");
        fs::rename(host.path().join("other.txt"), &path).expect("replaced");
    });
    assert!(code == Some(0) && log.contains("published run `replaced`: 1,000 ids"), "{log}");
    // What grew is other ids than the run was made of.
    let lines: String = (1..=1001).map(|id| format!("{id}\n")).collect();
    host.call_with_input(&["produce", "--stdin", "--run", "grows"], lines.as_bytes()).expect(1).says(&[
        "it was made of file `ids.txt` (1000 ids with digest ",
        "not of standard input (1001 ids with digest ",
    ]);
}

#[test]
fn text_ids_of_files_are_stored_byte_for_byte() {
    let host = words();
    let up = host.up();
    let table = [
        ("'\\xef\\xbb\\xbfa\\r\\n b \\r\\n\\r\\nc'", "", json!([" b ", "a", "c"])),
        ("'a\\tb\\n\\x1b[2Jc\\nd \\n'", "", json!(["\u{1b}[2Jc", "a\tb", "d "])),
        ("'id;n\\n\" x\\r\\ny \";1\\n z;2\\n'", "--column id --delimiter ';'", json!([" x\r\ny ", " z"])),
        ("'1\\ta\\n2\\tb\\n'", "--column 2 --no-header --delimiter '\\t'", json!(["a", "b"])),
    ];
    for (text, flags, ids) in table {
        fs::remove_file(host.path().join("ids")).ok();
        sh(&host, &format!("printf {text} > ids")).expect(0);
        assert_eq!(stored(&host, &up, &format!("--file ids {flags}"), 0), ids, "{text}");
    }
}

#[test]
fn text_that_cannot_be_meant_is_refused_by_line_and_reason() {
    let host = words();
    let table = [
        ("'a\\nb\\r\\n'", "", "line 2: `b\\r` holds a carriage return that is no line end of this input"),
        ("'a\\rb\\r'", "", "line 1: `a\\rb\\r` holds a carriage return"),
        ("'a\\n\\0b\\n'", "", "line 2: `\\u{0}b` holds a NUL byte"),
        ("'a\\n  \\n'", "", "line 2: `  ` holds nothing but blanks"),
        ("'a\\n\\xef\\xbb\\xbfb\\n'", "", "line 2: `\\u{feff}b` begins with a byte-order mark"),
        ("'a\\ncaf\\xe9\\n'", "", "line 2: it is not UTF-8: `caf\\xe9`"),
        (
            "'\\xff\\xfea\\0\\n\\0'",
            "",
            "it is text in UTF-16LE, and UTF-8 is needed\nhint: convert it: iconv -f UTF-16LE",
        ),
        ("'\\x1f\\x8b\\x08\\0'", "", "it is a gzip file, and text is needed\nhint: unpack it"),
        (
            "\"$(head -c 70000 /dev/zero | tr '\\0' x)\\nb\\n\"",
            "",
            "line 1: 70001 bytes are longer than the limit of an id, 4096",
        ),
        (
            "\"$(head -c 5000 /dev/zero | tr '\\0' x)\\nb\\n\"",
            "",
            "line 1: an id of 5000 bytes is longer than the limit of 4096",
        ),
        (
            "'n,id\\n1,a\\n2,\"b\\n3,c\\n'",
            "--column id",
            "a quote that opens on line 3 is never closed\nhint: nothing was published",
        ),
        ("'n,id\\n1,a\\n2,\\n'", "--column id", "line 3: an id must not be empty"),
        ("'n,id\\nSmith, J,a\\n'", "--column id", "line 2: it has 3 fields, the header has 2 fields"),
        ("'id,n,id\\n'", "--column id", "2 of its columns have that name\nhint: rename all but one of them"),
        (
            "'n;id\\n1;a\\n'",
            "--column id",
            "its columns are `n;id`\nhint: its delimiter looks like `;`: --delimiter ';'",
        ),
        ("'n\\tid\\n1\\ta\\n'", "--column id", "hint: its delimiter looks like `\\t`: --delimiter '\\t'"),
        ("'1,a\\n2,b\\n'", "--column id", "--no-header takes columns by number: --column 1"),
    ];
    for (text, flags, says) in table {
        let script = format!("printf {text} | \"$P\" produce --stdin {flags}");
        bash(&host, env!("CARGO_BIN_EXE_words"), &script).expect(1).says(&["error: failed to read ", says]);
    }
    assert!(!host.path().join(".millstream").exists(), "a server was started");
    // A first line of numbers is no header of numbers.
    sh(&trial(), "printf '5,7\\n6,8\\n' | \"$P\" produce --stdin --column 5").expect(1).says(&[
        "its first line is `5,7`, which looks like ids",
        "hint: where the first line is no header, --no-header",
    ]);
}

#[test]
fn every_value_of_a_query_is_one_id() {
    let host = words();
    let up = host.up();
    up.ask("CREATE TABLE keys (id String) ENGINE = MergeTree ORDER BY id");
    up.ask(
        "INSERT INTO keys VALUES ('a\\nb'), ('  '), ('c\\r'), ('\\\\N'), ('\\t'), ('d\\0e'), ('ü'), ('NULL')",
    );
    let kept = json!(["\t", "  ", "NULL", "\\N", "a\nb", "c\r", "d\u{0}e", "ü"]);
    assert_eq!(stored(&host, &up, "--query 'SELECT id FROM default.keys'", 0), kept);
    let cast =
        "--query \"SELECT toLowCardinality(id) AS k FROM default.keys WHERE id < 'O' -- the rest later\"";
    assert_eq!(stored(&host, &up, cast, 0), json!(["\t", "  ", "NULL"]));
    up.ask("INSERT INTO keys VALUES ('')");
    let words = |args: &[&str]| host.call(args);
    words(&["produce", "--query", "SELECT id FROM default.keys"]).expect(1).says(&[
        "a row of it holds no id\n  row 1: an id must not be empty\n",
        "pass them over with --skip-bad",
    ]);
    assert_eq!(stored(&host, &up, "--skip-bad --query 'SELECT id FROM default.keys'", 3), kept);
    words(&["produce", "--query", "SELECT nullIf(id, '') AS id FROM default.keys"])
        .expect(1)
        .says(&["its columns are `id` Nullable(String)", "hint: a NULL is no id: "]);
    words(&["produce", "--query", "SELECT toFixedString(id, 8) AS id FROM default.keys"])
        .expect(1)
        .says(&["FixedString(8)", "SELECT toString(id) …"]);
}

#[test]
fn numbers_of_a_query_have_any_width() {
    let host = trial();
    let up = host.up();
    for (kind, most) in
        [("UInt8", "255"), ("UInt16", "65535"), ("UInt32", "4294967295"), ("UInt64", "18446744073709551615")]
    {
        let query = format!("SELECT to{kind}({most} - number) AS id FROM numbers(3) WHERE number != 1");
        let query = query.replace("18446744073709551615 -", "toUInt64(18446744073709551615) -");
        host.call(&["run", "--query", &query, "--run", kind]).expect(0);
        let ids = up.ask(&format!("SELECT max(id), count() FROM millstream.trial WHERE run = '{kind}'"));
        assert_eq!(ids, format!("{most}\t2\n"));
    }
}

#[test]
fn a_query_resumes_whatever_the_order_of_its_answer() {
    let host = trial();
    let up = host.up();
    let query = ["produce", "--query", "SELECT number FROM numbers(100) ORDER BY rand()", "--batch", "10"];
    let produce = [&query[..], &["--run", "r", "--json"]].concat();
    host.call(&produce).expect(0);
    let mut nats = Nats::connect(&up.nats);
    nats.api("STREAM.PURGE.trial_ids", &json!({ "filter": "trial.ids.r.3" }));
    let again = host.call(&produce).expect(0).json();
    assert_eq!((&again["batches_written"], &again["batches_found"]), (&1.into(), &9.into()), "{again}");
}

#[test]
fn a_run_that_was_killed_resumes_with_its_ids_in_another_order() {
    const IDS: u64 = 100_000;
    let host = trial();
    let up = host.up();
    let shuffled = |seed: u64| {
        let mut ids: Vec<u64> = (1..=IDS).chain([7, 7]).collect();
        ids.sort_by_key(|id| id.wrapping_mul(seed | 1).rotate_left(29).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        ids.into_iter().map(|id| format!("{id}\n")).collect::<String>()
    };
    fs::write(host.path().join("ids.txt"), shuffled(3)).expect("written");
    let words = ["produce", "--file", "ids.txt", "--batch", "10", "--run", "r"];
    for seed in [5, 11] {
        let mut producing = host.start("producing", &words);
        let before = stream_messages(&up.nats, "trial_ids");
        wait_until("batches", SOON, || {
            let stored = stream_messages(&up.nats, "trial_ids");
            if stored > before + 100 { Ok(()) } else { Err(format!("{stored} {}", host.log("producing"))) }
        });
        producing.kill();
        assert_eq!(host.status("r")["state"], "publishing", "it was killed too late");
        fs::write(host.path().join("ids.txt"), shuffled(seed)).expect("written");
    }
    let resumed = host.call(&[&words[..], &["--json"]].concat()).expect(0);
    let told = resumed.json();
    assert!(told["batches_found"].as_u64() > Some(100), "{told}");
    resumed.says(&["the ids come in another order than before"]);
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    host.wait_sealed("r", SOON);
    let stored = up.ask("SELECT uniqExact(id), min(id), max(id) FROM millstream.trial");
    assert_eq!(stored, format!("{IDS}\t1\t{IDS}\n"));
    let report = host.verify("r");
    assert!(report["repeated_ids"].as_u64() <= Some(2), "{report}");
}

#[test]
fn the_same_ids_in_another_order_are_said_to_be_that() {
    let host = trial();
    let up = host.up();
    let produce = ["produce", "--stdin", "--batch", "2", "--run", "r"];
    host.call_with_input(&produce, b"1\n2\n3\n4\n5\n").expect(0);
    let mut nats = Nats::connect(&up.nats);
    nats.api("STREAM.PURGE.trial_ids", &json!({ "filter": "trial.ids.r.1" }));
    host.call_with_input(&produce, b"5\n4\n3\n2\n1\n").expect(1).says(&[
        "error: failed to publish batch 0 of run `r`: the ids are those that the run was begun with, in another order, and",
        "hint: give them in the order of the first start, and what is lost comes back; or `cancel r` and `forget r`",
    ]);
    // Nothing of the other order was published in the place that is free.
    assert_eq!(stream_messages(&up.nats, "trial_ids"), 2);
    host.call_with_input(&produce, b"1\n2\n3\n4\n6\n")
        .expect(1)
        .says(&["it was made of", "not of standard input (5 ids"]);
    let again = host.call_with_input(&produce, b"1\n2\n3\n4\n5\n").expect(0);
    assert!(again.stdout.contains("2 batches had been published before"), "{}", again.stdout);
}

#[test]
fn a_producer_ends_when_it_is_told_to() {
    let host = trial();
    sh(&host, "mkfifo fifo").expect(0);
    let open = "exec 9<>fifo; exec \"$P\" ";
    for (words, said) in [
        ("produce --file fifo", "reading file `fifo`"),
        ("run --file fifo", "reading file `fifo`"),
        ("produce --stdin < fifo", "reading standard input"),
        ("produce --file /dev/fd/9", "reading file `/dev/fd/9`"),
    ] {
        for name in ["TERM", "INT"] {
            let log = host.path().join("log");
            let file = File::create(&log).expect("a log file");
            let begin = if words.contains('9') { open } else { "exec \"$P\" " };
            // A shell that waits for a writer is none of ours: the pipe has one for that case.
            let begin = if words.contains('<') { open } else { begin };
            let mut child = Ended(
                Command::new("bash")
                    .args(["-c", &format!("{begin}{words}")])
                    .env("P", env!("CARGO_BIN_EXE_trial"))
                    .current_dir(host.path())
                    .stdin(Stdio::null())
                    .stderr(file)
                    .process_group(0)
                    .spawn()
                    .expect("bash starts"),
            );
            wait_until(&format!("{words} that reads"), SOON, || {
                let text = fs::read_to_string(&log).expect("a log");
                if text.contains(said) { Ok(()) } else { Err(text) }
            });
            signal(child.0.id(), name);
            let status = wait_until(&format!("the end of {words} by SIG{name}"), SOON, || {
                child.0.try_wait().expect("it can be waited for").ok_or_else(String::new)
            });
            assert_eq!(status.code(), Some(130), "{words}: {}", fs::read_to_string(&log).expect("a log"));
        }
    }
    assert!(!host.path().join(".millstream").exists(), "a server was started");
}

/// A process that does not outlive its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ended = self.0.kill();
        self.0.wait().expect("it ends");
    }
}

#[test]
fn standard_output_that_cannot_be_written_is_an_error() {
    let host = trial();
    let _up = host.up();
    host.call(&["run", "--ids", "1..=9", "--run", "a"]).expect(0);
    for words in [
        "--help",
        "sql --help",
        "--version",
        "sql 'SELECT 1'",
        "sql 'SELECT number FROM system.numbers FORMAT CSV'",
        "runs",
        "status a",
        "status a --json",
        "verify a --json",
        "dead a",
        "doctor",
        "tune --ids 1..=100 --for 1s",
        "produce --ids 1..=9 --run b",
        "set b --priority 1",
        "run --ids 1..=9 --run c",
        "produce --stdin --follow --run d <<< 1",
        "forget c",
    ] {
        let said = sh(&host, &format!("\"$P\" {words} > /dev/full"));
        assert_eq!(said.code, 1, "{words}: {}", said.err);
        said.says(&[
            "error: failed to write to standard output\n  No space left on device (os error 28)\nhint: ",
        ]);
    }
    // Open for reading alone.
    for words in ["status a --json", "sql 'SELECT 1'", "--help", "produce --ids 1..=9 --run b"] {
        let said = sh(&host, &format!("\"$P\" {words} 1< /dev/null")).expect(1);
        said.says(&["error: failed to write to standard output\n  Bad file descriptor (os error 9)\nhint: "]);
    }
    // What was to be done is done.
    let runs = host.call(&["runs", "--json"]).expect(0).json();
    assert_eq!(runs.as_array().expect("a list").len(), 3, "{runs}");
    for words in ["sql 'SELECT number FROM system.numbers FORMAT CSV'", "run --ids 1..=9 --run a", "--help"] {
        let said = sh(&host, &format!("set -o pipefail; \"$P\" {words} | head -n 1")).expect(0);
        assert!(!said.err.contains("error:"), "{said:?}");
    }
}

#[test]
fn an_input_without_ids_has_an_exit_code_of_its_own() {
    let host = trial();
    for (input, named) in [
        ("--file empty", "file `empty`"),
        ("--file blank", "file `blank`"),
        ("--file header --column id", "column `id` of file `header`"),
        ("--file empty --column id", "column `id` of file `empty`"),
        ("--stdin < /dev/null", "standard input"),
    ] {
        sh(&host, "printf '' > empty; printf '\\n\\r\\n' > blank; printf 'n,id\\n' > header").expect(0);
        for command in ["produce", "run"] {
            let script = format!("\"$P\" {command} {input}");
            let said = sh(&host, &script).expect(4);
            let text = format!("error: failed to make a run of {named}: there are no ids in it\nhint: ");
            assert!(said.err.contains(&text) && said.err.contains("--allow-empty"), "{said:?}");
            let then = "--allow-empty --then 'echo $MILLSTREAM_STATE $MILLSTREAM_IDS > then' --run night";
            let said =
                sh(&host, &format!("rm -f then; {script} {then}; code=$?; cat then; exit $code")).expect(0);
            assert_eq!(said.out, format!("there are no ids in {named}: nothing to do\nempty 0\n"));
        }
    }
    assert!(!host.path().join(".millstream").exists(), "a server was started");
    let query = ["run", "--query", "SELECT number FROM numbers(0)", "--json"];
    host.call(&query).expect(4).says(&["query `SELECT number FROM numbers(0)`: there are no ids in it"]);
    let empty = host.call(&[&query[..], &["--allow-empty", "--run", "n"]].concat()).expect(0).json();
    assert_eq!((&empty["run"], &empty["ids"], &empty["empty"]), (&"n".into(), &0.into(), &true.into()));
    assert_eq!(host.call(&["runs", "--json"]).expect(0).json(), json!([]));
}

#[test]
fn bad_lines_are_passed_over_when_the_user_says_so() {
    let host = trial();
    let _up = host.up();
    let lines: String =
        (1..=30).map(|id| if id % 2 == 0 { format!("x{id}\n") } else { format!("{id}\n") }).collect();
    fs::write(host.path().join("ids.txt"), format!("{lines}\n")).expect("written");
    host.call(&["produce", "--file", "ids.txt"]).expect(1).says(&["15 of its lines hold no id"]);
    let produce = ["produce", "--file", "ids.txt", "--run", "r", "--json"];
    let published = host.call(&[&produce[..], &["--skip-bad=bad.txt"]].concat()).expect(3).says(&[
        "passed over 1 empty line\n",
        "passed over 15 bad lines:\n  2: `x2` is not a whole number",
        "\n  … and 5 more (--skip-bad=FILE lists all)\n",
    ]);
    assert_eq!((&published.json()["ids"], &published.json()["bad_lines"]), (&15.into(), &15.into()));
    let listed = fs::read_to_string(host.path().join("bad.txt")).expect("a list");
    assert!(listed.lines().count() == 15 && listed.starts_with("2\t`x2` is not a whole number"), "{listed}");
    // The same words go on, and the record says what it was made of.
    let again = host.call(&[&produce[..], &["--skip-bad"]].concat()).expect(3).json();
    assert_eq!(again["batches_written"], 0);
    assert_eq!(host.status("r")["source"], "file `ids.txt` but for 15 bad lines");
    let then = ["run", "--file", "ids.txt", "--skip-bad", "--run", "r", "--then", "echo $MILLSTREAM_BAD"];
    let called = host.call(&then).expect(3);
    assert!(called.stdout.ends_with("\n15\n"), "{}", called.stdout);
    host.call(&["produce", "--file", "ids.txt", "--skip-bad=ids.txt"])
        .expect(1)
        .says(&["it is the input itself"]);
    fs::write(host.path().join("ids.txt"), "x\ny\n").expect("written");
    host.call(&["produce", "--file", "ids.txt", "--skip-bad"]).expect(1).says(&["2 of its lines hold no id"]);
    host.call(&["produce", "--file", "ids.txt", "--skip-bad=no/file"])
        .expect(1)
        .says(&["error: failed to list bad lines of file `ids.txt` into `no/file`\n", "hint: "]);
}

#[test]
fn a_follower_passes_over_a_long_line_whole() {
    let host = trial();
    let _up = host.up();
    // Whatever the pieces are in which it is read, one of them would end in an id.
    let long = format!("{}\n", "1234567890123456789 ".repeat(160_000));
    let input = format!("\u{feff}1\n{long}2\r\n3");
    let called = host
        .call_with_input(&["produce", "--stdin", "--follow", "--run", "f", "--json"], input.as_bytes())
        .expect(3)
        .says(&["a line of it holds no id\n  line 2: 3200001 bytes are longer than the limit of an id"]);
    let told = called.json();
    assert_eq!((&told["ids"], &told["bad_lines"]), (&3.into(), &1.into()), "{told}");
}
