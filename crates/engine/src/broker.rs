//! NATS: the connection, the streams and consumers with every setting, publishing, pulling.
//!
//! Every wait for an answer has a timeout. What a setting is for stands beside it.

use std::path::PathBuf;
use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{Context, ErrorCode, context, kv};
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use bytes::Bytes;
use millstream::names::{Names, RunName};

use crate::error::{Error, Source, broker};
use crate::records::Records;
use crate::retry::Backoff;
use crate::stop::Stop;

/// How long an answer of the broker may take before the question is asked again or given up.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A dead peer is noticed by pings alone: after two that stay unanswered.
const PING: Duration = Duration::from_secs(5);

/// A worker's batch is delivered again after this long without a sign of progress.
pub const WORK_ACK_WAIT: Duration = Duration::from_secs(60);
/// A sink's batch is delivered again after this long without a sign of progress.
pub const SINK_ACK_WAIT: Duration = Duration::from_secs(120);

/// Deliveries that may be open on one consumer, over all hosts: far above what permits let a fleet take.
const MAX_ACK_PENDING: i64 = 100_000;

/// Where NATS is.
#[derive(Debug, Clone)]
pub struct NatsAddress {
    /// `nats://host:port`, several with commas between.
    pub url: String,
    /// A credentials file.
    pub creds: Option<PathBuf>,
    /// Where the address came from, for messages: `--nats`, `NATS_URL`, the local stack.
    pub origin: String,
}

/// How much the streams may hold.
#[derive(Debug, Clone)]
pub struct StreamLimits {
    /// Bytes of the ids stream.
    pub ids_bytes: u64,
    /// Bytes of the rows stream.
    pub rows_bytes: u64,
    /// How long ids are kept for replay.
    pub ids_age: Duration,
    /// Copies of each stream in a cluster of servers.
    pub replicas: usize,
    /// Whether smaller limits will do when the server has no room for these.
    pub may_shrink: bool,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            ids_bytes: 16 << 30,
            rows_bytes: 16 << 30,
            ids_age: Duration::from_secs(30 * 24 * 3600),
            replicas: 1,
            may_shrink: true,
        }
    }
}

/// What helps when a stream is full, which is what `maximum bytes exceeded` means.
const STREAM_FULL: &str = "the stream is full: rows wait for sinks to catch up; ids stay for replay, so give their \
                           stream more bytes ([streams] ids_bytes, `nats stream edit`) or remove old runs from it";

/// Below this a stream is no buffer any more, and setting up fails instead.
const SMALLEST_STREAM: u64 = 64 << 20;

/// How a publish that nobody may do twice came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// This writer's bytes are stored.
    First,
    /// The subject already held a message.
    Already,
}

/// A connection to NATS, for one pipeline.
#[derive(Debug, Clone)]
pub struct Broker {
    names: Names,
    client: Client,
    jetstream: Context,
}

impl Broker {
    /// Connects. Afterwards the client reconnects by itself, for as long as it takes.
    ///
    /// # Errors
    /// [`Error::Connect`] when no server answers now.
    pub async fn connect(address: &NatsAddress, names: Names, role: &str) -> Result<Self, Error> {
        let mut options = ConnectOptions::new()
            .name(format!("millstream {} {role}", names.pipeline()))
            .ping_interval(PING)
            .connection_timeout(Duration::from_secs(5))
            .request_timeout(Some(ANSWER_WITHIN))
            .max_reconnects(None)
            .event_callback(|event| async move { log_event(&event) });
        if let Some(path) = &address.creds {
            options = options
                .credentials_file(path)
                .await
                .map_err(|source| Error::Credentials { path: path.display().to_string(), source })?;
        }
        let servers: Vec<&str> = address.url.split(',').map(str::trim).collect();
        // The client takes no user from an address by itself.
        if let Some(named) = servers.first().and_then(|first| first.parse::<ServerAddr>().ok())
            && let (Some(user), Some(password)) = (named.username(), named.password())
        {
            options = options.user_and_password(percent_decoded(user), percent_decoded(password));
        }
        let servers: Vec<String> = servers.into_iter().map(str::to_owned).collect();
        let client = options.connect(servers).await.map_err(|source| Error::Connect {
            server: without_password(&address.url),
            origin: address.origin.clone(),
            source,
        })?;
        let jetstream = context::ContextBuilder::new()
            .timeout(ANSWER_WITHIN)
            .ack_timeout(ANSWER_WITHIN)
            .build(client.clone());
        Ok(Self { names, client, jetstream })
    }

