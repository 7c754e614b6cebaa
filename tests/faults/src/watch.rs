//! What `status` says while the soak goes on: of each open run, every ten seconds, as a person and as a program would read it.
//! In the end nothing of it may have been false.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::tests::ask_clickhouse;
use serde_json::{Value, json};

use crate::checker::Submitted;
use crate::scene::Scene;

/// Between two looks at all open runs.
const EVERY: Duration = Duration::from_secs(10);
/// A sealed run is looked at so often before it is left alone.
const SEALED_LOOKS: usize = 3;
/// What a fault leaves behind may be said for so long after it: two redeliveries.
const LINGERS_MS: u64 = 240_000;
/// Words that nothing in a soak makes true: no row, id or view is removed, no id fails, and all processes are of one build.
const NEVER: [&str; 9] = [
    "the seal counted",
    "have no row",
    "`forget` has begun",
    "readers do NOT see",
    "\nviews ",
    "\nwaiting ",
    "\nbuilds ",
    "most of its ids fail",
    "fail far more often",
];

/// What the soak does that `status` may rightly speak of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Merges are stopped.
    Merges,
    /// The service that ids need is away.
    Service,
}

/// A cause, from when to when, in milliseconds since 1970.
pub type Caused = (Cause, u64, u64);

/// One run at one moment.
#[derive(Debug, Clone)]
struct Look {
    at_ms: u64,
    ended_ms: u64,
    run: String,
    /// What `status` said, which was asked first.
    told: String,
    /// What `status --json` said; `None` where it could not, as with a server away.
    status: Option<Value>,
    /// Raw duplicates in the table right after.
    raw: Option<u64>,
}

/// Asks what a person at this machine would.
#[derive(Debug, Clone)]
struct Asker {
    program: PathBuf,
    directory: PathBuf,
    env: Vec<(String, String)>,
    clickhouse: String,
}

/// Looks while the soak goes on.
pub struct Watch {
    asker: Asker,
    runs: Arc<Mutex<Vec<String>>>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Look>>,
    log: PathBuf,
}

impl Watch {
    /// Begins, with a log in this file. The servers are asked themselves, whatever proxies the services have before them.
    pub fn begin(scene: &Scene, log: &Path) -> Self {
        let mut env = scene.host.env.clone();
        env.push(("NATS_URL".to_owned(), scene.nats.clone()));
        env.push(("CLICKHOUSE_URL".to_owned(), scene.clickhouse.clone()));
        let asker = Asker {
            program: std::env::current_exe().expect("this binary's path"),
            directory: scene.host.path().to_owned(),
            env,
            clickhouse: scene.clickhouse.clone(),
        };
        let (runs, over) = (Arc::<Mutex<Vec<String>>>::default(), Arc::new(AtomicBool::new(false)));
        let (asks, follows, stops) = (asker.clone(), runs.clone(), over.clone());
        let mut file = File::create(log).expect("the log of what `status` said");
        let thread = std::thread::spawn(move || {
            let (mut looks, mut sealed) = (Vec::new(), std::collections::HashMap::<String, usize>::new());
            while !stops.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let runs = follows.lock().unwrap_or_else(PoisonError::into_inner).clone();
                for run in runs {
                    let often = sealed.entry(run.clone()).or_default();
                    if *often == SEALED_LOOKS {
                        continue;
                    }
                    let look = asks.look(&run);
                    *often += usize::from(look.is_sealed());
                    writeln!(file, "{}", look.json()).expect("a line of the log");
                    looks.push(look);
                }
                while begun.elapsed() < EVERY && !stops.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            looks
        });
        Self { asker, runs, over, thread, log: log.to_owned() }
    }

    /// These runs were submitted by now.
    pub fn follow(&self, submitted: &[Submitted]) {
        let names = submitted.iter().map(|submitted| submitted.run.clone()).collect();
        *self.runs.lock().unwrap_or_else(PoisonError::into_inner) = names;
    }

