//! The data directory: its layout, who holds it, and what it remembers between two starts.

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::event::{Event, Progress, Server};
use crate::net;

/// How long a short command, or a server that should answer, is waited for.
const WAIT: Duration = Duration::from_secs(30);
/// How long a holder may take from the lock to servers that answer.
const WAIT_START: Duration = Duration::from_secs(240);
/// How long a holder may take to fetch pinned copies.
const WAIT_FETCH: Duration = Duration::from_secs(45 * 60);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// An answer needs the same record this often, unless its holder is seen to live: between taking the lock and writing its
/// record, a new holder shows the record of the one before.
const SURE_AFTER: u32 = 4;
/// Half a second of waiting is not worth a line.
const TELL_AFTER: u32 = 10;
/// The file whose lock is the directory's.
pub(crate) const LOCK: &str = "lock";
/// How often the holder looks whether the directory is still there.
const LOOK_FOR_DIR: Duration = Duration::from_secs(2);
/// A log that is longer than this starts anew, the old one is kept once.
const LONGEST_LOG: u64 = 5 * 1024 * 1024;

/// Who holds, or wants to hold, a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// `run`: holds it alone for a whole run.
    Run,
    /// `up`: holds it for everybody.
    Up,
    /// A short command, such as `sql`.
    Moment,
}

/// The process that holds a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What it is.
    pub owner: Owner,
    /// Its process id.
    pub pid: u32,
}

impl Holder {
    /// Whether there is such a process here. Out of a container's sight there is none.
    fn is_seen(&self) -> bool {
        Path::new("/proc").join(self.pid.to_string()).exists()
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.owner {
            Owner::Run => write!(out, "`run` (pid {})", self.pid),
            Owner::Up => write!(out, "`up` (pid {})", self.pid),
            Owner::Moment => write!(out, "a short command (pid {})", self.pid),
        }
    }
}

/// How far a holder has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Stage {
    Finding,
    Starting,
    Ready,
}

/// What `stack.json` says. Only true while the lock is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub(crate) holder: Holder,
    pub(crate) stage: Stage,
    pub(crate) nats_port: Option<u16>,
    pub(crate) clickhouse_port: Option<u16>,
}

impl Record {
    pub(crate) fn nats_url(&self) -> Option<String> {
        self.nats_port.map(|port| format!("nats://127.0.0.1:{port}"))
    }

    pub(crate) fn clickhouse_url(&self) -> Option<String> {
        self.clickhouse_port.map(|port| format!("http://127.0.0.1:{port}"))
    }
}

/// What a data directory keeps between two starts (`kept.json`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Kept {
    pub(crate) nats_port: u16,
    pub(crate) nats_http_port: u16,
    pub(crate) clickhouse_port: u16,
    /// What wrote ClickHouse's files. The two are not mixed: an older binary might not read what a newer engine wrote.
    pub(crate) clickhouse: Option<Kind>,
}

/// The two things that serve ClickHouse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Server,
    Library,
}

/// An existing data directory, by its absolute path.
#[derive(Debug, Clone)]
pub(crate) struct Dir {
    path: PathBuf,
    /// As the user wrote it, for messages.
    named: PathBuf,
}

impl Dir {
    /// Creates what is missing.
    pub(crate) fn create(named: &Path) -> Result<Dir, Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Data { path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(named).map_err(failed(named))?;
        let path = named.canonicalize().map_err(failed(named))?;
        if path.to_str().is_none_or(|text| text.contains(['\n', '\r'])) {
            return Err(Error::DataPath { path });
        }
        let dir = Dir { path, named: named.to_owned() };
        for sub in [dir.nats(), dir.clickhouse(), dir.logs()] {
            fs::create_dir_all(&sub).map_err(failed(&sub))?;
        }
        Ok(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn named(&self) -> &Path {
        &self.named
    }

    pub(crate) fn nats(&self) -> PathBuf {
        self.path.join("nats")
    }

    pub(crate) fn clickhouse(&self) -> PathBuf {
        self.path.join("clickhouse")
    }

    fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    pub(crate) fn log(&self, server: Server) -> PathBuf {
        self.logs().join(match server {
            Server::Nats => "nats-server.log",
            Server::ClickHouse => "clickhouse.log",
        })
    }

    /// Takes the lock, if it is free.
    pub(crate) fn try_lock(&self) -> Result<Option<Lock>, Error> {
        let path = self.path.join(LOCK);
        let failed = |source| Error::Data { path: path.clone(), source };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock { file, dir: self.clone() })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::Data { path, source }),
        }
    }

    pub(crate) fn record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.path.join("stack.json")).ok()?).ok()
    }

    /// What earlier starts left; a file that cannot be read as such counts as none.
    pub(crate) fn kept(&self) -> Kept {
        let bytes = fs::read(self.path.join("kept.json")).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Writes a file of the data directory whole or not at all, readable by its owner only.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, Error> {
        let path = self.path.join(name);
        let written = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
            file.write_all(bytes)?;
            file.persist(&path)?;
            Ok(())
        };
        written().map_err(|source| Error::Data { path: path.clone(), source })?;
        Ok(path)
    }
}

