//! The records of runs and passes in the key-value bucket. They are JSON, so that an operator can read them
//! with `nats kv get`.
//!
//! Every change is a compare-and-set on the revision that was read. A run's record never changes once it is
//! published; a pass's state does.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use async_nats::jetstream::kv::{self, Operation, Store as Bucket};
use async_nats::jetstream::response::Response;
use futures_util::{StreamExt, TryStreamExt, stream};
use millstream::names::{Names, PassId, RunName};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, broker};
use crate::model::host::{HostReport, instance};
use crate::model::moment::{Moment, since_1970_ms};
use crate::nats::answer::within;
use crate::retry::Backoff;

use crate::model::record::{PassRecord, RunRecord};

/// How long requests to a bucket without a leader are retried.
const ELECTION: Duration = Duration::from_secs(20);
/// Concurrent reads of records.
const READS: usize = 32;
/// First and longest pause between these retries.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));

/// A record with the revision that an update must name.
#[derive(Debug, Clone)]
pub struct Entry<R> {
    /// The record.
    pub record: R,
    /// The revision that was read.
    pub revision: u64,
    /// When the record was written, by the server's clock, in milliseconds since 1970.
    pub written_ms: u64,
}

/// The outcome of a compare-and-set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// This change was written.
    Made,
    /// Another process changed or created the record since it was read.
    Beaten,
}

/// The bucket of records of one pipeline.
#[derive(Debug, Clone)]
pub struct Records {
    jetstream: jetstream::Context,
    bucket: Bucket,
    names: Names,
}

impl Records {
    pub(crate) fn new(jetstream: jetstream::Context, bucket: Bucket, names: Names) -> Self {
        Self { jetstream, bucket, names }
    }

