//! **the-function-is-at-home**: what the user's code may do in a process that computes, and what each of it costs.

use std::time::Duration;

use tests::guest::VARIABLE;
use tests::processes::{children, sleeps};
use tests::{Host, Launch, Process, Up, signal, wait_until};

/// All the starts of processes, on a busy machine.
const LONG: Duration = Duration::from_secs(240);

/// A stack, and a pipeline on it whose function does this.
struct Place {
    host: Host,
    up: Up,
}

impl Place {
    /// With these lines under `[work]`.
    fn new(doing: &str, limits: &str) -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_guest"));
        host.env.push((VARIABLE.to_owned(), doing.to_owned()));
        let place = Self { up: host.up(), host };
        place.limit(limits);
        place
    }

    fn limit(&self, limits: &str) {
        std::fs::write(self.host.path().join("millstream.toml"), format!("[work]\n{limits}\n"))
            .expect("a file");
    }

    fn seconds(&self) -> String {
        let port =
            self.up.nats.rsplit(':').next().and_then(|port| port.trim_end_matches('/').parse::<u32>().ok());
        (100_000 + port.expect("a port")).to_string()
    }

    fn env(&mut self, name: &str, value: &str) {
        self.host.env.push((name.to_owned(), value.to_owned()));
    }

    /// Names the servers in the environment: for processes that cannot read the data directory.
    fn name_servers(&mut self) {
        let (nats, clickhouse) = (self.up.nats.clone(), self.up.clickhouse.clone());
        self.env("NATS_URL", &nats);
        self.env("CLICKHOUSE_URL", &clickhouse);
    }

    /// The pool process of run `a`, once it has computed something.
    fn computing_pool(&self, run: &Process) -> u32 {
        wait_until("a pool that computes", LONG, || {
            let pools = children(run.pid(), "__compute-pool");
            let has_begun = self.status("a")["done"].as_u64() > Some(0);
            pools.last().copied().filter(|_| has_begun).ok_or_else(|| self.host.log("a"))
        })
    }

    /// Starts a run of these ids.
    fn start(&self, run: &str, ids: &str, words: &[&str]) -> Process {
        self.host.start(run, &[&["run", "--run", run, "--ids", ids], words].concat())
    }

    /// Computes these ids to the end, and returns what came of each: `id said`, or `id !error` of a dead letter.
    fn run(&self, run: &str, ids: &str, words: &[&str], code: i32) -> Vec<String> {
        let ended = self.start(run, ids, words).wait(LONG);
        assert_eq!(ended.code(), Some(code), "{}", self.host.log(run));
        self.rows(run)
    }

    /// Nothing before there is such a run.
    fn status(&self, run: &str) -> serde_json::Value {
        let called = self.host.call(&["status", run, "--json"]);
        if called.code == 0 { called.json() } else { serde_json::Value::Null }
    }

    fn rows(&self, run: &str) -> Vec<String> {
        let rows = self.up.ask(&format!(
            "SELECT id, if(status = 'dead', concat('!', error), said) FROM millstream.guest_live WHERE run = '{run}' ORDER BY id"
        ));
        rows.lines().map(|line| line.replace('\t', " ").trim_end().to_owned()).collect()
    }
}

/// On the pool, and one id at a time.
fn both(doing: &str, limits: &str, check: impl Fn(&Place, &str)) {
    let mut place = Place::new(doing, "");
    // Which no other test's programs sleep.
    place.env("GUEST_SLEEP", &place.seconds());
    for (run, isolate) in [("pool", false), ("alone", true)] {
        place.limit(&format!("{limits}\nisolate = {isolate}"));
        check(&place, run);
    }
}

#[test]
fn a_program_can_be_ended_by_sigterm() {
    both("ends", "", |place, run| {
        assert_eq!(place.run(run, "1..=2", &[], 0), ["1 124", "2 124"]);
    });
}

#[test]
fn a_program_reads_nothing_of_ours() {
    both("reads", "", |place, run| {
        assert_eq!(place.run(run, "1..=3", &["--batch", "1"], 0), ["1 0 0", "2 0 0", "3 0 0"]);
    });
}

#[test]
fn a_program_inherits_no_blocked_signals_and_no_descriptors() {
    both("signals", "", |place, run| {
        let blocked = &place.run(run, "1..=1", &[], 0)[0];
        assert!(blocked.contains("SigBlk:\\t0000000000000000"), "{blocked}");
        // But for the two signals that belong to the C library.
        let ignored = blocked.rsplit("\\t").next().and_then(|mask| u64::from_str_radix(mask, 16).ok());
        assert_eq!(ignored.map(|mask| mask & !(0b11 << 31)), Some(0), "{blocked}");
    });
    both("descriptors", "", |place, run| {
        let open = &place.run(run, "1..=1", &[], 0)[0];
        assert!(open.contains("0 -> /dev/null") && !open.contains("socket:"), "{open}");
    });
}

