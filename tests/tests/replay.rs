//! A run, or some of its ids, computed again as a new pass: readers see the pass before until the new one is whole.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::dice::Dice;
use tests::nats::Nats;
use tests::{Host, Process, SOON, Up, wait_until};

const RUN: &str = "a";
const IDS: u64 = 3000;

/// A sealed run whose ids 901, 902 and 903 of every thousand are dead letters.
struct Scene {
    // Dropped in this order: services before servers, servers before their directory.
    work: Process,
    sink: Process,
    up: Up,
    host: Host,
}

impl Scene {
    fn new() -> Self {
        let host = Host::new(env!("CARGO_BIN_EXE_trial"));
        let up = host.up();
        host.call(&["produce", "--ids", &format!("1..={IDS}"), "--run", RUN, "--batch", "100"]).expect(0);
        let (work, sink) = (host.start("work", &["work"]), host.start("sink", &["sink"]));
        host.wait_sealed(RUN, SOON);
        let scene = Self { work, sink, up, host };
        assert_eq!(scene.view(), (IDS - 9, IDS - 9));
        scene
    }

    /// From now on, ids are well.
    fn cure(&mut self) {
        self.work.signal("TERM");
        assert_eq!(self.work.wait(SOON).code(), Some(0));
        self.host.env.push(("TRIAL_TAME".into(), "1".into()));
        self.work = self.host.start("work", &["work"]);
    }

    /// Rows and distinct ids that readers see.
    fn view(&self) -> (u64, u64) {
        let answer =
            self.up.ask(&format!("SELECT count(), uniqExact(id) FROM millstream.trial WHERE run = '{RUN}'"));
        let (rows, ids) = answer.trim().split_once('\t').expect("two columns");
        (rows.parse().expect("a number"), ids.parse().expect("a number"))
    }

    /// Waits until a pass is sealed; what readers see meanwhile is what they saw before.
    fn wait_pass(&self, pass: u64, before: u64) {
        wait_until("a sealed pass", SOON, || {
            let seen = self.view();
            let status = self.host.status(RUN);
            match (status["pass"].as_u64(), status["state"].as_str()) {
                (Some(found), Some("sealed")) if found == pass => Ok(()),
                // The seal may have come between the two questions, and not before the first of them.
                _ if seen == (before, before) => Err(status.to_string()),
                _ => Err(format!("readers see {seen:?}, status says {status}")),
            }
        });
    }

    fn replay(&self, words: &[&str]) -> Value {
        self.host.call(&[&["replay", RUN, "--json"], words].concat()).expect(0).json()
    }

    /// Fails unless the replay is refused and says all of this, and nothing is begun.
    fn refuses(&self, words: &[&str], says: &[&str]) {
        let before = self.host.status(RUN)["pass"].clone();
        self.host.call(&[&["replay", RUN], words].concat()).expect(1).says(says);
        assert_eq!(self.host.status(RUN)["pass"], before);
    }

    /// A replay whose pass is sealed in the end: how many ids it computed, and in how many batches.
    fn replayed(&self, words: &[&str], before: u64) -> (u64, u64) {
        let replayed = self.replay(words);
        let number = |key: &str| replayed[key].as_u64().expect("a number");
        self.wait_pass(number("pass"), before);
        self.assert_clean();
        (number("ids"), number("batches"))
    }

    /// Batches whose ids the stream holds no more.
    fn purge_ids(&self, batch: u32) {
        let filter = json!({ "filter": format!("trial.ids.{RUN}.{batch}") });
        let answer = Nats::connect(&self.up.nats).api("STREAM.PURGE.trial_ids", &filter);
        assert_eq!(answer["purged"], 1, "{answer}");
    }

    fn dead_ids(&self) -> Vec<u64> {
        let report = self.host.call(&["dead", RUN, "--json"]).expect(0).json();
        let letters = report["letters"].as_array().expect("a list");
        letters.iter().map(|letter| letter["id"].as_str().expect("text").parse().expect("a number")).collect()
    }

    fn restart_all(&mut self) {
        self.work.kill();
        self.sink.kill();
        self.up.process.signal("INT");
        self.up.process.wait(SOON);
        self.up = self.host.up();
        self.work = self.host.start("work", &["work"]);
        self.sink = self.host.start("sink", &["sink"]);
    }