    /// The pipeline's names.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The largest message that the server takes, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client.server_info().max_payload
    }

    /// The server's version.
    pub fn server_version(&self) -> String {
        self.client.server_info().version
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Creates what is missing: two streams, the bucket, the sinks' consumer. What exists is checked, not changed.
    ///
    /// # Errors
    /// [`Error::StreamSettings`] when a stream exists whose settings break the protocol; the broker's refusals.
    pub async fn setup(&self, limits: &StreamLimits) -> Result<(), Error> {
        self.ensure_streams(limits).await?;
        self.ensure_bucket(limits.replicas).await?;
        self.ensure_sink_consumer().await
    }

    fn stream_config(
        &self,
        name: String,
        subjects: String,
        age: Duration,
        limits: &StreamLimits,
    ) -> stream::Config {
        stream::Config {
            name,
            subjects: vec![subjects],
            storage: StorageType::File,
            num_replicas: limits.replicas,
            // Messages stay after their ack: ids for replay, rows until their pass is sealed.
            retention: RetentionPolicy::Limits,
            // Full means that publishers wait, never that something old is dropped.
            discard: DiscardPolicy::New,
            discard_new_per_subject: true,
            // One subject, one batch, one message: what first-writer-wins rests on.
            max_messages_per_subject: 1,
            max_age: age,
            // Nobody sends a Msg-Id; the smallest window costs least.
            duplicate_window: Duration::from_secs(1).min(if age.is_zero() {
                Duration::from_secs(1)
            } else {
                age
            }),
            allow_direct: true,
            ..Default::default()
        }
    }

    /// Both streams, halved together until the server has room for both, if that is allowed.
    async fn ensure_streams(&self, limits: &StreamLimits) -> Result<(), Error> {
        let (mut ids_bytes, mut rows_bytes) = (limits.ids_bytes, limits.rows_bytes);
        loop {
            let ids = stream::Config {
                max_bytes: ids_bytes as i64,
                ..self.stream_config(self.names.ids_stream(), self.names.all_ids(), limits.ids_age, limits)
            };
            let rows = stream::Config {
                max_bytes: rows_bytes as i64,
                ..self.stream_config(self.names.rows_stream(), self.names.all_rows(), Duration::ZERO, limits)
            };
            let (ids_made, mut refusal) = self.ensure_stream(&ids).await?;
            if refusal.is_none() {
                (_, refusal) = self.ensure_stream(&rows).await?;
            }
            let Some(refusal) = refusal else { return Ok(()) };
            if !limits.may_shrink || ids_bytes.min(rows_bytes) / 2 < SMALLEST_STREAM {
                return Err(refusal);
            }
            (ids_bytes, rows_bytes) = (ids_bytes / 2, rows_bytes / 2);
            if ids_made {
                let doing = format!("give stream `{}` {ids_bytes} bytes", ids.name);
                let smaller = stream::Config { max_bytes: ids_bytes as i64, ..ids };
                within(&doing, self.jetstream.update_stream(smaller)).await?.map_err(broker(doing))?;
            }
        }
    }

    /// Whether the stream was made now, and the server's refusal if it has no room for it.
    async fn ensure_stream(&self, config: &stream::Config) -> Result<(bool, Option<Error>), Error> {
        if let Some(info) = self.stream_info(&config.name).await? {
            return check_stream(&info.config, config).map(|()| (false, None));
        }
        let doing = format!("create stream `{}` of {} bytes", config.name, config.max_bytes);
        match within(&doing, self.jetstream.create_stream(config.clone())).await? {
            Ok(_) => Ok((true, None)),
            Err(error) if is_no_room(&error) => Ok((false, Some(broker(doing)(error)))),
            // Another process was faster.
            Err(error) => match self.stream_info(&config.name).await? {
                Some(info) => check_stream(&info.config, config).map(|()| (false, None)),
                None => Err(broker(doing)(error)),
            },
        }
    }

    async fn stream_info(&self, name: &str) -> Result<Option<stream::Info>, Error> {
        let doing = format!("look up stream `{name}`");
        match within(&doing, self.jetstream.get_stream(name)).await? {
            Ok(stream) => Ok(Some(stream.cached_info().clone())),
            Err(error) => match error.kind() {
                context::GetStreamErrorKind::JetStream(refusal)
                    if refusal.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(broker(doing)(error)),
            },
        }
    }

    async fn ensure_bucket(&self, replicas: usize) -> Result<(), Error> {
        let bucket = self.names.bucket();
        if self.stream_info(&format!("KV_{bucket}")).await?.is_some() {
            return Ok(());
        }
        let doing = format!("create bucket `{bucket}`");
        let config = kv::Config {
            bucket,
            history: 5,
            storage: StorageType::File,
            num_replicas: replicas,
            ..Default::default()
        };
        within(&doing, self.jetstream.create_key_value(config)).await?.map_err(broker(doing))?;
        Ok(())
    }

    async fn ensure_sink_consumer(&self) -> Result<(), Error> {
        let config = pull::Config {
            durable_name: Some(self.names.sink_consumer()),
            filter_subject: self.names.all_rows(),
            ack_wait: SINK_ACK_WAIT,
            ..durable()
        };
        self.ensure_consumer(&self.names.rows_stream(), config).await
    }

    /// Creates the durable from which all workers draw a pass, unless it is there.
    ///
    /// # Errors
    /// The broker's.
    pub async fn ensure_work_consumer(&self, run: &RunName, pass: u32) -> Result<(), Error> {
        let config = pull::Config { filter_subject: self.names.run_ids(run), ..self.work_config(run, pass) };
        self.ensure_consumer(&self.names.ids_stream(), config).await
    }

    /// Makes the durable of a pass anew, over just these batches.
    ///
    /// # Errors
    /// The broker's.
    pub async fn replace_work_consumer(
        &self,
        run: &RunName,
        pass: u32,
        batches: &[u32],
    ) -> Result<(), Error> {
        self.remove_work_consumer(run, pass).await?;
        let filter_subjects = batches.iter().map(|batch| self.names.ids_subject(run, *batch)).collect();
        let config = pull::Config { filter_subjects, ..self.work_config(run, pass) };
        self.ensure_consumer(&self.names.ids_stream(), config).await
    }

    fn work_config(&self, run: &RunName, pass: u32) -> pull::Config {
        pull::Config {
            durable_name: Some(self.names.work_consumer(run, pass)),
            ack_wait: WORK_ACK_WAIT,
            deliver_policy: DeliverPolicy::All,
            ..durable()
        }
    }

    async fn ensure_consumer(&self, stream: &str, config: pull::Config) -> Result<(), Error> {
        let name = config.durable_name.clone().unwrap_or_default();
        if self.consumer_info(stream, &name).await?.is_some() {
            return Ok(());
        }
        let doing = format!("create consumer `{name}` on stream `{stream}`");
        within(&doing, self.jetstream.create_consumer_on_stream(config, stream))
            .await?
            .map_err(broker(doing))?;
        Ok(())
    }

    async fn consumer_info(&self, stream: &str, name: &str) -> Result<Option<consumer::Info>, Error> {
        let doing = format!("look up consumer `{name}` on stream `{stream}`");
        let stream =
            within(&doing, self.jetstream.get_stream_no_info(stream)).await?.map_err(broker(&doing))?;
        match within(&doing, stream.consumer_info(name)).await? {
            Ok(info) => Ok(Some(info)),
            Err(error) => match error.kind() {
                context::ConsumerInfoErrorKind::NotFound => Ok(None),
                context::ConsumerInfoErrorKind::JetStream(refusal)
                    if refusal.error_code() == ErrorCode::CONSUMER_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(broker(doing)(error)),
            },
        }
    }

    /// Where the workers of a pass stand; `None` without such a consumer.
    ///
    /// # Errors
    /// The broker's.
    pub async fn work_progress(&self, run: &RunName, pass: u32) -> Result<Option<consumer::Info>, Error> {
        self.consumer_info(&self.names.ids_stream(), &self.names.work_consumer(run, pass)).await
    }

    /// Where the sinks stand, over all passes.
    ///
    /// # Errors
    /// The broker's.
    pub async fn sink_progress(&self) -> Result<Option<consumer::Info>, Error> {
        self.consumer_info(&self.names.rows_stream(), &self.names.sink_consumer()).await
    }

    /// The consumer to pull a pass's batches from; `None` when it does not exist.
    pub(crate) async fn work_consumer(
        &self,
        run: &RunName,
        pass: u32,
    ) -> Result<Option<PullConsumer>, Error> {
        self.pull_consumer(self.names.ids_stream(), self.names.work_consumer(run, pass)).await
    }

    /// The consumer to pull rows from; `None` when it does not exist.
    pub(crate) async fn sink_consumer(&self) -> Result<Option<PullConsumer>, Error> {
        self.pull_consumer(self.names.rows_stream(), self.names.sink_consumer()).await
    }

    async fn pull_consumer(&self, stream: String, name: String) -> Result<Option<PullConsumer>, Error> {
        if self.consumer_info(&stream, &name).await?.is_none() {
            return Ok(None);
        }
        let doing = format!("bind to consumer `{name}` on stream `{stream}`");
        let found = within(&doing, self.jetstream.get_consumer_from_stream(name, stream)).await?;
        found.map(Some).map_err(broker(doing))
    }

    /// Removes the consumer of a pass that needs no more work.
    ///
    /// # Errors
    /// The broker's; that it is gone already is none.
    pub async fn remove_work_consumer(&self, run: &RunName, pass: u32) -> Result<(), Error> {
        if self.work_progress(run, pass).await?.is_none() {
            return Ok(());
        }
        let (stream, name) = (self.names.ids_stream(), self.names.work_consumer(run, pass));
        let doing = format!("remove consumer `{name}` from stream `{stream}`");
        within(&doing, self.jetstream.delete_consumer_from_stream(name, stream))
            .await?
            .map_err(broker(doing))?;
        Ok(())
    }

    /// The bucket of run and pass records.
    ///
    /// # Errors
    /// When it does not exist: [`Self::setup`] makes it.
    pub async fn records(&self) -> Result<Records, Error> {
        let doing = format!("open bucket `{}`", self.names.bucket());
        let bucket = within(&doing, self.jetstream.get_key_value(self.names.bucket()))
            .await?
            .map_err(broker(doing))?;
        Ok(Records::new(bucket, self.names.clone()))
    }

    /// Whether [`Self::setup`] has been done for this pipeline.
    ///
    /// # Errors
    /// The broker's.
    pub async fn is_set_up(&self) -> Result<bool, Error> {
        Ok(self.stream_info(&format!("KV_{}", self.names.bucket())).await?.is_some())
    }

    /// Stores a message under a subject that holds none, for as long as that takes: **first-writer-wins**.
    ///
    /// A PubAck and error 10071 both mean that it is done. Anything else (no answer, a full stream, a server that is
    /// starting) is tried again with the same bytes. An unanswered publish leaks an entry in the client (nats.rs issue
    /// 1617), which the backoff bounds to two a minute.
    ///
    /// # Errors
    /// [`Error::TooLarge`], which no retry can heal; [`Error::Stopped`] when work is given up.
    pub async fn write_once(&self, subject: &str, bytes: Bytes, stop: &Stop) -> Result<Written, Error> {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(30));
        loop {
            if stop.is_given_up() {
                return Err(Error::Stopped);
            }
            let message = PublishMessage::build().payload(bytes.clone()).expected_last_subject_sequence(0);
            let attempt = async { self.jetstream.send_publish(subject.to_owned(), message).await?.await };
            let error = match tokio::time::timeout(ANSWER_WITHIN * 2, attempt).await {
                Ok(Ok(_)) => return Ok(Written::First),
                Ok(Err(error)) => match error.kind() {
                    PublishErrorKind::WrongLastSequence => return Ok(Written::Already),
                    PublishErrorKind::MaxPayloadExceeded => {
                        let (subject, limit) = (subject.to_owned(), self.max_payload());
                        return Err(Error::TooLarge { subject, bytes: bytes.len(), limit });
                    }
                    _ => full_cause(&error),
                },
                Err(_) => "no answer".to_owned(),
            };
            let wait = backoff.wait();
            let hint = if error.contains("maximum bytes") { STREAM_FULL } else { "" };
            tracing::warn!(subject, %error, hint, retry_ms = wait.as_millis() as u64, "publish not confirmed, trying again");
            if !stop.pause(wait).await {
                return Err(Error::Stopped);
            }
        }
    }

    /// The message under a subject of the ids stream, with its sequence.
    ///
    /// # Errors
    /// The broker's.
    pub async fn ids_message(&self, subject: &str) -> Result<Option<(u64, Bytes)>, Error> {
        let doing = format!("read message `{subject}`");
        let stream =
            self.jetstream.get_stream_no_info(self.names.ids_stream()).await.map_err(broker(&doing))?;
        match within(&doing, stream.get_last_raw_message_by_subject(subject)).await? {
            Ok(message) => Ok(Some((message.sequence, message.payload))),
            Err(error) => match error.kind() {
                stream::LastRawMessageErrorKind::NoMessageFound => Ok(None),
                _ => Err(broker(doing)(error)),
            },
        }
    }

    /// Removes every message whose subject matches from the rows stream.
    ///
    /// # Errors
    /// The broker's.
    pub async fn purge_rows(&self, filter: String) -> Result<u64, Error> {
        self.purge(self.names.rows_stream(), filter).await
    }

    async fn purge(&self, stream: String, filter: String) -> Result<u64, Error> {
        let doing = format!("purge `{filter}` from stream `{stream}`");
        let handle = self.jetstream.get_stream_no_info(stream).await.map_err(broker(&doing))?;
        // Removing a hundred thousand messages takes the server longer than an ordinary answer.
        let purge = handle.purge().filter(filter).into_future();
        let answer = tokio::time::timeout(ANSWER_WITHIN * 6, purge)
            .await
            .map_err(|_| Error::BrokerSilent { doing: doing.clone(), after: ANSWER_WITHIN * 6 })?;
        answer.map(|answer| answer.purged).map_err(broker(doing))
    }

    /// Publishes on a plain subject, for whoever listens now.
    ///
    /// # Errors
    /// The broker's.
    pub async fn announce(&self, subject: String, bytes: Bytes) -> Result<(), Error> {
        let doing = format!("announce on `{subject}`");
        within(&doing, self.client.publish(subject, bytes)).await?.map_err(broker(&doing))?;
        within(&doing, self.client.flush()).await?.map_err(broker(doing))
    }

    /// Waits until what was queued, acks above all, is on its way, and the server has seen it.
    pub async fn flush(&self) {
        // A round trip: `flush` alone says that the bytes are in the socket.
        let round_trip = async {
            self.client.flush().await.map_err(Source::from)?;
            self.jetstream.query_account().await.map_err(Source::from)
        };
        if !matches!(tokio::time::timeout(ANSWER_WITHIN, round_trip).await, Ok(Ok(_))) {
            tracing::warn!("the last acks may be lost: those batches will be delivered again");
        }
    }
}