    /// The time of the server's clock, in milliseconds since 1970. The age of a record or message is measured
    /// by this clock alone, because the clocks of hosts differ by minutes.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub(crate) async fn server_ms(&self) -> Result<u64, Error> {
        let doing = format!("ask for the time of bucket `{}`", self.bucket.name);
        let subject = format!("STREAM.INFO.{}", self.bucket.stream_name);
        let nothing = json!({});
        let mut window = RetryWindow::new();
        loop {
            let asked = self.jetstream.request::<_, _, Response<Clock>>(subject.clone(), &nothing);
            match answer(&doing, asked).await {
                Err(error) if window.should_retry(&error).await => {}
                Ok(Response::Ok(clock)) => return Ok(clock.ts.0),
                Ok(Response::Err { error }) => return Err(broker(&doing)(error)),
                Err(error) => return Err(error),
            }
        }
    }

    /// A run's record.
    ///
    /// # Errors
    /// When the broker does not answer or the record is malformed.
    pub async fn run(&self, run: &RunName) -> Result<Option<Entry<RunRecord>>, Error> {
        self.get(&self.names.run_key(run)).await
    }

    /// A run's record, or an error that lists the existing runs.
    ///
    /// # Errors
    /// [`Error::NoSuchRun`]; when the broker does not answer or the record is malformed.
    pub async fn known_run(&self, run: &RunName) -> Result<Entry<RunRecord>, Error> {
        match self.run(run).await? {
            Some(entry) => Ok(entry),
            None => {
                let mut runs = self.runs().await?;
                runs.sort_by_key(|run| std::cmp::Reverse(run.created_ms));
                let known = runs.into_iter().take(8).map(|run| format!("`{}`", run.run)).collect();
                Err(Error::NoSuchRun { run: run.to_string(), known })
            }
        }
    }

    /// A pass's record.
    ///
    /// # Errors
    /// When the broker does not answer or the record is malformed.
    pub async fn pass(&self, pass: &PassId) -> Result<Option<Entry<PassRecord>>, Error> {
        self.get(&self.names.pass_key(pass)).await
    }

    /// The newest pass of a run.
    ///
    /// # Errors
    /// When the broker does not answer or a record is malformed.
    pub async fn newest_pass(&self, run: &RunName) -> Result<Option<Entry<PassRecord>>, Error> {
        match self.passes_of(run).await?.last() {
            Some(newest) => self.pass(&newest.id()).await,
            None => Ok(None),
        }
    }

    /// The passes of a run in order. Numbers of forgotten passes are missing.
    ///
    /// # Errors
    /// When the broker does not answer or a record is malformed.
    pub async fn passes_of(&self, run: &RunName) -> Result<Vec<PassRecord>, Error> {
        let mut passes = self.all::<PassRecord>(&self.names.pass_keys(run)).await?;
        passes.sort_unstable_by_key(|record| record.pass);
        Ok(passes)
    }

    /// A number that no pass of the run has or had.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn next_pass(&self, run: &RunName) -> Result<u32, Error> {
        // A forgotten pass leaves its key, so that its late messages do not count for another pass.
        let keys = self.keys(&self.names.pass_keys(run)).await?;
        let numbers = keys.iter().filter_map(|key| key.rsplit('.').next()?.parse::<u32>().ok());
        Ok(numbers.max().unwrap_or(0) + 1)
    }

    /// All runs, in no order.
    ///
    /// # Errors
    /// When the broker does not answer or a record is malformed.
    pub async fn runs(&self) -> Result<Vec<RunRecord>, Error> {
        self.all("run.*").await
    }

    /// All passes of all runs, in no order.
    ///
    /// # Errors
    /// When the broker does not answer or a record is malformed.
    pub async fn passes(&self) -> Result<Vec<PassRecord>, Error> {
        self.all("pass.*.*").await
    }

    /// Creates a run's record.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn create_run(&self, record: &RunRecord) -> Result<Change, Error> {
        self.create(&self.names.run_key(&record.run), record).await
    }

    /// Changes a run's record.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn update_run(&self, entry: &Entry<RunRecord>) -> Result<Change, Error> {
        self.update(&self.names.run_key(&entry.record.run), &entry.record, entry.revision).await
    }

    /// Creates a pass's record.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn create_pass(&self, record: &PassRecord) -> Result<Change, Error> {
        self.create(&self.names.pass_key(&record.id()), record).await
    }

    /// Changes a pass's record.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn update_pass(&self, entry: &Entry<PassRecord>) -> Result<Change, Error> {
        self.update(&self.names.pass_key(&entry.record.id()), &entry.record, entry.revision).await
    }

    /// Removes a run's record, if it has not changed since it was read.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn remove_run(&self, entry: &Entry<RunRecord>) -> Result<Change, Error> {
        self.remove(&self.names.run_key(&entry.record.run), entry.revision).await
    }

    /// Removes a pass's record, if it has not changed since it was read. The key stays, so that the number is
    /// not used again.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn remove_pass(&self, entry: &Entry<PassRecord>) -> Result<Change, Error> {
        self.remove(&self.names.pass_key(&entry.record.id()), entry.revision).await
    }

    pub(crate) fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    async fn get<R: DeserializeOwned>(&self, key: &str) -> Result<Option<Entry<R>>, Error> {
        let doing = format!("read record `{key}` from bucket `{}`", self.bucket.name);
        let mut window = RetryWindow::new();
        let entry = loop {
            match answer(&doing, self.bucket.entry(key)).await {
                Err(error) if window.should_retry(&error).await => {}
                outcome => break outcome?,
            }
        };
        match entry {
            Some(entry) if entry.operation == Operation::Put => {
                let written_ms = since_1970_ms(entry.created);
                Ok(Some(Entry { record: parse(key, &entry.value)?, revision: entry.revision, written_ms }))
            }
            _ => Ok(None),
        }
    }

    async fn create<R: Serialize>(&self, key: &str, record: &R) -> Result<Change, Error> {
        let doing = format!("create record `{key}` in bucket `{}`", self.bucket.name);
        let mut window = RetryWindow::new();
        let mut asked = 0;
        loop {
            asked += 1;
            let failed = match within(&doing, self.bucket.create(key, to_json(record))).await {
                Ok(Ok(_)) => return Ok(Change::Made),
                Ok(Err(error)) if error.kind() == kv::CreateErrorKind::AlreadyExists => {
                    return self.beaten(key, record, asked).await;
                }
                Ok(Err(error)) => broker(&doing)(error),
                Err(silent) => silent,
            };
            if !window.should_retry(&failed).await {
                return Err(failed);
            }
        }
    }

    async fn update<R: Serialize>(&self, key: &str, record: &R, revision: u64) -> Result<Change, Error> {
        let doing = format!("change record `{key}` in bucket `{}`", self.bucket.name);
        let mut window = RetryWindow::new();
        let mut asked = 0;
        loop {
            asked += 1;
            let failed = match within(&doing, self.bucket.update(key, to_json(record), revision)).await {
                Ok(Ok(_)) => return Ok(Change::Made),
                Ok(Err(error)) if error.kind() == kv::UpdateErrorKind::WrongLastRevision => {
                    return self.beaten(key, record, asked).await;
                }
                Ok(Err(error)) => broker(&doing)(error),
                Err(silent) => silent,
            };
            if !window.should_retry(&failed).await {
                return Err(failed);
            }
        }
    }

    /// Finds out whether another process really was first. If our first attempt succeeded but its reply was
    /// lost, the retry is refused too, and the change counts as made.
    async fn beaten<R: Serialize>(&self, key: &str, record: &R, asked: u32) -> Result<Change, Error> {
        if asked < 2 {
            return Ok(Change::Beaten);
        }
        let doing = format!("read record `{key}` from bucket `{}`", self.bucket.name);
        let found = answer(&doing, self.bucket.get(key)).await?;
        Ok(if found.is_some_and(|found| found == to_json(record)) { Change::Made } else { Change::Beaten })
    }

    /// The heartbeat records of all processes, by key. Records that this build cannot parse are left out.
    pub(crate) async fn hosts(&self) -> Result<Vec<(String, Entry<HostReport>)>, Error> {
        let keys = self.keys("host.>").await?;
        let reads = stream::iter(keys).map(async |key| {
            let report = self.get::<HostReport>(&key).await;
            (key, report)
        });
        let mut hosts = Vec::new();
        for (key, report) in reads.buffer_unordered(READS).collect::<Vec<_>>().await {
            match report {
                Ok(report) => hosts.extend(report.map(|report| (key, report))),
                Err(Error::Record { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(hosts)
    }

    /// Writes the heartbeat record of a process.
    pub(crate) async fn put_host(&self, key: &str, report: &HostReport) -> Result<(), Error> {
        let doing = format!("write record `{key}` to bucket `{}`", self.bucket.name);
        answer(&doing, self.bucket.put(key, to_json(report))).await.map(drop)
    }

    /// Removes the heartbeat record of a process. The deletion marker stays until the next sweep, because a
    /// worker has no right to purge.
    pub(crate) async fn remove_host(&self, key: &str) -> Result<(), Error> {
        let doing = format!("remove record `{key}` from bucket `{}`", self.bucket.name);
        answer(&doing, self.bucket.delete(key)).await
    }

    /// Purges heartbeat records that were last written before `before_ms`, and those that were removed.
    pub(crate) async fn sweep_hosts(&self, before_ms: u64) -> Result<(), Error> {
        for key in self.keys("host.>").await? {
            let entry = self.get::<IgnoredAny>(&key).await?;
            if entry.is_some_and(|entry| entry.written_ms >= before_ms) {
                continue;
            }
            let doing = format!("purge record `{key}` from bucket `{}`", self.bucket.name);
            let subject = format!("{}{key}", self.bucket.prefix);
            answer(&doing, self.bucket.stream.purge().filter(subject).into_future()).await?;
        }
        Ok(())
    }

    /// The key of a process's heartbeat record.
    pub(crate) fn host_key(&self, role: &str, host: &str, pid: u32) -> String {
        self.names.host_key(role, host, pid, instance())
    }

    async fn remove(&self, key: &str, revision: u64) -> Result<Change, Error> {
        let doing = format!("remove record `{key}` from bucket `{}`", self.bucket.name);
        match within(&doing, self.bucket.purge_expect_revision(key, Some(revision))).await? {
            Ok(()) => Ok(Change::Made),
            Err(error) if error.kind() == kv::PurgeErrorKind::WrongLastRevision => Ok(Change::Beaten),
            Err(error) => Err(broker(doing)(error)),
        }
    }

    /// Reads every record whose key matches.
    async fn all<R: DeserializeOwned>(&self, keys: &str) -> Result<Vec<R>, Error> {
        let keys = self.keys(keys).await?;
        let reads = keys.iter().map(|key| self.get::<R>(key));
        let reads: Vec<_> = reads.collect();
        let found: Vec<Option<Entry<R>>> = stream::iter(reads).buffered(READS).try_collect().await?;
        Ok(found.into_iter().flatten().map(|entry| entry.record).collect())
    }

    /// The keys that match, including those of removed records.
    async fn keys(&self, keys: &str) -> Result<Vec<String>, Error> {
        let doing = format!("list bucket `{}`", self.bucket.name);
        // A watch on an empty bucket never reports that its first values are complete.
        let info =
            answer(&doing, self.bucket.stream.info_with_subjects(format!("$KV.{}.{keys}", self.bucket.name)));
        let mut subjects = info.await?;
        let mut found = Vec::new();
        while let Some(subject) = within(&doing, subjects.next()).await? {
            let (subject, _) = subject.map_err(broker(&doing))?;
            found.extend(subject.splitn(3, '.').nth(2).map(str::to_owned));
        }
        Ok(found)
    }
}

/// The server's time in its description of a stream.
#[derive(Deserialize)]
struct Clock {
    ts: ServerTime,
}

/// Milliseconds since 1970.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct ServerTime(u64);

impl TryFrom<String> for ServerTime {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let moment = Moment::parse(&text, 0).ok_or_else(|| format!("`{text}` is not a time"))?;
        Ok(Self(moment.at_ms))
    }
}

/// Retries for a while when the bucket has no leader: one is being elected, or its server is starting.
struct RetryWindow {
    begun: Instant,
    pause: Backoff,
}

impl RetryWindow {
    fn new() -> Self {
        Self { begun: Instant::now(), pause: Backoff::new(PAUSE.0, PAUSE.1) }
    }

    /// Waits and returns true if the request should be retried after this error.
    async fn should_retry(&mut self, error: &Error) -> bool {
        let retry = error.is_nobody() && self.begun.elapsed() < ELECTION;
        if retry {
            tokio::time::sleep(self.pause.wait()).await;
        }
        retry
    }
}

fn parse<R: DeserializeOwned>(key: &str, value: &[u8]) -> Result<R, Error> {
    serde_json::from_slice(value).map_err(|source| Error::Record { key: key.to_owned(), source })
}

fn to_json<R: Serialize>(record: &R) -> bytes::Bytes {
    serde_json::to_vec(record).expect("records are strings, numbers and options").into()
}

async fn answer<T, E: Into<crate::error::Source>>(
    doing: &str,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, Error> {
    within(doing, future).await?.map_err(broker(doing))
}
