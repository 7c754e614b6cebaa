//! Ids that end their process, never end, or eat memory: each costs itself, and the rest of its batch lands.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tests::{Host, Rogue, Up, wait_until};

/// Three seconds for each id that never ends, and all the starts of processes, on a busy machine.
const LONG: Duration = Duration::from_secs(400);

fn rogue() -> Host {
    Host::new(env!("CARGO_BIN_EXE_rogue"))
}

/// Asks ClickHouse, without any code of ours between, whether exactly the bad ids of `1..=last` are dead, each with its
/// reason, and all others have their row.
fn check(up: &Up, run: &str, last: u64) {
    let dead =
        up.ask(&format!("SELECT id, error FROM millstream.rogue_dead WHERE run = '{run}' ORDER BY id"));
    let dead: BTreeMap<u64, &str> = dead
        .lines()
        .map(|line| {
            let (id, error) = line.split_once('\t').expect("two columns");
            (id.parse().expect("an id"), error)
        })
        .collect();
    let expected: Vec<u64> = (1..=last).filter(|id| Rogue::reason(*id).is_some()).collect();
    assert_eq!(dead.keys().copied().collect::<Vec<_>>(), expected);
    for (id, error) in dead {
        let reason = Rogue::reason(id).expect("a bad id");
        assert!(error.starts_with(reason), "id {id}: `{error}` does not begin with `{reason}`");
    }
    let good = last - expected.len() as u64;
    let rows = format!(
        "SELECT count(), uniqExact(id), countIf(squared != id * id) FROM millstream.rogue WHERE run = '{run}'"
    );
    assert_eq!(up.ask(&rows).trim(), format!("{good}\t{good}\t0"));
}

#[test]
fn ids_that_crash_or_never_end_become_dead_letters_and_the_others_have_rows() {
    // 100,000 ids take long, mostly in waiting for those that never end: `ROGUE_IDS=100000` for all of them.
    let last = std::env::var("ROGUE_IDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8_000);
    let host = rogue();
    let mut run =
        host.start("run", &["run", "--ids", &format!("1..={last}"), "--run", "a", "--batch", "1000"]);
    let ended = run.wait(LONG * (last / 8_000).max(1) as u32);
    assert_eq!(ended.code(), Some(3), "{}", host.log("run"));
    check(&host.up(), "a", last);
}

#[test]
fn a_worker_survives_its_pool_and_says_what_became_of_it() {
    let host = rogue();
    let up = host.up();
    host.call(&["produce", "--ids", "100..=140", "--run", "a", "--batch", "7"]).expect(0);
    let mut work = host.start("work", &["work"]);
    let _sink = host.start("sink", &["sink"]);
    host.wait_sealed("a", LONG);
    let log = host.log("work");
    for said in ["the compute pool died", "an id ended its process", "crashed: signal 11"] {
        assert!(log.contains(said), "`{said}` is not in\n{log}");
    }
    assert!(work.runs(), "{log}");
    let report = host.call(&["dead", "a", "--json"]).expect(0).json();
    assert_eq!(report["dead"], 6, "{report}");
    check_ids(&up, "a", 41);
    work.signal("TERM");
    assert_eq!(work.wait(LONG).code(), Some(0));
    wait_until("the end of every compute process", LONG, || {
        let left = children_of(work.pid());
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

#[test]
fn a_killed_worker_leaves_no_compute_process_behind() {
    let host = rogue();
    let _up = host.up();
    // Id 104 loops for ever: what computes it has nobody to ask whether to go on.
    host.call(&["produce", "--ids", "103..=106", "--run", "a"]).expect(0);
    let mut work = host.start("work", &["work"]);
    let children = wait_until("a child with an id that never ends", LONG, || {
        let children = children_of(work.pid());
        if children.iter().any(|(_, line)| line.contains("__compute-child")) {
            Ok(children)
        } else {
            Err(host.log("work"))
        }
    });
    work.kill();
    wait_until("the end of every compute process", LONG, || {
        let left: Vec<_> = children
            .iter()
            .filter(|(pid, line)| command_line(*pid).is_some_and(|now| now == *line))
            .collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

#[test]
fn a_limit_of_the_installation_goes_before_the_pipelines() {
    let host = rogue();
    std::fs::write(
        host.path().join("millstream.toml"),
        "[work]\nhard_limit = '4s'\nmemory_limit = \"64MiB\"\nisolate = true\n",
    )
    .expect("a file");
    host.call(&["run", "--ids", "104..=106", "--run", "a"]).expect(3);
    let report: Value = host.call(&["dead", "a", "--json"]).expect(0).json();
    let errors: Vec<&str> = report["letters"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|letter| letter["error"].as_str())
        .collect();
    assert_eq!(errors, ["timed out after 4 s", "out of memory: limit 64 MB", "timed out after 4 s"]);
    let kinds = report["by_error"].as_array().expect("a list");
    assert!(kinds.iter().all(|kind| kind["code"] == "MS0039"), "{report}");
}

fn check_ids(up: &Up, run: &str, ids: u64) {
    let rows = format!("SELECT count(), uniqExact(id) FROM millstream.rogue_live WHERE run = '{run}'");
    assert_eq!(up.ask(&rows).trim(), format!("{ids}\t{ids}"));
}

/// Processes that compute for a worker, with their command lines.
fn children_of(pid: u32) -> Vec<(u32, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<u32> = children
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    pids.into_iter()
        .filter_map(|pid| Some((pid, command_line(pid)?)))
        .filter(|(_, line)| line.contains("__compute"))
        .collect()
}

fn command_line(pid: u32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| !line.is_empty())
}