/// What every durable of ours has in common.
fn durable() -> pull::Config {
    pull::Config {
        ack_policy: AckPolicy::Explicit,
        // Poison is handled by us: at a delivery limit the server would drop the batch without a word.
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        // No backoff list, which would replace ack_wait; no inactive threshold, which deletes even durables.
        ..Default::default()
    }
}

fn check_stream(found: &stream::Config, wanted: &stream::Config) -> Result<(), Error> {
    let settings = [
        ("max_msgs_per_subject", found.max_messages_per_subject.to_string(), "1".to_owned()),
        ("discard policy", format!("{:?}", found.discard), format!("{:?}", wanted.discard)),
        ("discard_new_per_subject", found.discard_new_per_subject.to_string(), "true".to_owned()),
        ("retention", format!("{:?}", found.retention), format!("{:?}", wanted.retention)),
        ("subjects", found.subjects.join(","), wanted.subjects.join(",")),
    ];
    match settings.into_iter().find(|(_, found, wanted)| found != wanted) {
        Some((setting, found, expected)) => {
            Err(Error::StreamSettings { stream: wanted.name.clone(), setting, found, expected })
        }
        None => Ok(()),
    }
}

fn is_no_room(error: &context::CreateStreamError) -> bool {
    matches!(error.kind(), context::CreateStreamErrorKind::JetStream(refusal)
        if [ErrorCode::STORAGE_RESOURCES_EXCEEDED, ErrorCode::INSUFFICIENT_RESOURCES].contains(&refusal.error_code()))
}

