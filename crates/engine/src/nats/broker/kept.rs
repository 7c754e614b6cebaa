//! What the streams retain: how long, how many bytes, and when each batch was published.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::stream;
use futures_util::StreamExt;
use millstream::names::{PassId, RunName, batch_of};

use super::Broker;
use crate::environment::Environment;
use crate::error::{Error, broker};
use crate::model::moment::{calendar, since_1970_ms};
use crate::nats::answer::{ANSWER_WITHIN, within};

/// How long the server keeps an unused consumer that only reads headers.
const UNUSED_AFTER: Duration = Duration::from_secs(30);
/// The suffixes of the stream names, and of the bucket's.
const SUFFIXES: [&str; 4] = ["_ids", "_rows", "_aside", "_runs"];
/// The most messages per request; only their headers are sent.
const HEADERS_AT_ONCE: usize = 1000;

/// The retention of a stream, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// When the stream was created, in milliseconds since 1970.
    pub created_ms: u64,
    /// When the oldest message in the stream was stored; `None` while the stream is empty.
    pub oldest_ms: Option<u64>,
    /// How long the stream retains a message; zero means without a limit.
    pub max_age: Duration,
    /// The number of messages in the stream.
    pub messages: u64,
    /// The bytes of the messages in the stream.
    pub bytes: u64,
    /// The most bytes that the stream may hold.
    pub max_bytes: u64,
}

/// The server storage that the streams of one name prefix take, whether it is a pipeline or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reserved {
    /// The prefix of the stream names.
    pub holder: String,
    /// Bytes that the server reserves for these streams.
    pub reserved: u64,
    /// Bytes that these streams hold.
    pub used: u64,
}