/// The right to start servers on a data directory. Dropping it gives the directory free.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    dir: Dir,
}

impl Lock {
    pub(crate) fn write_record(&self, record: &Record) -> Result<(), Error> {
        self.dir.write("stack.json", json(record).as_bytes()).map(drop)
    }

    pub(crate) fn write_kept(&self, kept: &Kept) -> Result<(), Error> {
        self.dir.write("kept.json", json(kept).as_bytes()).map(drop)
    }

    /// Resolves with the directory's path when it is no more the one that is locked: it was removed, moved or replaced, and
    /// another process may begin a stack of its own in its place. Cancel safe.
    pub(crate) async fn lost(&self) -> PathBuf {
        let mut looks = tokio::time::interval(LOOK_FOR_DIR);
        loop {
            looks.tick().await;
            if self.is_lost() {
                return self.dir.named.clone();
            }
        }
    }

    fn is_lost(&self) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let locked = self.file.metadata().map(identity);
        match (locked, fs::metadata(self.dir.path.join(LOCK)).map(identity)) {
            (Ok(locked), Ok(there)) => locked != there,
            (Ok(_), Err(error)) => error.kind() == io::ErrorKind::NotFound,
            (Err(_), _) => false,
        }
    }

    /// Removes the record, then gives the directory free.
    pub(crate) fn release(self) -> Result<(), Error> {
        if self.is_lost() {
            // What is there now is another holder's.
            return Ok(());
        }
        let path = self.dir.path.join("stack.json");
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Data { path, source }),
            _ => self.file.unlock().map_err(|source| Error::Data { path: self.dir.path.join(LOCK), source }),
        }
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).expect("plain structs become JSON") + "\n"
}

/// The outcome of asking for a data directory.
#[derive(Debug)]
pub(crate) enum Access {
    Own(Lock),
    Attached(Record),
}

/// What to do about a holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Attach,
    Wait,
    Refuse,
}

fn judge(ours: Owner, theirs: Owner) -> Verdict {
    match (ours, theirs) {
        (_, Owner::Moment) => Verdict::Wait,
        (Owner::Run | Owner::Moment, Owner::Up) | (Owner::Moment, Owner::Run) => Verdict::Attach,
        (Owner::Up, Owner::Up | Owner::Run) | (Owner::Run, Owner::Run) => Verdict::Refuse,
    }
}

fn patience(verdict: Verdict, stage: Stage) -> Duration {
    match (verdict, stage) {
        (_, Stage::Finding) => WAIT_FETCH,
        (Verdict::Attach, Stage::Starting) => WAIT_START,
        _ => WAIT,
    }
}