#[test]
fn what_is_printed_reaches_the_log_with_its_id() {
    both("prints", "", |place, run| {
        place.run(run, "1..=3", &["--batch", "1", "--threads", "1"], 0);
        let log = place.host.log(run);
        for said in ["main prints before it hands over", "out 2", "err 2", "program 2"] {
            assert!(log.contains(said), "`{said}` is not in\n{log}");
        }
        for (id, from) in (1..=3).flat_map(|id| ["out", "err", "program"].map(|from| (id, from))) {
            let line = log.lines().find(|line| line.contains(&format!("line=\"{from} {id}\"")));
            let line = line.unwrap_or_else(|| panic!("`{from} {id}` is not in\n{log}"));
            assert!(line.contains(run) && line.contains("batch"), "{line}");
            if run == "alone" {
                assert!(line.contains(&format!("id=\"{id}\"")), "{line}");
            }
        }
    });
}

#[test]
fn a_flood_of_lines_is_bounded_and_holds_up_nothing() {
    both("floods", "", |place, run| {
        assert_eq!(place.run(run, "1..=4", &[], 0).len(), 4);
        let log = place.host.log(run);
        assert!(log.contains("lines that are left out"), "{}", log.len());
        assert!(log.len() < 4 << 20, "{} bytes", log.len());
    });
}

#[test]
fn rayon_within_a_lock_is_no_deadlock() {
    both("locks", "", |place, run| {
        let rows = place.run(run, "1..=60", &["--threads", "4"], 0);
        assert!(rows.len() == 60 && rows.iter().all(|row| row.ends_with(" 1999000")), "{rows:?}");
    });
}

#[test]
fn rayon_may_be_waited_for_without_rayon() {
    both("spawns", "", |place, run| {
        assert_eq!(place.run(run, "1..=4", &["--threads", "2"], 0), ["1 7", "2 7", "3 7", "4 7"]);
    });
}

#[test]
fn what_an_id_started_ends_with_its_process() {
    both("leaves", "hard_limit = '2s'", |place, run| {
        let rows = place.run(run, "1..=5", &[], 3);
        assert_eq!(rows[2], "3 !timed out after 2 s");
        none_left(&place.seconds());
    });
}

#[test]
fn what_an_id_started_ends_with_a_killed_worker() {
    both("leaves", "", |place, run| {
        let mut work = place.start(run, "1..=5", &[]);
        wait_until("programs of an id", LONG, || match sleeps(&place.seconds()).len() {
            2.. => Ok(()),
            _ => Err(place.host.log(run)),
        });
        work.kill();
        none_left(&place.seconds());
        place.host.call(&["cancel", run]).expect(0);
    });
}

#[test]
fn a_program_that_outlives_its_process_holds_nothing_up() {
    both("helper", "", |place, run| {
        let rows = place.run(run, "1..=5", &[], 3);
        assert_eq!(rows[2], "3 !crashed: signal 6");
        none_left(&place.seconds());
    });
}

#[test]
fn memory_of_many_ids_is_not_blamed_on_the_last() {
    let place = Place::new("leaks", "memory_limit = \"64MiB\"\nisolate = true");
    let rows = place.run("a", "1..=200", &[], 0);
    assert_eq!(rows.len(), 200);
}

/// From some id on each became a dead letter, for what those before it had left open.
#[test]
fn files_that_many_ids_leave_open_are_not_blamed_on_the_last() {
    both("opens", "", |place, run| {
        let words = ["run", "--run", run, "--ids", "1..=3000"];
        let under = ["prlimit", "--nofile=256"].map(str::to_owned).into();
        let launch = Launch { under, ..Launch::from(&words[..]) };
        let ended = place.host.start_as(run, &launch).wait(LONG);
        let log = place.host.log(run);
        assert_eq!(ended.code(), Some(0), "{log}");
        assert_eq!(place.rows(run).len(), 3000);
        assert!(log.contains("of 256 open files are open"), "{log}");
    });
}

#[test]
fn loading_in_start_is_no_ids_time() {
    let mut place = Place::new("start", "hard_limit = '1s'");
    place.env("GUEST_MICROS", "3000000");
    let rows = place.run("pool", "1..=2000", &[], 0);
    assert_eq!(rows.len(), 2000);
    place.limit("hard_limit = '1s'\nisolate = true");
    assert_eq!(place.run("alone", "1..=20", &[], 0).len(), 20);
}

