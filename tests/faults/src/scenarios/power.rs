//! Rows 28 to 30: what disks do to servers. Power is lost, and a bit at rest is not what it was.
//!
//! Power loss is an ext4 of our own on a loop device, which is told to shut down at once without writing anything more
//! (`FS_IOC_SHUTDOWN` without a flush of its log, which is how xfstests cuts the power): what was not synced is gone when
//! it is mounted again. Each run shows that with a file of its own, and control runs without fsync must lose something.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::{SOON, Up, signal, wait_until};

use crate::Plan;
use crate::cluster::NatsServer;
use crate::netns::{install, run};
use crate::old_clickhouse::free_port;
use crate::scene::{Report, Scene, Setup, host};

const VOLUME_MB: u32 = 1024;
/// Streams that have room on it, and so has the bucket beside them.
const SMALL_STREAMS: &str =
    "sink.group_age = '200ms'\nstreams.ids_bytes = \"256MiB\"\nstreams.rows_bytes = \"256MiB\"\n";
/// More than a block, and less than anybody would write by themselves.
const CANARY: [u8; 8192] = [b'c'; 8192];
/// How long a run may take to heal unattended before a person looks: whatever a sink held has come back by then.
const UNATTENDED: Duration = Duration::from_secs(180);

/// A file system that can lose its power; gone when dropped.
struct Volume {
    path: PathBuf,
    dir: TempDir,
    losses: AtomicU32,
}

