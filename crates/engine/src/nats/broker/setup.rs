//! Creates what every command needs: three streams and a bucket. Comments beside the settings say what each is
//! for.

use std::time::{Duration, Instant};

use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{ErrorCode, context, kv};

use super::Broker;
use super::kept::limit_of;
use crate::error::{Error, broker, full_cause};
use crate::nats::answer::within;

/// The limits of the streams.
#[derive(Debug, Clone)]
pub struct StreamLimits {
    /// The most bytes in the ids stream.
    pub ids_bytes: u64,
    /// The most bytes in the rows stream.
    pub rows_bytes: u64,
    /// How long ids are retained for replay.
    pub ids_age: Duration,
    /// How long rows are retained for rebuilding a table; zero means until their pass is sealed.
    pub rows_age: Duration,
    /// Replicas of each stream in a cluster.
    pub replicas: usize,
    /// Whether smaller limits are allowed when the server lacks storage, and streams may later grow when they
    /// are full.
    pub is_flexible: bool,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            ids_bytes: 64 << 20,
            rows_bytes: 256 << 20,
            ids_age: Duration::from_secs(30 * 24 * 3600),
            rows_age: Duration::ZERO,
            replicas: 1,
            is_flexible: true,
        }
    }
}

/// The smallest first size of a stream; with less storage, setup fails.
const SMALLEST_STREAM: u64 = 16 << 20;
/// The most bytes in the quarantine stream; less if the ids stream is small.
const QUARANTINE_BYTES: u64 = 64 << 20;
const QUARANTINE_PART: u64 = 4;
/// The largest size to which a full stream doubles, if the server has the storage. The server reserves the
/// limit of a stream, so streams start small: ten pipelines fit a server of 4 GB.
const GROWS_TO: u64 = 64 << 30;
/// The metadata key that marks a stream that may grow. Its value is the byte limit that Millstream set last.
const GROWN: &str = "millstream.grown";
/// Bytes of a message's subject and headers, and of what the server adds.
const MESSAGE_OVERHEAD: u64 = 4 << 10;
/// How old the description of a stream may be when it is changed. An older one may be out of date, because this
/// process was paused or the server was busy.
const FRESH: Duration = Duration::from_secs(1);
/// The pause after the server refused to let a stream grow.
const RETRY_GROWTH_AFTER: Duration = Duration::from_secs(60);

/// The pause after a stream refused a message although it seems to have capacity.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Whether a stream has capacity for a message that it refused as full.
enum Capacity {
    /// The stream now has this byte limit.
    Grown(u64),
    /// Another publisher let the stream grow, or messages were removed.
    Available,
    /// The stream may not grow.
    None,
}