    fn dead(&self) -> Value {
        self.host.call(&["dead", RUN, "--json"]).expect(0).json()["dead"].clone()
    }

    fn assert_clean(&self) {
        let report = self.host.call(&["verify", RUN, "--json"]).expect(0).json();
        assert_eq!((&report["rows"], &report["sealed"]), (&IDS.into(), &true.into()), "{report}");
    }
}

#[test]
fn dead_letters_are_computed_again_and_join_the_rows_that_were_right() {
    let mut scene = Scene::new();
    scene.cure();
    let replayed = scene.replay(&["--dead", "--error", "rejected"]);
    assert_eq!(
        (&replayed["pass"], &replayed["ids"], &replayed["batches"]),
        (&2.into(), &3.into(), &3.into())
    );
    scene.wait_pass(2, IDS - 9);
    assert_eq!((scene.view(), scene.dead()), ((IDS - 6, IDS - 6), 6.into()));
    scene.assert_clean();

    assert_eq!(scene.replay(&["--dead"])["ids"], 6);
    scene.wait_pass(3, IDS - 6);
    assert_eq!((scene.view(), scene.dead()), ((IDS, IDS), 0.into()));
    scene.assert_clean();
    let wrong = format!("SELECT count() FROM millstream.trial WHERE run = '{RUN}' AND squared != id * id");
    assert_eq!(scene.up.number(&wrong), 0);
    // Every pass is whole and stays to be compared.
    let passes = format!(
        "SELECT groupArray(rows) FROM (SELECT pass, count() AS rows FROM millstream.trial_live WHERE run = '{RUN}' GROUP BY pass ORDER BY pass)"
    );
    assert_eq!(scene.up.ask(&passes).trim(), format!("[{IDS},{IDS},{IDS}]"));
    scene.host.call(&["replay", RUN, "--dead"]).expect(1).says(&["there are none like that", "hint: "]);
}

#[test]
fn what_is_still_bad_stays_a_dead_letter_of_the_new_pass() {
    let scene = Scene::new();
    assert_eq!(scene.replay(&["--dead", "--batch", "9"])["ids"], 3);
    scene.wait_pass(2, IDS - 9);
    assert_eq!((scene.view(), scene.dead()), ((IDS - 9, IDS - 9), 9.into()));
    scene.assert_clean();
}

#[test]
fn the_same_replay_twice_is_one_pass_and_another_waits() {
    let mut scene = Scene::new();
    scene.work.signal("TERM");
    scene.work.wait(SOON);
    let first = scene.replay(&["--dead"]);
    assert_eq!(scene.replay(&["--dead"]), first);
    scene.host.call(&["replay", RUN, "--dead", "--error", "x"]).expect(1).says(&["not sealed yet", "hint: "]);
    // Until it is computed, `dead` shows what readers see.
    assert_eq!(scene.dead(), 9);
    scene.host.env.push(("TRIAL_TAME".into(), "1".into()));
    scene.work = scene.host.start("work", &["work"]);
    scene.wait_pass(2, IDS - 9);
    assert_eq!(scene.view(), (IDS, IDS));
}

#[test]
fn a_pass_over_dead_letters_is_repaired_like_any_other() {
    let mut scene = Scene::new();
    scene.cure();
    scene.replay(&["--dead"]);
    scene.wait_pass(2, IDS - 9);
    // One that was computed again, and one that was taken over.
    scene.up.ask(&format!(
        "ALTER TABLE millstream.trial_rows DELETE WHERE run = '{RUN}' AND pass = 2 AND id IN (901, 5) SETTINGS mutations_sync = 2"
    ));
    let report = scene.host.call(&["verify", RUN, "--repair", "--json"]).expect(1).json();
    assert_eq!(report["short_batches"], 2, "{report}");
    scene.wait_pass(2, IDS - 2);
    assert_eq!(scene.view(), (IDS, IDS));
    scene.assert_clean();
}

