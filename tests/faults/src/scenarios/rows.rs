//! Rows 42 to 45, which `reliability.md` does not have: rows as columns by name, from builds that are at fault, that differ,
//! or whose values a column does not have, and views that they feed.

use millstream::envelope::{RowBatch, Rows, decode_rows, encode_rows};
use millstream::schema::{OWN_COLUMNS, Schema};
use millstream::{frame, native};
use tests::Launch;
use tests::variants::VARIABLE;

use crate::Plan;
use crate::scenarios::streams::{nats, purge, put, stored};
use crate::scene::{PATIENCE, Report, Scene, Setup, usual};

const IDS: u64 = 10_000;
const BATCH: u32 = 500;

/// Where a block ends too early.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Within a frame.
    InFrame,
    /// Behind a frame, and the message tells the size of the whole.
    BehindFrame,
    /// Behind a frame, and the message tells the size of what is there.
    Told,
}

/// Blocks that end early lie where workers would put rows. What is seen to be none is quarantined and computed again; what only
/// ClickHouse can see is refused, and computed again once an operator says so.
pub fn blocks_cut(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup::new("blocks-cut"));
    scene.publish("a", IDS, BATCH);
    put_cut(&mut scene, "a", 3, Cut::InFrame);
    put_cut(&mut scene, "a", 7, Cut::BehindFrame);
    scene.start(&["work-1", "work-2", "sink-1"]);
    for batch in [3, 7] {
        wait_said(&mut scene, "sink-1", &subject("a", batch), "is quarantined");
    }
    scene.fault("both are quarantined");
    scene.wait_status("a", "the seal", |status| status["state"] == "sealed");
    // Before its run is published, or a worker would be faster; and in one INSERT with all others.
    scene.dismiss("sink");
    put_cut(&mut scene, "b", 15, Cut::Told);
    scene.publish("b", IDS, BATCH);
    wait_computed(&mut scene, "b");
    scene.start(&["sink-2"]);
    wait_said(&mut scene, "sink-2", &subject("b", 15), "ClickHouse refuses this batch's rows");
    scene.wait_rows("b", IDS - u64::from(BATCH));
    scene.must_go_on("b");
    scene.fault("it is refused by ClickHouse, and all others are stored");
    let repaired = scene.host.call(&["verify", "b", "--repair", "--recompute"]);
    scene.note(repaired.stdout + &repaired.stderr);
    scene.finish()
}

fn put_cut(scene: &mut Scene, run: &str, batch: u32, cut: Cut) {
    put(&mut nats(scene), &subject(run, batch), &block_cut(run, batch, cut));
    scene.fault(format!("batch {batch} of run `{run}` has a block that ends early: {cut:?}"));
}

fn subject(run: &str, batch: u32) -> String {
    format!("trial.rows.{run}.1.{batch}")
}

/// Waits until every batch of a run has its rows in the stream.
fn wait_computed(scene: &mut Scene, run: &str) {
    scene.wait_status(run, "all batches computed", |status| {
        status["in_flight"] == 0 && status["pending"] == 0
    });
}

/// Waits until a sink has said this of a message.
fn wait_said(scene: &mut Scene, sink: &str, subject: &str, said: &str) {
    scene.wait(&format!("`{said}` of {subject}"), PATIENCE, |scene| {
        let log = scene.host.log(sink);
        // By words: `trial.rows.a.1.3` is no part of `trial.rows.a.1.30`.
        let names = |line: &str| line.split([' ', '"', '=', '`']).any(|word| word == subject);
        match log.lines().any(|line| line.contains(said) && names(line)) {
            true => Ok(()),
            false => Err(log.lines().last().unwrap_or_default().to_owned()),
        }
    });
}

/// A message of a whole batch whose block has its first columns and no others.
fn block_cut(run: &str, batch: u32, cut: Cut) -> Vec<u8> {
    let count = BATCH as usize;
    let mut raw = Vec::new();
    native::begin_block(&mut raw, OWN_COLUMNS.len() + 1, count);
    native::repeated_text(&mut raw, "run", run, count);
    native::repeated(&mut raw, "pass", "UInt32", &1u32.to_le_bytes(), count);
    let (head, tail) = raw.split_at(raw.len() / 2);
    let mut rows = Vec::new();
    frame::compress(head, &mut rows);
    if let Cut::InFrame = cut {
        let mut second = Vec::new();
        frame::compress(tail, &mut second);
        rows.extend_from_slice(&second[..second.len() / 2]);
    }
    let raw_bytes = match cut {
        Cut::Told => head.len(),
        Cut::InFrame | Cut::BehindFrame => raw.len(),
    } as u64;
    let schema = Schema::parse(&[("squared", "UInt64")]).expect("sound");
    encode_rows(&RowBatch {
        run,
        pass: 1,
        batch,
        batch_ids: BATCH,
        from: 0,
        ids: BATCH,
        first: "",
        last: "",
        dead: 0,
        raw_bytes,
        schema: schema.fingerprint(),
        columns: &schema.to_text(),
        build: "0+faulty",
        rows: &rows,
    })
}