/// Takes the data directory, or finds the servers of the one who holds it.
pub(crate) async fn acquire(
    dir: &Dir,
    owner: Owner,
    needed: &[Server],
    progress: &Progress,
) -> Result<Access, Error> {
    let mut seen = None;
    let mut since = Instant::now();
    let mut times = 0;
    loop {
        if let Some(lock) = dir.try_lock()? {
            return Ok(Access::Own(lock));
        }
        let record = dir.record();
        if record != seen {
            (seen, since, times) = (record, Instant::now(), 0);
        }
        times += 1;
        match record {
            Some(record) if times >= SURE_AFTER || record.holder.is_seen() => {
                if let Some(access) = consider(dir, owner, needed, record, since.elapsed()).await? {
                    return Ok(access);
                }
            }
            None if since.elapsed() > WAIT => {
                let path = dir.path.join("stack.json");
                return Err(Error::Data { path, source: io::ErrorKind::NotFound.into() });
            }
            _ => {}
        }
        if let (Some(record), TELL_AFTER) = (record, times) {
            progress(Event::Waiting { what: format!("{} on `{}`", record.holder, dir.named.display()) });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What to do about a holder whose record has been the same for `waited`; `None` is to go on waiting.
async fn consider(
    dir: &Dir,
    owner: Owner,
    needed: &[Server],
    record: Record,
    waited: Duration,
) -> Result<Option<Access>, Error> {
    let path = dir.named.clone();
    let holder = record.holder;
    let verdict = judge(owner, holder.owner);
    let impatient = waited > patience(verdict, record.stage);
    match verdict {
        Verdict::Refuse => Err(Error::InUse { path, holder }),
        Verdict::Wait if impatient => Err(Error::InUse { path, holder }),
        Verdict::Wait => Ok(None),
        Verdict::Attach => {
            if record.stage == Stage::Ready {
                if let Some(server) = not_served(&record, needed) {
                    return Err(Error::NotServed { path, holder, server });
                }
                if answers(&record, needed).await {
                    return Ok(Some(Access::Attached(record)));
                }
            }
            if impatient { Err(Error::Unreachable { path, holder, waited }) } else { Ok(None) }
        }
    }
}

fn not_served(record: &Record, needed: &[Server]) -> Option<Server> {
    needed.iter().copied().find(|server| port_of(record, *server).is_none())
}

async fn answers(record: &Record, needed: &[Server]) -> bool {
    for port in needed.iter().filter_map(|server| port_of(record, *server)) {
        if !net::listens(port).await {
            return false;
        }
    }
    true
}

pub(crate) fn port_of(record: &Record, server: Server) -> Option<u16> {
    match server {
        Server::Nats => record.nats_port,
        Server::ClickHouse => record.clickhouse_port,
    }
}

/// Moves a long log aside. Called when a stack opens; a restart goes on in the same file, so that the reason of a crash
/// stays there.
pub(crate) fn rotate(log: &Path) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(meta) if meta.len() > LONGEST_LOG => fs::rename(log, log.with_extension("log.1")),
        _ => Ok(()),
    }
}

/// Empties a log that has become too long while its writer, which appends, goes on.
pub(crate) fn bound(log: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(log)?;
    if file.metadata()?.len() > LONGEST_LOG {
        fs::copy(log, log.with_extension("log.1"))?;
        file.set_len(0)?;
    }
    Ok(())
}

pub(crate) fn open_log(log: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log)
        .map_err(|source| Error::Data { path: log.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Progress {
        std::sync::Arc::new(|_| ())
    }

    fn record(owner: Owner, stage: Stage) -> Record {
        Record { holder: Holder { owner, pid: 123 }, stage, nats_port: None, clickhouse_port: None }
    }

    #[test]
    fn who_may_use_a_held_directory() {
        use Owner::{Moment, Run, Up};
        use Verdict::{Attach, Refuse, Wait};
        let table = [
            (Run, Run, Refuse),
            (Run, Up, Attach),
            (Run, Moment, Wait),
            (Up, Run, Refuse),
            (Up, Up, Refuse),
            (Up, Moment, Wait),
            (Moment, Run, Attach),
            (Moment, Up, Attach),
            (Moment, Moment, Wait),
        ];
        for (ours, theirs, verdict) in table {
            assert_eq!(judge(ours, theirs), verdict, "{ours:?} meets {theirs:?}");
        }
    }

    #[test]
    fn a_record_survives_its_file() {
        let temp = tempfile::tempdir().expect("a temp dir");
        let dir = Dir::create(&temp.path().join("a/b")).expect("a data directory");
        let lock = dir.try_lock().expect("no error").expect("the lock");
        let record = Record { nats_port: Some(4222), ..record(Owner::Up, Stage::Ready) };
        lock.write_record(&record).expect("written");
        assert_eq!(dir.record(), Some(record));
        assert_eq!(record.nats_url().as_deref(), Some("nats://127.0.0.1:4222"));
        lock.release().expect("released");
        assert_eq!(dir.record(), None);
    }

    #[tokio::test]
    async fn a_stale_record_is_ignored_when_the_lock_is_free() {
        let temp = tempfile::tempdir().expect("a temp dir");
        let dir = Dir::create(temp.path()).expect("a data directory");
        let lock = dir.try_lock().expect("no error").expect("the lock");
        lock.write_record(&record(Owner::Run, Stage::Ready)).expect("written");
        drop(lock);
        let access = acquire(&dir, Owner::Run, &[], &quiet()).await.expect("the lock");
        assert!(matches!(access, Access::Own(_)));
    }

    #[tokio::test]
    async fn a_second_run_is_refused_with_the_first_ones_pid() {
        let temp = tempfile::tempdir().expect("a temp dir");
        let dir = Dir::create(temp.path()).expect("a data directory");
        let lock = dir.try_lock().expect("no error").expect("the lock");
        lock.write_record(&record(Owner::Run, Stage::Starting)).expect("written");
        let error = acquire(&dir, Owner::Run, &[], &quiet()).await.expect_err("refused");
        assert!(error.to_string().ends_with("which is in use by `run` (pid 123)"), "{error}");
        assert!(error.hint().is_some());
    }

    #[tokio::test]
    async fn a_short_command_is_waited_for() {
        let temp = tempfile::tempdir().expect("a temp dir");
        let dir = Dir::create(temp.path()).expect("a data directory");
        let lock = dir.try_lock().expect("no error").expect("the lock");
        lock.write_record(&record(Owner::Moment, Stage::Ready)).expect("written");
        let quiet = quiet();
        let (access, released) = tokio::join!(acquire(&dir, Owner::Up, &[], &quiet), async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            lock.release()
        });
        released.expect("released");
        assert!(matches!(access.expect("the lock"), Access::Own(_)));
    }

    #[test]
    fn a_long_log_is_moved_aside_or_emptied() {
        let temp = tempfile::tempdir().expect("a temp dir");
        let log = temp.path().join("x.log");
        let long = vec![b'x'; LONGEST_LOG as usize + 1];
        fs::write(&log, &long).expect("written");
        bound(&log).expect("bounded");
        assert_eq!(fs::metadata(&log).expect("there").len(), 0);
        fs::write(&log, &long).expect("written");
        rotate(&log).expect("rotated");
        assert!(!log.exists());
        assert!(log.with_extension("log.1").exists());
    }
}
