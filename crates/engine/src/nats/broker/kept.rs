//! What the streams keep: for how long, how much, and since when each batch.

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

/// The server forgets a consumer that only looks after this long.
const LOOKED: Duration = Duration::from_secs(30);
/// How names of streams end, and that of a bucket's.
const SUFFIXES: [&str; 4] = ["_ids", "_rows", "_aside", "_runs"];
/// Messages asked for at once; their headers alone come.
const LOOK_AT: usize = 1000;

/// What a stream keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// When the oldest message that it holds came; `None` while it is empty.
    pub oldest_ms: Option<u64>,
    /// How long it keeps a message; zero stands for ever.
    pub max_age: Duration,
    /// Messages in it.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that it holds at most.
    pub max_bytes: u64,
}

/// What the streams of one pipeline, or one that is no pipeline's, take of the server's storage.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reserved {
    /// What the names of the streams begin with.
    pub holder: String,
    /// Bytes that are kept free for them.
    pub reserved: u64,
    /// Bytes that they hold.
    pub used: u64,
}

impl Broker {
    /// Who holds how much of the server's storage, the largest share first.
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

    /// Bytes that the streams of this account may have at most; `None` where the account has no limit of its own.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn storage_limit(&self) -> Result<Option<u64>, Error> {
        let doing = "ask what this account may store";
        let account = within(doing, self.jetstream.query_account()).await?.map_err(broker(doing))?;
        Ok(account.limits.max_storage.and_then(|limit| u64::try_from(limit).ok()))
    }

    /// Each stream of this pipeline that there is, by its whole name, in the order in which they are deleted; and the names of
    /// those under its names which do not say that Millstream made them. A bucket cannot say it: it is ours beside a stream
    /// that does, and goes before the last of them.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`]; the broker's.
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

    /// Deletes a stream with all that is in it.
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
                Err(Error::NoEffect { doing, seen: "it is there still".into() })
            }
            _ => Ok(()),
        }
    }

    /// What a stream keeps; `None` where there is no such stream.
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

    /// Removes the rows of a sealed pass from the stream, unless that keeps them for longer: what the stream says decides, for
    /// every sealer, whatever its own configuration.
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

    /// Numbers of the batches of a run that were published at `since` or later and before `until`, in order; where an open
    /// run has ended, that of its end too.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn published_between(
        &self,
        run: &RunName,
        since: Option<u64>,
        until: Option<u64>,
    ) -> Result<Vec<u32>, Error> {
        let doing = format!("look at when run `{run}` was published");
        let stream = self.names.ids_stream();
        let config = pull::Config {
            filter_subject: self.names.run_ids(run),
            deliver_policy: since.map_or(DeliverPolicy::All, |since| DeliverPolicy::ByStartTime {
                start_time: calendar(since),
            }),
            ack_policy: AckPolicy::None,
            headers_only: true,
            memory_storage: true,
            inactive_threshold: LOOKED,
            ..Default::default()
        };
        let looking = self.jetstream.create_consumer_on_stream(config, stream);
        let consumer: PullConsumer = within(&doing, looking).await?.map_err(broker(&doing))?;
        let mut batches = Vec::new();
        let mut left = consumer.cached_info().num_pending;
        while left > 0 {
            let seen = look(&doing, &consumer, until, &mut batches).await?;
            // Less than there was: some of it was removed meanwhile.
            left = if seen == 0 { 0 } else { left.saturating_sub(seen) };
        }
        batches.sort_unstable();
        Ok(batches)
    }
}

/// Bytes that a stream holds at most.
pub(super) fn limit_of(info: &stream::Info) -> u64 {
    u64::try_from(info.config.max_bytes).unwrap_or(0)
}

/// Bytes that the server keeps free for a stream.
fn reserved_for(info: &stream::Info) -> u64 {
    limit_of(info).max(info.state.bytes)
}

/// Looks at the next messages; how many there were.
async fn look(
    doing: &str,
    consumer: &PullConsumer,
    until: Option<u64>,
    batches: &mut Vec<u32>,
) -> Result<u64, Error> {
    let request = consumer.fetch().max_messages(LOOK_AT).expires(ANSWER_WITHIN / 2).messages();
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