/// Values of column `squared` that a block says it has and does not have.
const SHORT: usize = 10;

/// A worker's block has fewer values of the pipeline's column than it says, and others follow in the same INSERT: ClickHouse
/// refuses it, the others land, and it is computed again once an operator says so.
pub fn block_too_short(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup::new("block-too-short"));
    shorten(&mut scene, |squared, build| [squared, build].concat());
    scene.start(&["sink-1"]);
    wait_said(&mut scene, "sink-1", &subject("a", 7), "ClickHouse refuses this batch's rows");
    scene.wait_rows("a", IDS - u64::from(BATCH));
    scene.must_go_on("a");
    scene.fault("it is refused by ClickHouse, and all others are stored");
    scene.host.call(&["verify", "a", "--repair", "--recompute"]);
    scene.finish()
}

/// The same of a build that has the pipeline's column behind all others: ClickHouse takes the first bytes of the next batch's
/// block for the missing values. No count and no digest of ids shows it: the proof of values does.
pub fn block_that_borrows(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup::new("block-that-borrows"));
    shorten(&mut scene, |squared, build| [build, squared].concat());
    scene.start(&["sink-1"]);
    scene.wait_log("sink-1", "repaired what was not complete");
    scene.fault("its batch was found not to hold what was computed, and computed again");
    scene.finish()
}

/// Has run `a` computed, and takes values of `squared` out of the block of batch 7. `order` puts the last two columns, that one
/// and `build`, behind the others.
fn shorten(scene: &mut Scene, order: impl Fn(&[u8], &[u8]) -> Vec<u8>) {
    scene.publish("a", IDS, BATCH);
    scene.start(&["work-1", "work-2"]);
    wait_computed(scene, "a");
    let (mut streams, subject) = (nats(scene), subject("a", 7));
    let message = stored(&mut streams, "trial_rows", &subject);
    let Ok(Rows::Batch(batch)) = decode_rows(&message) else { panic!("no rows under {subject}") };
    let (mut raw, mut rows, mut rest) = (Vec::new(), Vec::new(), batch.rows);
    while let Ok(Some(length)) = frame::frame_len(rest) {
        frame::decompress(&rest[..length], &mut raw).expect("a sound frame");
        rest = &rest[length..];
    }
    let (count, mut build, mut squared) = (BATCH as usize, Vec::new(), Vec::new());
    native::repeated_text(&mut build, "build", batch.build, count);
    native::begin_column(&mut squared, "squared", "UInt64");
    let head = raw.strip_suffix(&build[..]).expect("a block whose last column is `build`");
    let (head, values) = head.split_at(head.len() - count * size_of::<u64>());
    let head = head.strip_suffix(&squared[..]).expect("`squared` before it");
    squared.extend_from_slice(&values[..(count - SHORT) * size_of::<u64>()]);
    let raw = [head, &order(&squared, &build)].concat();
    frame::compress(&raw, &mut rows);
    let short = encode_rows(&RowBatch { raw_bytes: raw.len() as u64, rows: &rows, ..batch });
    purge(&mut streams, "trial_rows", &subject);
    put(&mut streams, &subject, &short);
    scene.fault(format!("batch 7 lacks {SHORT} values of `squared`"));
}

/// An old build, one that has its columns in another order, and one with a column more, which is added meanwhile: workers and
/// sinks of all of them draw from the same streams, and are killed.
pub fn builds_side_by_side(plan: Plan) -> Report {
    const MANY: u64 = 100_000;
    let setup = Setup { build: Some("lohi"), ..Setup::new("builds-side-by-side") };
    let mut scene = Scene::new(plan, &setup);
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    for (name, build) in [("work-old", "lohi"), ("sink-old", "lohi"), ("work-turned", "hilo")] {
        scene.serve(name, of(build, name));
    }
    scene.wait_up();
    scene.publish("a", MANY, BATCH);
    scene.wait_landed();
    let more =
        Launch { env: vec![(VARIABLE.into(), "extra".into())], ..Launch::from(&["setup", "--yes"][..]) };
    scene.host.call_as(&more).expect(0);
    scene.note("column `extra` is added");
    for (name, build) in [("work-new", "extra"), ("sink-new", "extra"), ("sink-turned", "hilo")] {
        scene.serve(name, of(build, name));
    }
    scene.wait_up();
    let mut names = ["work-old", "sink-new", "work-new", "sink-old", "work-turned", "sink-turned"];
    for round in 0..2 {
        for name in names {
            scene.kill(name);
            scene.pass_between(500, 1500);
        }
        if round == 0 {
            scene.must_go_on("a");
        }
        names.reverse();
    }
    scene.must_go_on("a");
    scene.wait_sealed();
    let by_build = scene.checker.ask(
        "SELECT splitByChar('+', build)[1] AS version, count(), min(extra), max(extra) FROM millstream.variant_rows FINAL \
         WHERE run = 'a' GROUP BY version ORDER BY version",
    );
    let lines: Vec<Vec<&str>> = by_build.lines().map(|line| line.split('\t').collect()).collect();
    let of_extra: Vec<(&str, &str, &str)> = lines.iter().map(|line| (line[0], line[2], line[3])).collect();
    assert_eq!(of_extra, [("1", "0", "0"), ("2", "0", "0"), ("3", "7", "7")], "{by_build}");
    scene.note(format!("rows by build: {by_build}"));
    scene.finish()
}