#[test]
fn loading_in_the_first_id_is_told_from_slow_ids() {
    let mut place = Place::new("loads", "hard_limit = '1s'\nisolate = true");
    place.env("GUEST_MICROS", "3000000");
    let rows = place.run("a", "1..=6", &[], 3);
    assert!(rows.iter().all(|row| row.contains("timed out after 1 s")), "{rows:?}");
    assert!(rows.iter().any(|row| row.contains("`Pipeline::start`")), "{rows:?}");
}

#[test]
fn loading_makes_no_small_batches() {
    let mut place = Place::new("loads", "");
    place.env("GUEST_MICROS", "6000000");
    assert_eq!(place.run("a", "1..=100000", &[], 0).len(), 100_000);
    let batches = place.host.status("a")["batches"].as_u64().expect("a number");
    assert!(batches < 1000, "{batches}");
}

#[test]
fn a_host_that_cannot_start_draws_nothing_until_it_can() {
    let place = Place::new("refuses", "");
    let _run = place.start("a", "1..=10", &["--batch", "2"]);
    wait_until("the reason in status", LONG, || {
        let told = place.host.call(&["status", "a"]).stdout;
        if told.contains("draws no batches") && told.contains("no file `model`") { Ok(()) } else { Err(told) }
    });
    assert_eq!(place.host.status("a")["in_flight"], 0);
    let doctor = place.host.call(&["doctor"]).expect(1).stdout;
    let lines =
        |mark: &str| doctor.lines().any(|line| line.starts_with(mark) && line.contains("no file `model`"));
    assert!(lines("FAIL  computing ") && lines("warn  workers "), "{doctor}");
    std::fs::write(place.host.path().join("model"), "").expect("a file");
    place.host.wait_sealed("a", LONG);
    assert_eq!(place.host.status("a")["redelivered"], 0);
}

#[test]
fn a_panic_that_aborts_says_why() {
    both("aborts", "", |place, run| {
        let rows = place.run(run, "1..=5", &[], 3);
        assert!(rows[2].starts_with("3 !crashed: signal 6: panicked at "), "{rows:?}");
        assert!(rows[2].ends_with("the reason of id 3"), "{rows:?}");
    });
}

#[test]
fn recursion_is_as_deep_as_in_a_main_thread_and_ends_in_a_message() {
    both("recurses", "", |place, run| {
        let rows = place.run(run, "1..=5", &[], 3);
        assert_eq!(rows[4], "5 5");
        assert!(rows[2].contains("stack overflow"), "{rows:?}");
    });
}

#[test]
fn threads_that_cannot_be_had_cost_one_id() {
    let mut place = Place::new("threads", "memory_limit = \"64MiB\"\nisolate = true");
    // A thread that cannot have a stack for signals panics in the library; a backtrace of it, which takes memory that is not
    // there, would wait for a lock that it holds itself.
    place.env("RUST_BACKTRACE", "0");
    let rows = place.run("a", "1..=5", &[], 3);
    // Where the library had no memory left for its own refusal, the process has crashed of it.
    let refused = ["3 !failed: no thread", "3 !crashed: ", "3 !out of memory"];
    assert!(refused.iter().any(|words| rows[2].starts_with(words)), "{rows:?}");
    assert_eq!([&rows[1], &rows[3]], ["2", "4"]);
}

#[test]
fn a_frozen_pool_is_missed_and_replaced() {
    let mut place = Place::new("start", "");
    place.env("GUEST_MICROS", "0");
    place.env("GUEST_ID_MICROS", "20000");
    let mut run = place.start("a", "1..=1000", &["--batch", "100"]);
    let pool = place.computing_pool(&run);
    signal(pool, "STOP");
    assert_eq!(run.wait(LONG).code(), Some(0), "{}", place.host.log("a"));
    assert!(place.host.log("a").contains("gave no sign for 30 s"), "{}", place.host.log("a"));
    assert_eq!(place.rows("a").len(), 1000);
}

#[test]
fn a_host_that_breaks_hands_its_batches_back() {
    let mut place = Place::new("refuses", "");
    place.env("GUEST_ID_MICROS", "20000");
    let model = place.host.path().join("model");
    std::fs::write(&model, "").expect("a file");
    let run = place.start("a", "1..=1000", &["--batch", "100"]);
    let pool = place.computing_pool(&run);
    std::fs::remove_file(&model).expect("it is there");
    signal(pool, "KILL");
    wait_until("the reason in status", LONG, || {
        let told = place.host.call(&["status", "a"]).stdout;
        if told.contains("draws no batches") { Ok(()) } else { Err(told) }
    });
    let log = place.host.log("a");
    assert!(log.contains("the batch is returned to the stream: this host cannot compute it"), "{log}");
    std::fs::write(&model, "").expect("a file");
    place.host.wait_sealed("a", LONG);
    let rows = place.rows("a");
    assert!(rows.len() == 1000 && rows.iter().all(|row| !row.contains('!')), "{rows:?}");
}