impl Volume {
    fn mount() -> Self {
        install(&[("xfs_io", "xfsprogs"), ("mkfs.ext4", "e2fsprogs")]);
        let dir = tempfile::Builder::new().prefix("millstream-volume-").tempdir().expect("a directory");
        let volume = Self { path: dir.path().join("mounted"), dir, losses: AtomicU32::new(0) };
        fs::create_dir(&volume.path).expect("a mount point");
        let image = File::create(volume.image()).expect("an image");
        image.set_len(u64::from(VOLUME_MB) << 20).expect("a sparse file");
        run("mkfs.ext4", &["-q", &volume.image().to_string_lossy()]);
        volume.attach();
        volume
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn attach(&self) {
        run("mount", &["-o", "loop", &self.image().to_string_lossy(), &self.path.to_string_lossy()]);
    }

    /// Writes everything down.
    fn sync(&self) {
        run("sync", &["-f", &self.path.to_string_lossy()]);
    }

    /// What nobody synced is lost, and the volume is there again. No process has a file open there any more.
    ///
    /// `last_breath` kills who writes there: at the very moment, so that nobody notices before everybody is gone.
    fn lose_power(&self, last_breath: impl FnOnce()) {
        // A name of its own each time: ext4 writes a file down at once that replaces another.
        let time = self.losses.fetch_add(1, Ordering::Relaxed);
        let canary = self.path.join(format!("canary-{time}"));
        fs::write(&canary, CANARY).expect("a file is written");
        last_breath();
        let path = self.path.to_string_lossy();
        run("xfs_io", &["-x", "-c", "shutdown", &path]);
        wait_until("an unmounted volume", SOON, || {
            let unmounted = Command::new("umount").arg(&self.path).output().expect("`umount` runs");
            let said = String::from_utf8_lossy(&unmounted.stderr).into_owned();
            if unmounted.status.success() { Ok(()) } else { Err(said) }
        });
        self.attach();
        let found = fs::read(canary).unwrap_or_default();
        assert!(found != CANARY, "a file that nobody synced is there: this was no loss of power");
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Lazily: what still holds a file there ends with its process, and the loop device with the mount.
        let unmounted = Command::new("umount").arg("-l").arg(&self.path).status();
        debug_assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// A nats-server on a volume; ClickHouse is the local stack's.
struct NatsOnVolume {
    // Services before the server, the server before its volume.
    scene: Scene,
    server: NatsServer,
    volume: Volume,
}

impl NatsOnVolume {
    fn new(plan: Plan, name: &'static str, sync_interval: &str) -> Self {
        let volume = Volume::mount();
        let mut scene = Scene::new(plan, &Setup { config: SMALL_STREAMS, ..Setup::new(name) });
        let log = scene.host.path().join("nats-on-volume.log");
        let store = volume.path.join("store");
        let server = NatsServer::alone(&store, &log, (free_port(), free_port()), sync_interval);
        for (variable, url) in [("NATS_URL", server.url()), ("CLICKHOUSE_URL", scene.clickhouse.clone())] {
            scene.host.env.push((variable.to_owned(), url));
        }
        Self { scene, server, volume }
    }

    /// Messages in the two streams, before and after.
    fn lose_power(&mut self) -> [[u64; 2]; 2] {
        let streams = ["trial_ids", "trial_rows"];
        let before = streams.map(|stream| self.server.messages(stream));
        self.volume.lose_power(|| self.server.kill());
        self.server.start(None);
        self.server.wait_ready();
        let after = streams.map(|stream| self.server.messages(stream));
        self.scene.fault(format!(
            "power lost: ids {} → {}, rows {} → {} messages; a file that was not synced is gone",
            before[0], after[0], before[1], after[1]
        ));
        [before, after]
    }
}

/// Row 28: three times, under publish, results and acks.
pub fn nats_loses_power(plan: Plan) -> Report {
    const TIMES: u64 = 3;
    let mut scene = NatsOnVolume::new(plan, "nats-power", "always");
    scene.scene.publish("a", 100_000, 500);
    scene.scene.submit("b", 60_000, 20);
    scene.scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    for time in 1..=TIMES {
        scene.scene.wait_rows("a", time * 10_000);
        scene.lose_power();
    }
    scene.scene.must_go_on("a");
    scene.scene.finish_well()
}

/// Row 28, the control: a server that syncs every two minutes has acked what it then loses.
pub fn nats_loses_power_unsynced(plan: Plan) -> Report {
    const BATCHES: u64 = 40;
    let mut scene = NatsOnVolume::new(plan, "nats-power-control", "2m");
    scene.scene.publish("a", 100_000, 500);
    scene.volume.sync();
    // Without a sink, results are where a worker's PubAck says they are and nowhere else.
    scene.scene.start(&["work-1", "work-2"]);
    let server = &scene.server;
    scene.scene.wait("results in the stream", SOON, |_| match server.messages("trial_rows") {
        rows if rows >= BATCHES => Ok(()),
        rows => Err(format!("{rows}")),
    });
    let [before, after] = scene.lose_power();
    assert!(after[1] < before[1], "nothing was lost without fsync: this method proves nothing");
    scene.scene.start(&["sink-1", "sink-2"]);
    repaired(&mut scene.scene, UNATTENDED)
}

/// ClickHouse's data on a volume; NATS is the local stack's, too.
struct ClickHouseOnVolume {
    scene: Scene,
    up: Up,
    volume: Volume,
}

impl ClickHouseOnVolume {
    fn new(plan: Plan, name: &'static str) -> Self {
        let usual = Setup::new(name);
        let (volume, host) = (Volume::mount(), host(name, usual.micros, usual.config, usual.ballast));
        let data = host.path().join(".millstream");
        fs::create_dir_all(&data).expect("a data directory");
        let on_volume = volume.path.join("clickhouse");
        fs::create_dir(&on_volume).expect("a directory");
        symlink(&on_volume, data.join("clickhouse")).expect("a link");
        let up = host.up();
        let (nats, clickhouse) = (up.nats.clone(), up.clickhouse.clone());
        Self { scene: Scene::on_servers(plan, name, host, &nats, &clickhouse), up, volume }
    }

    /// Rows in the table before and after.
    fn lose_power(&mut self) -> [u64; 2] {
        let before = self.scene.checker.rows("a");
        // The stack would start the server again before its volume is back.
        self.up.process.signal("STOP");
        self.volume.lose_power(|| {
            for pid in self.up.pids("__local-engine") {
                signal(pid, "KILL");
                wait_until("the end of ClickHouse", SOON, || match self.up.pids("__local-engine")[..] {
                    [] => Ok(()),
                    ref pids => Err(format!("{pids:?}")),
                });
            }
        });
        self.up.process.signal("CONT");
        let after = self.scene.checker.rows("a");
        self.scene.fault(format!(
            "power lost: {before} rows seen before, {after} after; a file that was not synced is gone"
        ));
        [before, after]
    }
}

/// Row 29: three times, with rows that were asked for and acked.
pub fn clickhouse_loses_power(plan: Plan) -> Report {
    const TIMES: u64 = 3;
    let mut scene = ClickHouseOnVolume::new(plan, "clickhouse-power");
    scene.scene.publish("a", 100_000, 500);
    scene.scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    for time in 1..=TIMES {
        scene.scene.wait_rows("a", time * 10_000);
        scene.lose_power();
    }
    scene.scene.must_go_on("a");
    scene.scene.finish_well()
}

/// Row 29, the control: without fsync, rows that were asked for and acked are gone.
pub fn clickhouse_loses_power_unsynced(plan: Plan) -> Report {
    const ROWS: u64 = 20_000;
    let mut scene = ClickHouseOnVolume::new(plan, "clickhouse-power-control");
    scene.scene.publish("a", 100_000, 500);
    scene.scene.checker.ask(
        "ALTER TABLE millstream.trial_rows MODIFY SETTING fsync_after_insert = 0, fsync_part_directory = 0, \
         min_rows_to_fsync_after_merge = 0, min_compressed_bytes_to_fsync_after_merge = 0",
    );
    scene.volume.sync();
    scene.scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.scene.wait_rows("a", ROWS);
    let [before, after] = scene.lose_power();
    assert!(after < before, "nothing was lost without fsync: this method proves nothing");
    repaired(&mut scene.scene, UNATTENDED)
}

/// Row 30: in a block of the rows stream, while results wait there for a sink.
pub fn bit_flip_in_rows_stream(plan: Plan) -> Report {
    flipped_in_stream(plan, "flip-rows", "trial_rows")
}

/// Row 30: in a block of the ids stream, while batches wait there for a worker.
pub fn bit_flip_in_ids_stream(plan: Plan) -> Report {
    flipped_in_stream(plan, "flip-ids", "trial_ids")
}

fn flipped_in_stream(plan: Plan, name: &'static str, stream: &str) -> Report {
    const IDS: u64 = 100_000;
    const BATCH: u32 = 500;
    let mut scene = Scene::new(plan, &Setup { micros: 50, ..Setup::new(name) });
    scene.publish("a", IDS, BATCH);
    if stream == "trial_rows" {
        scene.start(&["work-1", "work-2"]);
        scene.wait_status("a", "every batch computed", |status| {
            status["pending"] == 0 && status["in_flight"] == 0
        });
        scene.dismiss("work");
    }
    scene.stop_stack();
    let messages = scene.host.path().join(".millstream/nats/jetstream/$G/streams").join(stream).join("msgs");
    let flipped = flip(&messages, |file| file.extension().is_some_and(|ending| ending == "blk"));
    scene.start_stack();
    scene.fault(flipped);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_rows("a", IDS - u64::from(BATCH));
    rebuild_index(&mut scene, &messages);
    // The batch's ids may be gone with the rest of the block: the same input brings them back.
    let (ids, batch) = (format!("1..={IDS}"), BATCH.to_string());
    let said = scene.host.call(&["produce", "--ids", &ids, "--run", "a", "--batch", &batch, "--json"]);
    scene.note(format!("produce again ends with {}: {}{}", said.code, said.stdout, said.stderr));
    repaired(&mut scene, Duration::ZERO)
}

/// What a person does whose nats-server (2.15.1) has a message that cannot be read: it counts in its subject, cannot be
/// purged nor deleted, and nothing else can be published there (10077), until the stream's index is made anew from its
/// blocks. What follows it in its block is lost then.
fn rebuild_index(scene: &mut Scene, messages: &Path) {
    scene.stop_stack();
    fs::remove_file(messages.join("index.db")).expect("a stream's index");
    scene.start_stack();
    scene.fault("the stream's index.db removed, nats-server started");
}

/// Row 30: in a part of a sealed run.
pub fn bit_flip_in_part(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup { micros: 50, ..Setup::new("flip-part") });
    scene.publish("a", 100_000, 500);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait("the seal", SOON, |scene| match scene.checker.is_sealed("a") {
        true => Ok(()),
        false => Err(scene.host.status("a").to_string()),
    });
    let part =
        "SELECT path FROM system.parts WHERE table = 'trial_rows' AND active ORDER BY rows DESC LIMIT 1";
    let part = PathBuf::from(scene.checker.ask(part).trim());
    scene.stop_stack();
    let flipped = flip(&part, |file| file.extension().is_some_and(|ending| ending == "bin"));
    scene.start_stack();
    scene.fault(flipped);
    let sum = tests::ask_clickhouse(
        &scene.clickhouse,
        "SELECT sum(squared), sum(sipHash64(id)), max(error) FROM millstream.trial_rows",
    );
    let alarm = tests::ask_clickhouse(&scene.clickhouse, "CHECK TABLE millstream.trial_rows");
    scene.note(format!("read: {sum:?}; checked: {alarm:?}"));
    assert!(sum.is_err(), "wrong bytes were read without a word: {sum:?}");
    assert!(alarm.as_ref().map_or(true, |found| found.trim() != "1"), "CHECK TABLE finds nothing: {alarm:?}");
    // What a person does: the part goes, and what was in it is computed again.
    let name = part.file_name().and_then(|name| name.to_str()).expect("a part's name").to_owned();
    scene.checker.ask(&format!("ALTER TABLE millstream.trial_rows DROP PART '{name}'"));
    repaired(&mut scene, Duration::ZERO)
}

/// Flips one bit in the middle of the largest of these files; says which.
fn flip(dir: &Path, is_one: impl Fn(&Path) -> bool) -> String {
    let files = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())).flatten();
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |found| found.len());
    let path = files.map(|entry| entry.path()).filter(|path| is_one(path)).max_by_key(size);
    let path = path.unwrap_or_else(|| panic!("no such file in {}", dir.display()));
    let file = File::options().read(true).write(true).open(&path).expect("a file to be spoilt");
    let (middle, mut byte) = (size(&path) / 2, [0]);
    file.read_exact_at(&mut byte, middle).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], middle).expect("another byte");
    file.sync_all().expect("a byte on disk");
    format!("one bit of byte {middle} of {} flipped", path.file_name().unwrap_or_default().display())
}

/// What a person does when a run has not healed by itself in time: `verify --repair`. The report says so.
fn repaired(scene: &mut Scene, unattended: Duration) -> Report {
    let waited = Instant::now();
    while waited.elapsed() < unattended {
        if scene.checker.is_sealed("a") && scene.look().is_right() {
            scene.note("healed unattended");
            return scene.finish();
        }
        scene.pass(Duration::from_secs(1));
    }
    let lost = scene.look().lost;
    let said = scene.host.call(&["verify", "a", "--repair", "--json"]);
    scene.note(format!("verify --repair ends with {}: {}{}", said.code, said.stdout, said.stderr));
    scene
        .fault(format!("{lost} ids not to be seen after {} s, then `verify --repair`", unattended.as_secs()));
    scene.wait("everything again", SOON * 2, |scene| {
        if scene.look().is_right() { Ok(()) } else { Err(scene.host.status("a").to_string()) }
    });
    scene.finish()
}
