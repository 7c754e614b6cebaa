//! Dead letters computed again as a new pass: readers see the pass before until the new one is whole.

use serde_json::Value;
use tests::{Host, Process, SOON, Up, wait_until};

const RUN: &str = "a";
const IDS: u64 = 3000;

/// A sealed run whose ids 901, 902 and 903 of every thousand are dead letters.
struct Scene {
    // Dropped in this order: services before servers, servers before their directory.
    work: Process,
    _sink: Process,
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
        let scene = Self { work, _sink: sink, up, host };
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
        self.host.call(&[&["replay", RUN, "--dead", "--json"], words].concat()).expect(0).json()
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
    let replayed = scene.replay(&["--error", "rejected"]);
    assert_eq!(
        (&replayed["pass"], &replayed["ids"], &replayed["batches"]),
        (&2.into(), &3.into(), &3.into())
    );
    scene.wait_pass(2, IDS - 9);
    assert_eq!((scene.view(), scene.dead()), ((IDS - 6, IDS - 6), 6.into()));
    scene.assert_clean();

    assert_eq!(scene.replay(&[])["ids"], 6);
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
    assert_eq!(scene.replay(&["--batch", "9"])["ids"], 3);
    scene.wait_pass(2, IDS - 9);
    assert_eq!((scene.view(), scene.dead()), ((IDS - 9, IDS - 9), 9.into()));
    scene.assert_clean();
}

#[test]
fn the_same_replay_twice_is_one_pass_and_another_waits() {
    let mut scene = Scene::new();
    scene.work.signal("TERM");
    scene.work.wait(SOON);
    let first = scene.replay(&[]);
    assert_eq!(scene.replay(&[]), first);
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
    scene.replay(&[]);
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