/// The launch of a service of one build.
fn of(build: &str, name: &str) -> Launch {
    Launch { env: vec![(VARIABLE.into(), build.into())], ..usual(name) }
}

/// A view of the operator's throws for some rows: ours are all there, and each batch that the view lacks is named, also where
/// the sink was killed before it could say how its INSERT ended.
pub fn view_throws(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup::new("view-throws"));
    scene.host.call(&["setup"]).expect(0);
    scene.checker.ask("CREATE TABLE millstream.picky (id UInt64, x UInt8) ENGINE = MergeTree ORDER BY id");
    scene.checker.ask(
        "CREATE MATERIALIZED VIEW millstream.to_picky TO millstream.picky AS \
         SELECT id, throwIf(id % 5000 = 7) AS x FROM millstream.trial_rows",
    );
    scene.publish("a", 40_000, BATCH);
    scene.trap("sink-1", "sink-in-insert=kill@3");
    scene.start(&["work-1"]);
    scene.wait_sprung("sink-1", "sink-in-insert");
    scene.trap("sink-2", "sink-after-insert=kill@2");
    scene.wait_sprung("sink-2", "sink-after-insert");
    scene.start(&["sink-3"]);
    scene.must_go_on("a");
    let recovered = scene.wait_sealed();
    let lacking = "SELECT DISTINCT batch FROM millstream.trial_rows WHERE run = 'a' AND id NOT IN \
                   (SELECT id FROM millstream.picky)";
    let unnamed = format!(
        "SELECT count() FROM ({lacking}) WHERE batch NOT IN (SELECT arrayJoin(batches) FROM millstream.trial_view_faults)"
    );
    let lacking = scene.checker.number(&format!("SELECT count() FROM ({lacking})"));
    assert!(lacking > 0, "the view has all rows");
    // What a killed sink had is delivered again after two minutes, and named then.
    scene.wait("the name of every batch that the view lacks", PATIENCE, |scene| {
        match scene.checker.number(&unnamed) {
            0 => Ok(()),
            unnamed => Err(format!("{unnamed} of {lacking} are not named")),
        }
    });
    let named = scene.checker.ask(
        "SELECT view, uniqExactArray(batches) FROM millstream.trial_view_faults WHERE run = 'a' GROUP BY view",
    );
    assert!(named.contains("to_picky"), "the view is not named: {named}");
    let status = scene.host.call(&["status", "a"]).expect(0);
    assert!(status.stdout.contains("to_picky"), "{}", status.stdout);
    scene.fault(format!("{lacking} batches are not in the view, and all are named: {}", named.trim()));
    Report { recovered, ..scene.finish() }
}

/// Of ten ids, one has a number and one a name that its column does not have: exactly those are dead letters.
pub fn values_without_column(plan: Plan) -> Report {
    let setup = Setup { build: Some("kinds"), micros: 500, ..Setup::new("values-without-column") };
    let mut scene = Scene::new(plan, &setup);
    scene.publish("a", IDS, 200);
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_rows("a", 1_000);
    scene.kill_all("work");
    scene.wait_rows("a", 3_000);
    scene.kill_one_of("work");
    scene.must_go_on("a");
    scene.wait_sealed();
    for (rest, column, value) in [(7, "`kind`", "9"), (8, "`name`", "middle")] {
        let told = scene.checker.number(&format!(
            "SELECT count() FROM millstream.variant_dead WHERE run = 'a' AND id % 10 = {rest} \
             AND position(error, '{column}') > 0 AND position(error, '{value}') > 0"
        ));
        assert_eq!(told, IDS / 10, "dead letters of {column} that name it and {value}");
        scene.note(format!("{told} dead letters name {column} and {value}"));
    }
    scene.finish()
}