    /// Ends, looks at each run once more, and says how often that was, and what was false.
    pub fn end(self, submitted: &[Submitted], caused: &[Caused]) -> (String, Vec<String>) {
        self.over.store(true, Ordering::Relaxed);
        let mut looks = self.thread.join().expect("the looks");
        let last: Vec<Look> = submitted.iter().map(|submitted| self.asker.look(&submitted.run)).collect();
        let mut file = File::options().append(true).open(&self.log).expect("the log");
        for look in &last {
            writeln!(file, "{}", look.json()).expect("a line of the log");
        }
        looks.extend(last);
        let answered = looks.iter().filter(|look| look.status.is_some()).count();
        let said = format!(
            "`status` was asked {} times, {answered} of them with an answer: {}",
            looks.len(),
            self.log.display()
        );
        let untrue = submitted.iter().flat_map(|submitted| untrue(&looks, submitted, caused)).collect();
        (said, untrue)
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Asker {
    fn look(&self, run: &str) -> Look {
        let at_ms = now_ms();
        let told = self.call(&["status", run]);
        let status = serde_json::from_str(&self.call(&["status", run, "--json"])).ok();
        let raw = "SELECT count() - uniqExact(pass, id) FROM millstream.trial_rows WHERE run = ";
        let raw = ask_clickhouse(&self.clickhouse, &format!("{raw}'{run}'")).ok();
        let raw = raw.and_then(|count| count.trim().parse().ok());
        Look { at_ms, ended_ms: now_ms(), run: run.to_owned(), told, status, raw }
    }

    /// What a command printed; nothing where it failed.
    fn call(&self, words: &[&str]) -> String {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&self.program).args(words).current_dir(&self.directory);
        let output = command.envs(self.env.iter().cloned()).stdin(Stdio::null()).output();
        let output = output.expect("the binary starts");
        if output.status.success() {
            String::from_utf8_lossy(&output.stdout).into_owned()
        } else {
            String::new()
        }
    }
}

impl Look {
    fn json(&self) -> Value {
        json!({
            "at_ms": self.at_ms, "ended_ms": self.ended_ms, "run": self.run, "raw_doubled": self.raw,
            "status": self.status, "told": self.told,
        })
    }

    fn is_sealed(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status["state"] == "sealed")
    }

    /// Whether this cause was there when it was asked, or not long ago.
    fn has(&self, cause: Cause, caused: &[Caused]) -> bool {
        let met = |(of, from, to): &&Caused| {
            *of == cause && *from <= self.ended_ms && self.at_ms <= to.saturating_add(LINGERS_MS)
        };
        caused.iter().any(|caused| met(&caused))
    }

    /// State and ids done, as told in words.
    fn words(&self) -> Option<(String, u64)> {
        let line = |head: &str| self.told.lines().find_map(|line| line.strip_prefix(head)).map(str::trim);
        let state = line("state ")?.split([' ', ',']).next()?.to_owned();
        let done = line("ids ")?.split(' ').next()?.replace(',', "").parse().ok()?;
        Some((state, done))
    }
}

/// What was said of a run that cannot have been so.
fn untrue(looks: &[Look], Submitted { run, last }: &Submitted, caused: &[Caused]) -> Vec<String> {
    let (mut found, mut before) = (Vec::new(), Before::default());
    for look in looks.iter().filter(|look| look.run == *run) {
        let mut say = |what: String| found.push(format!("run {run} at {}: {what}", look.at_ms));
        if let Some((state, done)) = look.words() {
            before.follow(&state, done, &mut say);
        }
        NEVER
            .iter()
            .filter(|words| look.told.contains(**words))
            .for_each(|words| say(format!("it says `{words}`")));
        if let Some(status) = &look.status {
            before.follow(status["state"].as_str().unwrap_or_default(), number(&status["done"]), &mut say);
            single(look, status, *last, caused, &mut say);
            let doubled = ["second time", "raw duplicates"]
                .iter()
                .any(|words| status["stuck"].to_string().contains(words));
            if doubled && look.raw == Some(0) && before.raw == Some(0) {
                say("it speaks of raw duplicates, and there are none".to_owned());
            }
        }
        before.raw = look.raw;
    }
    if !looks.iter().rfind(|look| look.run == *run).is_some_and(Look::is_sealed) {
        found.push(format!("run {run}: in the end it is not said to be sealed"));
    }
    found
}

/// What one answer says that cannot be so, whatever was said before.
fn single(look: &Look, status: &Value, last: u64, caused: &[Caused], say: &mut impl FnMut(String)) {
    let (done, ids) = (number(&status["done"]), number(&status["ids"]));
    if ids != last || done > ids {
        say(format!("{done} of {ids} ids are stored, and {last} were submitted"));
    }
    for never in ["dead", "missing"] {
        if number(&status[never]) > 0 {
            say(format!("{never}: {}", status[never]));
        }
    }
    for never in ["base_gone", "rows_sealed", "dead_sealed", "paused_for", "summary_fault", "readers"] {
        if !status[never].is_null() {
            say(format!("{never}: {}", status[never]));
        }
    }
    if look.is_sealed() {
        let at = number(&status["sealed_at_ms"]);
        if done != last || status["readers_see"] != true || at > look.ended_ms {
            say(format!(
                "it is sealed with {done} rows at {at}, and readers see it: {}",
                status["readers_see"]
            ));
        }
    }
    if status["stuck"].as_array().is_some_and(|stuck| !stuck.is_empty()) && !look.has(Cause::Merges, caused) {
        say(format!("it is stuck, and nothing holds it up: {}", status["stuck"]));
    }
    let bottleneck = status["verdict"]["bottleneck"].as_str().unwrap_or_default();
    let is_asking = number(&status["asking"]) > 0 || bottleneck == "retry";
    if is_asking && !look.has(Cause::Service, caused) {
        say(format!("ids ask for another attempt, and the service is there: {}", status["asking"]));
    }
    if ["missing", "rate"].contains(&bottleneck) || bottleneck == "input" && status["state"] != "publishing" {
        say(format!("the verdict is {}", status["verdict"]));
    }
}