fn log_event(event: &Event) {
    match event {
        Event::Connected => tracing::debug!("connected to NATS"),
        Event::Disconnected => tracing::warn!("disconnected from NATS, reconnecting"),
        Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) => {
            tracing::warn!(%event, "NATS reports a fault");
        }
        _ => tracing::debug!(%event, "NATS"),
    }
}

fn full_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let next = inner.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = inner.source();
    }
    text
}

/// An address fit to be shown.
pub(crate) fn without_password(url: &str) -> String {
    url.split(',')
        .map(|part| match (part.find("://"), part.rfind('@')) {
            (Some(scheme), Some(at)) if at > scheme => format!("{}{}", &part[..scheme + 3], &part[at + 1..]),
            _ => part.to_owned(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

/// A part of an address as it was before `%40` and the like were put in.
fn percent_decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let [first, after @ ..] = rest {
        let code =
            after.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => (bytes.push(byte), rest = &after[2..]),
            None => (bytes.push(*first), rest = after),
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn within<F: IntoFuture>(doing: &str, future: F) -> Result<F::Output, Error> {
    tokio::time::timeout(ANSWER_WITHIN, future.into_future())
        .await
        .map_err(|_| Error::BrokerSilent { doing: doing.to_owned(), after: ANSWER_WITHIN })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown_without_passwords() {
        assert_eq!(without_password("nats://u:p@a:1,nats://b:2"), "nats://a:1,nats://b:2");
        assert_eq!(without_password("http://localhost:8123"), "http://localhost:8123");
    }

    #[test]
    fn users_of_addresses_are_decoded() {
        for (text, decoded) in
            [("a%40b%3a", "a@b:"), ("100%", "100%"), ("%zz", "%zz"), ("m%C3%BCller", "müller")]
        {
            assert_eq!(percent_decoded(text), decoded);
        }
    }
}