#[test]
fn the_whole_run_is_computed_again_through_a_restart_of_everything() {
    let mut scene = Scene::new();
    scene.work.signal("TERM");
    scene.work.wait(SOON);
    let first = scene.replay(&[]);
    assert_eq!((&first["pass"], &first["ids"], &first["batches"]), (&2.into(), &IDS.into(), &30.into()));
    assert_eq!(scene.replay(&[]), first, "the same words are the same pass");
    scene.refuses(&["--dead"], &["not sealed yet", "hint: "]);
    scene.host.env.push(("TRIAL_TAME".into(), "1".into()));
    scene.restart_all();
    scene.wait_pass(2, IDS - 9);
    assert_eq!((scene.view(), scene.dead()), ((IDS, IDS), 0.into()));
    scene.assert_clean();
}

#[test]
fn a_paused_pass_is_waited_for_and_a_cancelled_one_is_passed_over() {
    let mut scene = Scene::new();
    scene.work.signal("TERM");
    scene.work.wait(SOON);
    scene.replay(&["--batches", "0..20"]);
    scene.host.call(&["pause", RUN]).expect(0);
    for words in [&[][..], &["--dead"], &["--batches", "0..20"]] {
        scene.refuses(words, &["not sealed yet", "hint: "]);
    }
    scene.host.call(&["cancel", RUN]).expect(0);
    scene.host.env.push(("TRIAL_TAME".into(), "1".into()));
    scene.work = scene.host.start("work", &["work"]);
    // From the first pass: the second has nothing to take over.
    assert_eq!(scene.replayed(&["--dead"], IDS - 9), (9, 3));
    assert_eq!(scene.view(), (IDS, IDS));
    let passes = format!("SELECT groupUniqArray(pass) FROM millstream.trial_live WHERE run = '{RUN}'");
    assert_eq!(scene.up.ask(&passes).trim().len(), "[1,3]".len(), "nothing was computed of pass 2");
}

/// The repair removed a batch whose base had the same wrong value, and nothing brought it back: readers lost good rows, and each
/// command pointed to one that refused.
#[test]
fn a_value_changed_in_a_pass_and_its_base_costs_readers_no_row() {
    let mut scene = Scene::new();
    scene.cure();
    scene.replay(&["--dead"]);
    scene.wait_pass(2, IDS - 9);
    scene.up.ask(&format!(
        "ALTER TABLE millstream.trial_rows UPDATE squared = 1 WHERE run = '{RUN}' AND id = 7 SETTINGS mutations_sync = 2"
    ));
    let told = scene.host.call(&["verify", RUN, "--repair"]).expect(1).stdout;
    assert!(told.contains("`replay a`") && told.contains(", 0 batches are computed again"), "{told}");
    assert_eq!(scene.view(), (IDS, IDS));
    scene.replay(&[]);
    scene.wait_pass(3, IDS);
    assert_eq!(scene.view(), (IDS, IDS));
    scene.host.call(&["verify", RUN, "--values"]).expect(0);
}

/// The base of a pass is gone from the table: no repair of that pass can bring it back, and none goes on trying.
#[test]
fn a_pass_whose_base_is_gone_says_what_helps() {
    let mut scene = Scene::new();
    scene.sink.kill();
    scene.cure();
    scene.replay(&["--dead"]);
    let lose = "ALTER TABLE millstream.trial_rows DELETE WHERE pass = 1 AND batch IN (3, 4) SETTINGS mutations_sync = 2";
    scene.up.ask(lose);
    scene.sink = scene.host.start("second-sink", &["sink"]);
    let parts = ["pass 2 of run `a`", "200 rows of pass 1", "`cancel a`", "`replay a`"];
    let all_in = |told: &str| match parts.iter().find(|part| !told.contains(**part)) {
        None => Ok(()),
        Some(part) => Err(format!("`{part}` is not in {told}")),
    };
    wait_until("a sealer that says so", SOON, || all_in(&scene.host.log("second-sink")));
    for words in [&["status", RUN][..], &["verify", RUN], &["verify", RUN, "--repair"]] {
        let called = scene.host.call(words);
        all_in(&(called.stdout + &called.stderr)).expect("it is said");
    }
    let repaired = scene.host.call(&["verify", RUN, "--repair", "--json"]).json();
    assert_eq!(repaired["repair"]["batches_again"], 0, "{repaired}");
    assert!(!scene.host.log("second-sink").contains("repaired what was not complete"));
    // And it helps.
    scene.host.call(&["cancel", RUN]).expect(0);
    scene.replay(&[]);
    wait_until("a sealed pass", SOON, || match scene.host.status(RUN) {
        status if status["pass"] == 3 && status["state"] == "sealed" => Ok(()),
        status => Err(status.to_string()),
    });
    assert_eq!(scene.view(), (IDS, IDS));
}

