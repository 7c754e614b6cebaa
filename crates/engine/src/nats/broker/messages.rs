//! Single messages of the streams: read, removed, counted, quarantined. A missing stream counts as an empty
//! one.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::{ConsumerErrorKind, LastRawMessageErrorKind, PurgeErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use millstream::envelope::EnvelopeFault;
use millstream::names::{PassId, RunName, batch_of};

use super::Broker;
use crate::error::{Error, broker};
use crate::model::moment::now_ms;
use crate::model::record::PassRecord;
use crate::nats::answer::{ANSWER_WITHIN, within};

/// How long the server keeps an unused consumer that only counts.
const COUNTED: Duration = Duration::from_secs(10);

/// A message that is not a valid batch, and where it came from.
#[derive(Debug, Clone, Copy)]
pub struct Stray<'a> {
    /// The subject of the message.
    pub subject: &'a str,
    /// The stream that held the message.
    pub stream: &'a str,
    /// The sequence of the message in its stream.
    pub sequence: u64,
    /// Why the message is not a valid batch.
    pub fault: &'a EnvelopeFault,
    /// The bytes of the message.
    pub payload: &'a Bytes,
}

impl Broker {
    /// Removes the ids of a cancelled pass and the consumer that delivers them, and returns the number of
    /// batches. The ids stay if other passes of the run need them.
    ///
    /// # Errors
    /// When NATS refuses or does not answer. The call can be repeated at any time.
    pub(crate) async fn free_ids(&self, pass: &PassRecord) -> Result<u64, Error> {
        let id = pass.id();
        self.remove_work_consumer(&id).await?;
        match (&pass.covers, pass.pass) {
            (Some(_), _) => self.purge_ids(self.names().replay_ids(&id)).await,
            (None, 1) => self.purge_ids(self.names().run_ids(&id.run)).await,
            (None, _) => Ok(0),
        }
    }
}