impl Broker {
    /// The storage that each holder's streams take, the largest reservation first.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn reserved(&self) -> Result<Vec<Reserved>, Error> {
        let doing = "list all streams";
        let mut streams = self.jetstream.streams();
        let mut holders: BTreeMap<String, Reserved> = BTreeMap::new();
        while let Some(info) = within(doing, streams.next()).await? {
            let info = info.map_err(broker(doing))?;
            let name = info.config.name.trim_start_matches("KV_");
            let holder =
                SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name).to_owned();
            let entry = holders.entry(holder).or_default();
            entry.reserved += reserved_for(&info);
            entry.used += info.state.bytes;
        }
        let named = holders.into_iter().map(|(holder, entry)| Reserved { holder, ..entry });
        let mut all: Vec<Reserved> = named.collect();
        all.sort_by_key(|entry| std::cmp::Reverse(entry.reserved));
        Ok(all)
    }

    /// The byte limit of this account's streams; `None` if the account has no limit of its own.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn storage_limit(&self) -> Result<Option<u64>, Error> {
        let doing = "ask what this account may store";
        let account = within(doing, self.jetstream.query_account()).await?.map_err(broker(doing))?;
        Ok(account.limits.max_storage.and_then(|limit| u64::try_from(limit).ok()))
    }

    /// The existing streams of this pipeline by full name, in the order in which they are deleted. The second
    /// list names streams that match this pipeline's names without Millstream's mark. A bucket cannot be
    /// marked: it counts as ours if a marked stream exists, and is deleted before the last of them.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`]; when NATS refuses or does not answer.
    pub async fn own_streams(&self) -> Result<(Vec<Reserved>, Vec<String>), Error> {
        let bucket = self.bucket_stream();
        let names =
            [bucket.clone(), self.names.aside_stream(), self.names.rows_stream(), self.names.ids_stream()];
        let mut found = Vec::new();
        let mut unmarked = Vec::new();
        for name in names {
            let Some(info) = self.stream_info(&name).await? else { continue };
            if name != bucket && !Environment::is_marked(&info.config.metadata) {
                unmarked.push(name);
                continue;
            }
            self.environment.check_stream(&name, &info.config.metadata)?;
            found.push(Reserved { holder: name, reserved: reserved_for(&info), used: info.state.bytes });
        }
        if found.iter().all(|stream| stream.holder == bucket) {
            unmarked.extend(found.drain(..).map(|stream| stream.holder));
        }
        Ok((found, unmarked))
    }

    /// Deletes a stream with all its messages.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn delete_stream(&self, name: &str) -> Result<(), Error> {
        let doing = format!("delete stream `{name}`");
        let before = self.stream_info(name).await?;
        within(&doing, self.jetstream.delete_stream(name)).await?.map_err(broker(&doing))?;
        let after = self.stream_info(name).await?;
        match before.zip(after) {
            Some((before, after)) if before.created == after.created => {
                Err(Error::NoEffect { doing, seen: "it still exists".into() })
            }
            _ => Ok(()),
        }
    }

    /// What a stream retains and holds; `None` if it does not exist.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn kept(&self, stream: &str) -> Result<Option<Kept>, Error> {
        let info = self.stream_info(stream).await?;
        Ok(info.map(|info| Kept {
            created_ms: since_1970_ms(info.created),
            oldest_ms: (info.state.messages > 0).then(|| since_1970_ms(info.state.first_timestamp)),
            max_age: info.config.max_age,
            messages: info.state.messages,
            bytes: info.state.bytes,
            max_bytes: limit_of(&info),
        }))
    }

    /// Removes the rows of a sealed pass from the stream, unless the stream retains them for longer. The
    /// stream's own setting decides, so every sealer does the same, whatever its configuration.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_sealed(&self, pass: &PassId) -> Result<(), Error> {
        match self.kept(&self.names.rows_stream()).await? {
            Some(kept) if kept.max_age.is_zero() => {
                self.purge_rows(self.names.pass_rows(pass)).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// The numbers of a run's batches that were published from `since` on and before `until`, in order. For an
    /// open run that has ended, the number of its end marker is included.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn published_between(
        &self,
        run: &RunName,
        since: Option<u64>,
        until: Option<u64>,
    ) -> Result<Vec<u32>, Error> {
        let doing = format!("find when run `{run}` was published");
        let stream = self.names.ids_stream();
        let config = pull::Config {
            filter_subject: self.names.run_ids(run),
            deliver_policy: since.map_or(DeliverPolicy::All, |since| DeliverPolicy::ByStartTime {
                start_time: calendar(since),
            }),
            ack_policy: AckPolicy::None,
            headers_only: true,
            memory_storage: true,
            inactive_threshold: UNUSED_AFTER,
            ..Default::default()
        };
        let created = self.jetstream.create_consumer_on_stream(config, stream);
        let consumer: PullConsumer = within(&doing, created).await?.map_err(broker(&doing))?;
        let mut batches = Vec::new();
        let mut left = consumer.cached_info().num_pending;
        while left > 0 {
            let seen = read_headers(&doing, &consumer, until, &mut batches).await?;
            // Smaller than the answer, because some messages were removed meanwhile.
            left = if seen == 0 { 0 } else { left.saturating_sub(seen) };
        }
        batches.sort_unstable();
        Ok(batches)
    }
}

/// The most bytes that a stream may hold.
pub(super) fn limit_of(info: &stream::Info) -> u64 {
    u64::try_from(info.config.max_bytes).unwrap_or(0)
}

/// Bytes that the server reserves for a stream.
fn reserved_for(info: &stream::Info) -> u64 {
    limit_of(info).max(info.state.bytes)
}

/// Reads the headers of the next messages and returns how many there were.
async fn read_headers(
    doing: &str,
    consumer: &PullConsumer,
    until: Option<u64>,
    batches: &mut Vec<u32>,
) -> Result<u64, Error> {
    let request = consumer.fetch().max_messages(HEADERS_AT_ONCE).expires(ANSWER_WITHIN / 2).messages();
    let mut messages = within(doing, request).await?.map_err(broker(doing))?;
    let mut seen = 0;
    while let Some(message) = within(doing, messages.next()).await? {
        let message = message.map_err(broker(doing))?;
        seen += 1;
        let published = since_1970_ms(message.info().map_err(broker(doing))?.published);
        if until.is_none_or(|until| published < until)
            && let Some(batch) = batch_of(&message.subject)
        {
            batches.push(batch);
        }
    }
    Ok(seen)
}