/// 200 MB of rows are copied; a part holds no more than an insert of a sink does.
#[test]
fn rows_that_are_taken_over_come_in_pieces_of_bounded_bytes() {
    let mut host = Host::new(env!("CARGO_BIN_EXE_bulky"));
    host.env.push(("BULKY_PLAIN".into(), "1".into()));
    let up = host.up();
    host.call(&["setup"]).expect(0);
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    host.call(&["produce", "--ids", "1..=2000", "--run", RUN, "--batch", "100"]).expect(0);
    host.wait_sealed(RUN, SOON);
    up.ask("SYSTEM STOP MERGES millstream.bulky_rows");
    host.call(&["replay", RUN, "--batches", "0..1"]).expect(0);
    wait_until("a sealed pass", SOON, || match host.status(RUN) {
        status if status["pass"] == 2 && status["state"] == "sealed" => Ok(()),
        status => Err(status.to_string()),
    });
    let largest = "SELECT max(bytes) FROM (SELECT sum(byteSize(noise)) AS bytes FROM millstream.bulky_rows WHERE pass = 2 GROUP BY _part)";
    let largest = up.number(largest);
    assert!((1..=130 << 20).contains(&largest), "a part of {largest} bytes");
    host.call(&["verify", RUN, "--values"]).expect(0);
    assert_eq!(up.number("SELECT count() FROM millstream.bulky_rows WHERE pass = 2"), 2000);
}

#[test]
fn some_batches_are_computed_again_and_the_others_keep_their_rows() {
    let mut scene = Scene::new();
    scene.cure();
    assert_eq!(scene.replayed(&["--batches", "9..=10"], IDS - 9), (200, 2));
    assert_eq!(scene.dead_ids(), [1901, 1902, 1903, 2901, 2902, 2903]);
    scene.refuses(&["--batches", "29..31"], &["replay batches 29..31", "its batches are 0..30", "hint: "]);
    scene.refuses(&["--batches", "0..=18446744073709551615"], &["its batches are 0..30"]);
    scene.host.call(&["replay", RUN, "--batches", "3"]).expect(2).says(&["--batches: `3` is not a range"]);
    assert_eq!(scene.replayed(&["--batches", "0..30"], IDS - 6), (IDS, 30));
    assert_eq!(scene.view(), (IDS, IDS));
}

#[test]
fn ids_are_chosen_by_a_condition_on_their_rows() {
    let mut scene = Scene::new();
    scene.cure();
    let own = "id IN (1901, 5) -- these";
    assert_eq!(scene.replayed(&["--where", own], IDS - 9), (2, 2));
    assert_eq!(scene.dead_ids(), [901, 902, 903, 1902, 1903, 2901, 2902, 2903]);
    // What a condition does not say of a row is no.
    let nothing = "if(id = 901, 1, NULL)";
    assert_eq!(scene.replayed(&["--where", nothing], IDS - 8), (1, 1));
    let joined = "status = 'dead' AND id IN (SELECT id FROM millstream.trial_live WHERE pass = 1 AND error LIKE '%rejected%')";
    assert_eq!(scene.replayed(&["--where", joined], IDS - 7), (1, 1));
    assert_eq!(scene.view(), (IDS - 6, IDS - 6));

    scene.refuses(&["--where", "stepz > 1"], &["failed to select ids where `stepz > 1`", "stepz", "hint: "]);
    scene.refuses(&["--where", "id >"], &["failed to select ids where `id >`", "code 62", "hint: "]);
    for outside in ["1) OR (1", "1), (1", "id, 1", "'text'", "count() > 1", ""] {
        scene.refuses(&["--where", outside], &["failed to select ids where", "code ", "hint: "]);
    }
    scene.refuses(&["--where", "rand() % 2 = 0"], &["not the same each time", "hint: "]);
    scene.refuses(&["--where", "id > 3000"], &["there are none like that", "hint: "]);
    scene.host.call(&["replay", RUN, "--error", "x"]).expect(2).says(&["hint: add --dead"]);
}