#[test]
fn a_host_without_threads_draws_nothing_and_says_how_many_there_are() {
    let mut place = Place::new("", "");
    place.name_servers();
    // It runs as a user of its own, of whom there are no other processes.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(place.host.path(), readable).expect("its own directory");
    place.host.call(&["produce", "--ids", "1..=1000", "--run", "a", "--batch", "10"]).expect(0);
    let under = ["setpriv", "--reuid", "64321", "--clear-groups", "prlimit", "--nproc=24"];
    let launch = Launch {
        words: ["work", "--threads", "64"].map(str::to_owned).into(),
        under: under.map(str::to_owned).into(),
        ..Launch::default()
    };
    let _poor = place.host.start_as("poor", &launch);
    wait_until("the reason in the log", LONG, || {
        let log = place.host.log("poor");
        let said =
            ["draws no batches", "128 threads", "`ulimit -u`: 24"].iter().all(|said| log.contains(said));
        if said { Ok(()) } else { Err(log) }
    });
    assert_eq!(place.host.status("a")["in_flight"], 0);
    let _sink = place.host.start("sink", &["sink"]);
    let _work = place.host.start("work", &["work"]);
    place.host.wait_sealed("a", LONG);
    assert_eq!(place.rows("a").len(), 1000);
    assert!(!place.host.log("work").contains("redelivered=1"), "{}", place.host.log("work"));
}

/// The same with threads, of which this user may have 150.
#[test]
fn threads_that_many_ids_leave_running_are_not_blamed_on_the_last() {
    let mut place = Place::new("runs_on", "isolate = true");
    place.name_servers();
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(place.host.path(), readable).expect("its own directory");
    place.host.call(&["produce", "--ids", "1..=500", "--run", "a"]).expect(0);
    let under = ["setpriv", "--reuid", "64322", "--clear-groups", "prlimit", "--nproc=150"];
    let launch = Launch {
        words: ["work", "--threads", "1"].map(str::to_owned).into(),
        under: under.map(str::to_owned).into(),
        ..Launch::default()
    };
    let _work = place.host.start_as("work", &launch);
    let _sink = place.host.start("sink", &["sink"]);
    place.host.wait_sealed("a", LONG);
    let rows = place.rows("a");
    assert!(rows.len() == 500 && rows.iter().all(|row| !row.contains('!')), "{rows:?}");
    let log = place.host.log("work");
    assert!(log.contains("the system gives no thread any more"), "{log}");
}

/// A worker that is killed in the moment in which an id crashes its process leaves no process that could end what that id started.
#[test]
fn what_a_killed_worker_left_is_ended_by_the_next() {
    let place = Place::new("", "");
    let gone =
        std::process::Command::new("true").spawn().and_then(|mut child| Ok((child.id(), child.wait()?)));
    let (gone, _) = gone.expect("`true` runs");
    let sleep = |worker: u32| {
        let mut sleep = std::process::Command::new("sleep");
        sleep
            .arg(place.seconds())
            .env("MILLSTREAM_COMPUTES_FOR", format!("millstream-{worker}-0-0123456789abcdef"));
        sleep.spawn().expect("`sleep` runs")
    };
    let (mut left, mut others) = (sleep(gone), sleep(std::process::id()));
    let _work = place.host.start("work", &["work"]);
    wait_until("the end of what was left", LONG, || match left.try_wait() {
        Ok(Some(_)) => Ok(()),
        still => Err(format!("{still:?}")),
    });
    assert!(others.try_wait().expect("a child").is_none(), "what a living worker started goes on");
    others.kill().and_then(|()| others.wait()).expect("a child");
}

#[test]
fn the_first_process_of_a_container_waits_for_strays() {
    let mut place = Place::new("orphans", "");
    place.name_servers();
    let under = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"].map(str::to_owned);
    let launch = Launch { words: vec!["work".into()], under: under.into(), ..Launch::default() };
    let contained = place.host.start_as("work", &launch);
    let _sink = place.host.start("sink", &["sink"]);
    place.host.call(&["produce", "--ids", "1..=40", "--run", "a"]).expect(0);
    place.host.wait_sealed("a", LONG);
    assert_eq!(place.rows("a").len(), 40);
    let first = *children(contained.pid(), "work").first().expect("the worker");
    wait_until("no process that ended and is not waited for", LONG, || {
        let strays: Vec<u32> =
            children(first, "").into_iter().filter(|pid| state_of(*pid) == Some('Z')).collect();
        if strays.is_empty() { Ok(()) } else { Err(format!("{strays:?}")) }
    });
}