impl Broker {
    /// The message under a subject of the ids stream, with its sequence.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn ids_message(&self, subject: &str) -> Result<Option<(u64, Bytes)>, Error> {
        let found = self.last_message(self.names.ids_stream(), subject).await?;
        Ok(found.map(|message| (message.sequence, message.payload)))
    }

    /// The highest batch number of a run in the ids stream. For an open run that has ended, it is the number of
    /// its end marker.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn last_batch(&self, run: &RunName) -> Result<Option<u32>, Error> {
        let found = self.last_message(self.names.ids_stream(), &self.names.run_ids(run)).await?;
        Ok(found.and_then(|message| batch_of(&message.subject)))
    }

    /// The message under a subject of the rows stream.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn rows_message(&self, subject: &str) -> Result<Option<Bytes>, Error> {
        let found = self.last_message(self.names.rows_stream(), subject).await?;
        Ok(found.map(|message| message.payload))
    }

    pub(super) async fn last_message(
        &self,
        stream: String,
        subject: &str,
    ) -> Result<Option<StreamMessage>, Error> {
        let doing = format!("read message `{subject}`");
        let stream = self.jetstream.get_stream_no_info(stream).await.map_err(broker(&doing))?;
        match within(&doing, stream.get_last_raw_message_by_subject(subject)).await? {
            Ok(message) => Ok(Some(message)),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                LastRawMessageErrorKind::JetStream(refusal) if is_no_stream(&refusal) => Ok(None),
                _ => Err(broker(doing)(error)),
            },
        }
    }

    /// Removes every message of the rows stream whose subject matches, and returns how many.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_rows(&self, filter: String) -> Result<u64, Error> {
        self.purge(self.names.rows_stream(), filter).await
    }

    /// The number of messages in the rows stream and their bytes.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn rows_stream_size(&self) -> Result<(u64, u64), Error> {
        let info = self.stream_info(&self.names.rows_stream()).await?;
        Ok(info.map_or((0, 0), |info| (info.state.messages, info.state.bytes)))
    }

    /// Removes messages that sinks have acked, once the rows stream is more than half full. Otherwise a run
    /// with more rows than the stream holds would never end. If a worker stores such a message again, the sink
    /// finds its rows in ClickHouse.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn make_room(&self) -> Result<(), Error> {
        let name = self.names.rows_stream();
        let Some(info) = self.stream_info(&name).await? else { return Ok(()) };
        let limit = u64::try_from(info.config.max_bytes).unwrap_or(0);
        if limit == 0 || info.state.bytes < limit / 2 {
            return Ok(());
        }
        let Some(sinks) = self.sink_progress().await? else { return Ok(()) };
        let acked = sinks.ack_floor.stream_sequence;
        if acked < info.state.first_sequence {
            return Ok(());
        }
        let doing = format!("purge acked rows from stream `{name}`");
        let handle = self.jetstream.get_stream_no_info(name).await.map_err(broker(&doing))?;
        // Purges up to this sequence, without it.
        let purge = handle.purge().sequence(acked + 1).into_future();
        let answer = tokio::time::timeout(ANSWER_WITHIN * 6, purge)
            .await
            .map_err(|_| Error::BrokerSilent { doing: doing.clone(), after: ANSWER_WITHIN * 6 })?;
        let purged = answer.map_err(broker(doing))?.purged;
        tracing::debug!(purged, acked, "purged acked rows from the rows stream");
        Ok(())
    }

    /// Removes the rows of one batch, or its manifest and split messages, from the rows stream, so that they
    /// can be stored again.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_batch(&self, pass: &PassId, batch: u32) -> Result<(), Error> {
        // Split messages first: a manifest without them is computed again, but nothing looks for split messages
        // without a manifest.
        self.purge_rows(self.names.batch_parts(pass, batch)).await?;
        self.purge_rows(self.names.rows_subject(pass, batch)).await.map(drop)
    }

    /// Removes the messages under this subject from the ids stream.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_ids(&self, subject: String) -> Result<u64, Error> {
        self.purge(self.names.ids_stream(), subject).await
    }

    /// Removes the messages under this subject from the quarantine stream.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_aside(&self, subject: String) -> Result<u64, Error> {
        self.purge(self.names.aside_stream(), subject).await
    }

    /// Removes the messages that exist now; later ones stay.
    async fn purge(&self, stream: String, filter: String) -> Result<u64, Error> {
        let doing = format!("purge `{filter}` from stream `{stream}`");
        let Some(info) = self.stream_info(&stream).await? else { return Ok(0) };
        let handle = self.jetstream.get_stream_no_info(&stream).await.map_err(broker(&doing))?;
        // The server takes longer than an ordinary request to remove a hundred thousand messages.
        let purge = handle.purge().filter(&filter).into_future();
        let answer = tokio::time::timeout(ANSWER_WITHIN * 6, purge)
            .await
            .map_err(|_| Error::BrokerSilent { doing: doing.clone(), after: ANSWER_WITHIN * 6 })?;
        let purged = match answer {
            Ok(answer) => answer.purged,
            Err(error) => match error.kind() {
                PurgeErrorKind::JetStream(refusal) if is_no_stream(&refusal) => return Ok(0),
                _ => return Err(broker(doing)(error)),
            },
        };
        // **success-is-looked-at**
        match within(&doing, handle.get_first_raw_message_by_subject(&filter, 1)).await? {
            Ok(message) if message.sequence <= info.state.last_sequence => {
                let seen = format!("message {} still exists", message.sequence);
                Err(Error::NoEffect { doing, seen })
            }
            Ok(_) => Ok(purged),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(purged),
                LastRawMessageErrorKind::JetStream(refusal) if is_no_stream(&refusal) => Ok(purged),
                _ => Err(broker(doing)(error)),
            },
        }
    }

    /// The number of a run's messages in the ids stream: its batches, and the end marker of an open run.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn count_ids(&self, run: &RunName) -> Result<u64, Error> {
        self.count(self.names.ids_stream(), self.names.run_ids(run)).await
    }

    /// The number of a run's ids messages in quarantine.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn count_aside(&self, run: &RunName) -> Result<u64, Error> {
        let filter = self.names.aside_subject(&self.names.run_ids(run));
        self.count(self.names.aside_stream(), filter).await
    }

    /// Counts without listing: the server's index knows what a new consumer would have to deliver.
    async fn count(&self, stream: String, filter: String) -> Result<u64, Error> {
        let doing = format!("count `{filter}` in stream `{stream}`");
        let config = pull::Config {
            filter_subject: filter,
            ack_policy: AckPolicy::None,
            deliver_policy: DeliverPolicy::All,
            memory_storage: true,
            inactive_threshold: COUNTED,
            ..Default::default()
        };
        let counting = self.jetstream.create_consumer_on_stream(config, stream.clone());
        match within(&doing, counting).await? {
            Ok(consumer) => {
                let info = consumer.cached_info();
                let done = self.jetstream.delete_consumer_from_stream(&info.name, &stream);
                if !matches!(within(&doing, done).await, Ok(Ok(_))) {
                    tracing::debug!(
                        consumer = info.name,
                        "temporary consumer not deleted; the server will expire it"
                    );
                }
                Ok(info.num_pending)
            }
            Err(error) => match error.kind() {
                ConsumerErrorKind::JetStream(refusal) if is_no_stream(&refusal) => Ok(0),
                _ => Err(broker(doing)(error)),
            },
        }
    }

    /// Stores a copy of an invalid message in the quarantine stream, with all that is known about it.
    ///
    /// # Errors
    /// When NATS refuses or does not answer; then the copy may not exist.
    pub async fn keep_aside(&self, stray: &Stray<'_>) -> Result<(), Error> {
        let subject = self.names.aside_subject(stray.subject);
        let doing = format!("quarantine a message as `{subject}`");
        let message = PublishMessage::build()
            .payload(stray.payload.clone())
            // The server drops the duplicate when the message is redelivered before its ack arrived.
            .message_id(format!("{}-{}", stray.stream, stray.sequence))
            .expected_stream(self.names.aside_stream())
            .header("Millstream-Subject", stray.subject)
            .header("Millstream-Stream", stray.stream)
            .header("Millstream-Sequence", stray.sequence.to_string())
            .header("Millstream-Fault", stray.fault.to_string())
            .header("Millstream-By", self.role.as_str())
            .header("Millstream-At-Ms", now_ms().to_string());
        let kept = async { self.jetstream.send_publish(subject, message).await?.await };
        within(&doing, kept).await?.map_err(broker(doing))?;
        Ok(())
    }

    /// The number of quarantined messages of all runs.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn strays(&self) -> Result<u64, Error> {
        Ok(self.stream_info(&self.names.aside_stream()).await?.map_or(0, |info| info.state.messages))
    }
}

fn is_no_stream(refusal: &jetstream::Error) -> bool {
    refusal.error_code() == ErrorCode::STREAM_NOT_FOUND
}