#[test]
fn batches_are_chosen_by_when_they_were_published() {
    let mut scene = Scene::new();
    scene.cure();
    std::thread::sleep(Duration::from_millis(1100));
    let marked = Instant::now();
    std::thread::sleep(Duration::from_millis(1100));
    scene.purge_ids(9);
    scene.host.call(&["produce", "--ids", &format!("1..={IDS}"), "--run", RUN]).expect(0);
    let since = |more: u64| format!("{}s", marked.elapsed().as_secs() + more);
    // Before the mark, and after it: a second of either is free of them.
    assert_eq!(scene.replayed(&["--until", &since(1)], IDS - 9), (IDS - 100, 29));
    assert_eq!(scene.dead_ids(), [901, 902, 903]);
    let last = Nats::connect(&scene.up.nats)
        .api("STREAM.MSG.GET.trial_ids", &json!({ "last_by_subj": format!("trial.ids.{RUN}.9") }));
    let last = last["message"]["time"].as_str().expect("a time").to_owned();
    assert_eq!(scene.replayed(&["--since", &last], IDS - 3), (100, 1));
    assert_eq!(scene.view(), (IDS, IDS));
    scene.refuses(&["--until", "2000-01-01T00:00:00Z"], &["none like that"]);
    scene.host.call(&["replay", RUN, "--since", "noon"]).expect(2).says(&["`noon` is no moment", "hint: "]);
}

#[test]
fn ids_that_the_stream_holds_no_more_are_told_of_before_anything_is_begun() {
    let mut scene = Scene::new();
    scene.cure();
    scene.purge_ids(7);
    let purged = [
        "the ids of 1 of its 30 batches are no longer in stream `trial_ids`",
        "were removed from it",
        "hint: `produce`",
    ];
    scene.refuses(&[], &purged);
    scene.refuses(&["--since", "1d"], &purged);
    let mut nats = Nats::connect(&scene.up.nats);
    let mut config = nats.stream("trial_ids")["config"].clone();
    config["max_age"] = json!(1_000_000_000);
    let answer = nats.api("STREAM.UPDATE.trial_ids", &config);
    assert!(answer["error"].is_null(), "{answer}");
    wait_until("an empty stream", SOON, || match nats.messages("trial_ids") {
        0 => Ok(()),
        messages => Err(messages.to_string()),
    });
    scene.refuses(&[], &["the ids of 30 of its 30 batches", "it keeps ids for 1s, so those published 2"]);
    config["max_age"] = json!(0);
    nats.api("STREAM.UPDATE.trial_ids", &config);
    // ClickHouse has the ids of what is sealed.
    assert_eq!(scene.replayed(&["--dead"], IDS - 9), (9, 3));
    assert_eq!(scene.view(), (IDS, IDS));
}

#[test]
fn a_replay_that_is_killed_goes_on_with_the_same_words() {
    let mut scene = Scene::new();
    scene.cure();
    let mut dice = Dice::drawn("REPLAY_SEED");
    for words in [&["--where", "id % 2 = 1"][..], &["--batches", "3..20"], &[]] {
        let pass = scene.host.status(RUN)["pass"].as_u64().expect("a pass");
        for _ in 0..4 {
            let mut replay = scene.host.start("replay", &[&["replay", RUN], words].concat());
            std::thread::sleep(dice.pause(1, 600));
            replay.kill();
        }
        // With nothing in its hands, as far as can be told: nobody waits two minutes for a redelivery.
        wait_until("a sink at rest", SOON, || match scene.host.status(RUN)["to_store"].as_u64() {
            Some(0) => Ok(()),
            left => Err(format!("{left:?}")),
        });
        scene.sink.kill();
        scene.sink = scene.host.start("sink", &["sink"]);
        // One that got through may be sealed by now, and the same words begin another.
        scene.replay(words);
        // Rows that came to the sink after that look are delivered again two minutes later.
        wait_until("a sealed pass", SOON * 3, || {
            let status = scene.host.status(RUN);
            let newer = status["pass"].as_u64() > Some(pass);
            if newer && status["state"] == "sealed" { Ok(()) } else { Err(status.to_string()) }
        });
        scene.assert_clean();
    }
    assert_eq!((scene.view(), scene.dead()), ((IDS, IDS), 0.into()), "seed {}", dice.seed);
}