impl Broker {
    /// Creates what is missing: three streams, the bucket, the sinks' consumer. Existing ones are checked, not
    /// changed.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`]; [`Error::StreamSettings`] when the settings of an existing stream break the
    /// protocol; when NATS refuses or does not answer.
    pub async fn setup(&self, limits: &StreamLimits) -> Result<(), Error> {
        // The small streams first, so that the large ones do not take the storage that they need.
        self.ensure_quarantine_stream(limits).await?;
        self.ensure_bucket(limits.replicas).await?;
        self.ensure_streams(limits).await?;
        Box::pin(self.ensure_sink_consumer()).await
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
            // Messages stay after their ack: ids for replay, rows until their pass is sealed, or longer for
            // rebuilding.
            retention: RetentionPolicy::Limits,
            // A full stream makes publishers wait; it never drops old messages.
            discard: DiscardPolicy::New,
            discard_new_per_subject: true,
            // One message per subject, because first-writer-wins rests on it.
            max_messages_per_subject: 1,
            max_age: age,
            // Publishers send no Msg-Id, and the smallest window costs the server least.
            duplicate_window: Duration::from_secs(1).min(if age.is_zero() {
                Duration::from_secs(1)
            } else {
                age
            }),
            allow_direct: true,
            metadata: self.environment.metadata(),
            ..Default::default()
        }
    }

    /// Doubles the byte limit of the stream that refused a message of `size` bytes, if the stream may grow and
    /// the server has the storage. Returns whether the stream has capacity now. After a refusal it does not ask
    /// again for a while.
    pub(super) async fn grow(&self, subject: &str, size: usize) -> bool {
        // One publisher at a time, so that the others find the stream already grown.
        let mut refused = self.refused_growth.lock().await;
        if refused.is_some_and(|at| at.elapsed() < RETRY_GROWTH_AFTER) {
            return false;
        }
        let name =
            if self.names.is_of_rows(subject) { self.names.rows_stream() } else { self.names.ids_stream() };
        match self.try_grow(&name, size as u64 + MESSAGE_OVERHEAD).await {
            Ok(Capacity::Grown(bytes)) => {
                tracing::info!(stream = name, bytes, "the stream was full and has grown");
                true
            }
            Ok(Capacity::Available) => {
                drop(refused);
                // The server may count bytes that this estimate does not.
                tokio::time::sleep(RETRY_PAUSE).await;
                true
            }
            Ok(Capacity::None) => false,
            Err(error) => {
                tracing::debug!(
                    stream = name,
                    error = full_cause(&error),
                    "a stream that is full could not grow"
                );
                *refused = Some(Instant::now());
                false
            }
        }
    }

    /// Doubles the limit once. An update replaces all settings and would undo a change that another process or
    /// an operator made meanwhile. So the settings are read just before, and the effect is read again.
    async fn try_grow(&self, name: &str, size: u64) -> Result<Capacity, Error> {
        let asked = Instant::now();
        let Some(mut info) = self.stream_info(name).await? else { return Ok(Capacity::None) };
        let bytes = limit_of(&info);
        // A limit that an operator set stays.
        let is_ours = info.config.metadata.get(GROWN).is_some_and(|grown| *grown == bytes.to_string());
        // Another process may already have let the stream grow.
        if is_ours && info.state.bytes + size <= bytes {
            return Ok(Capacity::Available);
        }
        let grown = (bytes * 2).min(GROWS_TO);
        if !is_ours || grown <= bytes || asked.elapsed() > FRESH {
            return Ok(Capacity::None);
        }
        give(&mut info.config, grown);
        let doing = format!("give stream `{name}` {grown} bytes");
        within(&doing, self.jetstream.update_stream(info.config)).await?.map_err(broker(doing))?;
        let found = self.stream_info(name).await?.map_or(0, |info| limit_of(&info));
        Ok(if found >= grown { Capacity::Grown(found) } else { Capacity::None })
    }

    /// Creates the quarantine stream. It is bounded, and its oldest messages are dropped first.
    async fn ensure_quarantine_stream(&self, limits: &StreamLimits) -> Result<(), Error> {
        let config = stream::Config {
            max_bytes: QUARANTINE_BYTES.min(limits.ids_bytes / QUARANTINE_PART) as i64,
            discard: DiscardPolicy::Old,
            discard_new_per_subject: false,
            max_messages_per_subject: -1,
            ..self.stream_config(self.names.aside_stream(), self.names.all_aside(), Duration::ZERO, limits)
        };
        self.ensure_stream(&config).await?.1.map_or(Ok(()), Err)
    }

    /// Creates both streams. If allowed, their limits are halved together until the server has storage for
    /// both.
    async fn ensure_streams(&self, limits: &StreamLimits) -> Result<(), Error> {
        let mut ids_bytes = limits.ids_bytes;
        let mut rows_bytes = limits.rows_bytes;
        loop {
            let mut ids =
                self.stream_config(self.names.ids_stream(), self.names.all_ids(), limits.ids_age, limits);
            let mut rows =
                self.stream_config(self.names.rows_stream(), self.names.all_rows(), limits.rows_age, limits);
            (ids.max_bytes, rows.max_bytes) = (ids_bytes as i64, rows_bytes as i64);
            if limits.is_flexible {
                give(&mut ids, ids_bytes);
                give(&mut rows, rows_bytes);
            }
            let (ids_made, mut refusal) = self.ensure_stream(&ids).await?;
            if refusal.is_none() {
                (_, refusal) = self.ensure_stream(&rows).await?;
            }
            let Some(refusal) = refusal else { return Ok(()) };
            let least = |bytes: u64| (bytes / 2).max(SMALLEST_STREAM.min(bytes));
            let smaller = (least(ids_bytes), least(rows_bytes));
            if !limits.is_flexible || smaller == (ids_bytes, rows_bytes) {
                return Err(refusal);
            }
            (ids_bytes, rows_bytes) = smaller;
            if ids_made {
                let doing = format!("give stream `{}` {ids_bytes} bytes", ids.name);
                give(&mut ids, ids_bytes);
                within(&doing, self.jetstream.update_stream(ids)).await?.map_err(broker(doing))?;
            }
        }
    }

    /// Returns whether the stream was created now, and the server's refusal if it lacks storage for it.
    async fn ensure_stream(&self, config: &stream::Config) -> Result<(bool, Option<Error>), Error> {
        if let Some(info) = self.stream_info(&config.name).await? {
            return self.check_stream(&info.config, config).map(|()| (false, None));
        }
        let doing = format!("create stream `{}` of {} bytes", config.name, config.max_bytes);
        match within(&doing, self.jetstream.create_stream(config.clone())).await? {
            Ok(_) => Ok((true, None)),
            Err(error) if lacks_storage(&error) => Ok((false, Some(broker(doing)(error)))),
            // Another process has created it first.
            Err(error) => match self.stream_info(&config.name).await? {
                Some(info) => self.check_stream(&info.config, config).map(|()| (false, None)),
                None => Err(broker(doing)(error)),
            },
        }
    }

    pub(super) async fn stream_info(&self, name: &str) -> Result<Option<stream::Info>, Error> {
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
        if self.stream_info(&self.bucket_stream()).await?.is_some() {
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

    /// Whether [`Self::setup`] was run for this pipeline.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`] when the streams belong to another environment; when NATS refuses or does
    /// not answer.
    pub async fn is_set_up(&self) -> Result<bool, Error> {
        // `setup` creates this stream last.
        let name = self.names.rows_stream();
        let Some(info) = self.stream_info(&name).await? else { return Ok(false) };
        self.environment.check_stream(&name, &info.config.metadata)?;
        Ok(true)
    }

    /// Whether streams of this pipeline exist, whatever the database of their tables: rows can be inserted into
    /// another one.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn has_streams(&self) -> Result<bool, Error> {
        Ok(self.stream_info(&self.names.rows_stream()).await?.is_some())
    }

    fn check_stream(&self, found: &stream::Config, wanted: &stream::Config) -> Result<(), Error> {
        self.environment.check_stream(&wanted.name, &found.metadata)?;
        check_settings(found, wanted)
    }
}

/// Gives a stream that may grow this byte limit.
fn give(config: &mut stream::Config, bytes: u64) {
    config.max_bytes = bytes as i64;
    config.metadata.insert(GROWN.to_owned(), bytes.to_string());
}

fn check_settings(found: &stream::Config, wanted: &stream::Config) -> Result<(), Error> {
    let settings = [
        (
            "max_msgs_per_subject",
            found.max_messages_per_subject.to_string(),
            wanted.max_messages_per_subject.to_string(),
        ),
        ("discard policy", format!("{:?}", found.discard), format!("{:?}", wanted.discard)),
        (
            "discard_new_per_subject",
            found.discard_new_per_subject.to_string(),
            wanted.discard_new_per_subject.to_string(),
        ),
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

fn lacks_storage(error: &context::CreateStreamError) -> bool {
    matches!(error.kind(), context::CreateStreamErrorKind::JetStream(refusal)
        if [ErrorCode::STORAGE_RESOURCES_EXCEEDED, ErrorCode::INSUFFICIENT_RESOURCES].contains(&refusal.error_code()))
}