/// What was said last.
#[derive(Debug, Default)]
struct Before {
    state: usize,
    done: u64,
    raw: Option<u64>,
}

impl Before {
    /// Neither states nor progress go back, but for rows that two sinks stored and ClickHouse has merged since.
    fn follow(&mut self, state: &str, done: u64, say: &mut impl FnMut(String)) {
        const STATES: [&str; 3] = ["publishing", "running", "sealed"];
        let Some(now) = STATES.iter().position(|known| *known == state) else {
            return say(format!("its state is `{state}`"));
        };
        if now < self.state {
            say(format!("it was {} and is {state}", STATES[self.state]));
        }
        if done + self.raw.unwrap_or(0) < self.done {
            say(format!("{} ids were stored and {done} are", self.done));
        }
        (self.state, self.done) = (now, done);
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(at_ms: u64, state: &str, done: u64, more: &Value) -> Look {
        let mut status =
            json!({ "state": state, "done": done, "ids": 1000, "stuck": [], "readers_see": true });
        for (key, value) in more.as_object().expect("an object") {
            status[key] = value.clone();
        }
        let told = format!(
            "run       a (pass 1), 1..=1000\nstate     {state}, proven\nids       {done} of 1,000 stored"
        );
        Look { at_ms, ended_ms: at_ms + 1, run: "a".into(), told, status: Some(status), raw: Some(0) }
    }

    fn found(looks: &[Look], caused: &[Caused]) -> Vec<String> {
        untrue(looks, &Submitted { run: "a".into(), last: 1000 }, caused)
    }

    #[test]
    fn what_is_true_is_not_held_against_status() {
        let stuck = json!({ "stuck": ["10 rows are stored a second time still"], "asking": 5 });
        let mut doubled = look(20_000, "running", 700, &stuck);
        doubled.raw = Some(10);
        let nothing = json!({});
        let away = Look { status: None, told: String::new(), ..look(15_000, "", 0, &nothing) };
        let looks = [
            look(0, "publishing", 0, &nothing),
            look(10_000, "running", 500, &nothing),
            away,
            doubled,
            look(22_000, "running", 690, &nothing),
            look(30_000, "sealed", 1000, &json!({ "sealed_at_ms": 29_000 })),
        ];
        let caused = [(Cause::Merges, 12_000, 19_000), (Cause::Service, 19_000, 21_000)];
        assert_eq!(found(&looks, &caused), Vec::<String>::new());
        assert_eq!(found(&looks, &[]).len(), 2, "stuck and asking for no cause");
    }

    #[test]
    fn what_cannot_be_so_is_found() {
        let sealed = || look(30_000, "sealed", 1000, &json!({ "sealed_at_ms": 29_000 }));
        let stuck = json!({ "stuck": ["10 rows are stored a second time still"] });
        let told = Look { told: "changed   900 rows are stored, the seal counted 1,000".into(), ..sealed() };
        let merges = [(Cause::Merges, 0, 5)];
        for (looks, part) in [
            (
                vec![look(0, "running", 500, &json!({})), look(1, "running", 499, &json!({})), sealed()],
                "500 ids were stored",
            ),
            (
                vec![sealed(), look(40_000, "running", 1000, &json!({})), sealed()],
                "it was sealed and is running",
            ),
            (vec![look(0, "running", 1001, &json!({})), sealed()], "1001 of 1000 ids"),
            (vec![look(0, "running", 5, &json!({ "missing": 7 })), sealed()], "missing: 7"),
            (vec![look(0, "running", 5, &json!({ "dead": 1 })), sealed()], "dead: 1"),
            (vec![look(0, "running", 5, &stuck), sealed()], "there are none"),
            (
                vec![look(0, "running", 5, &json!({ "verdict": { "bottleneck": "rate" } })), sealed()],
                "the verdict is",
            ),
            (vec![look(0, "sealed", 1000, &json!({ "sealed_at_ms": 9_000 })), sealed()], "it is sealed with"),
            (vec![look(0, "running", 5, &json!({ "state": "lost" })), sealed()], "its state is `lost`"),
            (vec![told, sealed()], "the seal counted"),
            (vec![look(0, "running", 5, &json!({}))], "not said to be sealed"),
        ] {
            let raw_known = Look { raw: Some(0), ..look(0, "publishing", 0, &json!({})) };
            let looks = [vec![raw_known], looks].concat();
            let found = found(&looks, &merges);
            assert!(found.iter().any(|fault| fault.contains(part)), "`{part}` is not in {found:?}");
        }
    }
}