/// `REPLAY_IDS` says how many ids; the more, the longer the moments in which a mixture could be seen.
#[test]
fn readers_see_one_pass_or_the_next_and_never_a_mixture() {
    let ids: u64 = std::env::var("REPLAY_IDS").ok().and_then(|ids| ids.parse().ok()).unwrap_or(200_000);
    let patience = SOON.max(Duration::from_micros(ids * 200));
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    let up = host.up();
    host.call(&["produce", "--ids", &format!("1..={ids}"), "--run", RUN]).expect(0);
    let (mut work, _sink) = (host.start("work", &["work"]), host.start("sink", &["sink"]));
    host.wait_sealed(RUN, patience);
    work.signal("TERM");
    work.wait(patience);
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    let _work = host.start("work", &["work"]);

    let (done, looked) = (AtomicBool::new(false), Barrier::new(4));
    let steps: [&[&str]; 2] = [&["--where", "status = 'dead' AND id % 2 = 1"], &[]];
    let seen = std::thread::scope(|scope| {
        // A pass is told by its rows, its distinct ids and their sum: what a mixture had, none of them has.
        let questions =
            ["count(), uniqExact(id), sum(id)", "count(), sum(id)", "countIf(id = 1), countIf(id = 1901)"];
        let readers = questions.map(|question| {
            let (up, done, looked) = (&up, &done, &looked);
            let reader = move || {
                let look = || up.ask(&format!("SELECT {question} FROM millstream.trial WHERE run = '{RUN}'"));
                let (mut seen, mut looks) = (vec![look()], 1);
                looked.wait();
                loop {
                    // Once more after the last seal.
                    let last = done.load(Ordering::Relaxed);
                    let found = look();
                    looks += 1;
                    if seen.last() != Some(&found) {
                        seen.push(found);
                    }
                    if last {
                        break (seen, looks);
                    }
                }
            };
            scope.spawn(reader)
        });
        looked.wait();
        for (pass, words) in (2..).zip(steps) {
            let begun = Instant::now();
            host.call(&[&["replay", RUN], words].concat()).expect(0);
            wait_until("a sealed pass", patience, || {
                let status = host.status(RUN);
                let sealed = status["pass"] == pass && status["state"] == "sealed";
                if sealed { Ok(()) } else { Err(status.to_string()) }
            });
            report(&format!("pass {pass} of {ids} ids took {:.1} s", begun.elapsed().as_secs_f64()));
        }
        done.store(true, Ordering::Relaxed);
        readers.map(|reader| reader.join().expect("a reader"))
    });
    let dead: [fn(u64) -> bool; 3] =
        [|id| (901..=903).contains(&(id % 1000)), |id| id % 1000 == 902, |_| false];
    let passes = dead.map(|dead| {
        (1..=ids).filter(|id| !dead(*id)).fold((0u64, 0u64), |(count, sum), id| (count + 1, sum + id))
    });
    let expected = [
        passes.map(|(count, sum)| format!("{count}\t{count}\t{sum}\n")).to_vec(),
        passes.map(|(count, sum)| format!("{count}\t{sum}\n")).to_vec(),
        ["1\t0\n", "1\t1\n"].map(str::to_owned).to_vec(),
    ];
    for ((seen, looks), expected) in seen.into_iter().zip(expected) {
        report(&format!("{looks} looks saw {seen:?}"));
        assert_eq!(seen, expected, "each pass in its turn, and nothing else");
        assert!(looks > 5, "{looks} looks are too few to see anything");
    }
}

#[expect(clippy::print_stderr, reason = "figures for who runs this test by hand")]
fn report(line: &str) {
    eprintln!("{line}");
}