/// The service that ids need is away for longer than five attempts take.
#[test]
fn attempts_follow_a_time_as_well_as_a_count() {
    let place = Place::new("service", "attempts = 2\nretry_for = '10m'");
    let mut run = place.start("a", "1..=4000", &["--batch", "10"]);
    let told = wait_until("the reason in status", LONG, || {
        let told = place.host.call(&["status", "a"]).stdout;
        if told.contains("wait for another attempt: the service is away") { Ok(told) } else { Err(told) }
    });
    assert!(told.contains("again  "), "{told}");
    wait_until("the worker slows down", LONG, || {
        let log = place.host.log("a");
        if log.contains("many ids ask for another attempt") { Ok(()) } else { Err(log) }
    });
    // Those that it had drawn by then, and two of the run since: not the 400 that there are.
    assert!(place.host.status("a")["in_flight"].as_u64() < Some(60), "{}", place.host.status("a"));
    std::fs::write(place.host.path().join("service"), "").expect("a file");
    assert_eq!(run.wait(LONG).code(), Some(0), "{}", place.host.log("a"));
    assert_eq!(place.rows("a").len(), 4000);
}

#[test]
fn attempts_end_with_their_time() {
    let place = Place::new("service", "attempts = 2\nretry_for = '2s'");
    let rows = place.run("a", "1..=10", &[], 3);
    let gave_up = |row: &String| row.ends_with("!gave up after every attempt: the service is away");
    assert!(rows.len() == 10 && rows.iter().all(gave_up), "{rows:?}");
}

#[test]
fn a_run_with_too_many_dead_letters_is_paused() {
    let mut place = Place::new("host", "");
    place.env("GUEST_BROKEN", "1");
    place.env("GUEST_ID_MICROS", "5000");
    let mut run = place.start("a", "1..=4000", &["--batch", "10", "--max-dead", "1%"]);
    let status = wait_until("the run to be paused", LONG, || {
        let status = place.status("a");
        if status["state"] == "paused" { Ok(status) } else { Err(status.to_string()) }
    });
    assert_eq!(status["max_dead"], 40);
    assert!(status["paused_for"].as_str().is_some_and(|why| why.contains("--max-dead")), "{status}");
    assert!(place.host.call(&["status", "a"]).expect(0).stdout.contains("more than the 40 of --max-dead"));
    assert!(status["done"].as_u64() < Some(4000), "{status}");
    place.host.call(&["resume", "a"]).expect(0);
    assert_eq!(run.wait(LONG).code(), Some(3), "{}", place.host.log("a"));
    assert_eq!(place.rows("a").len(), 4000);
}

#[test]
fn a_host_whose_ids_fail_draws_nothing_and_is_named() {
    let mut place = Place::new("host", "");
    place.env("GUEST_ID_MICROS", "20000");
    place.host.call(&["produce", "--ids", "1..=2000", "--run", "a", "--batch", "10"]).expect(0);
    let _sink = place.host.start("sink", &["sink"]);
    let _good = place.host.start("good", &["work"]);
    wait_until("the good host at work", LONG, || {
        match place.host.status("a")["ids_per_second_now"].as_f64() {
            Some(1.0..) => Ok(()),
            _ => Err(place.host.log("good")),
        }
    });
    let env =
        [("GUEST_BROKEN", "1"), ("GUEST_ID_MICROS", "1")].map(|(name, value)| (name.into(), value.into()));
    let launch = Launch { words: vec!["work".into()], env: env.into(), ..Launch::default() };
    let _bad = place.host.start_as("bad", &launch);
    wait_until("the bad host to be named", LONG, || {
        let told = place.host.call(&["status", "a"]).stdout;
        if told.contains("its ids fail far more often than those of others") { Ok(()) } else { Err(told) }
    });
    assert!(place.host.log("bad").contains("this host draws no batches"), "{}", place.host.log("bad"));
    place.host.wait_sealed("a", LONG);
    let dead = place.rows("a").iter().filter(|row| row.contains('!')).count();
    assert!((1..200).contains(&dead), "{dead}");
}

/// The state of a process, as the kernel spells it.
fn state_of(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

fn none_left(seconds: &str) {
    wait_until("the end of what ids started", LONG, || match &sleeps(seconds)[..] {
        [] => Ok(()),
        left => Err(format!("{left:?}")),
    });
}
