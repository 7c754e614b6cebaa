//! Single messages of the streams: read, removed, counted, set aside. A stream that does not exist holds none.

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

/// The server forgets a consumer that only counts after this long.
const COUNTED: Duration = Duration::from_secs(10);

/// A message that is no batch of ours, and where it came from.
#[derive(Debug, Clone, Copy)]
pub struct Stray<'a> {
    /// Its subject.
    pub subject: &'a str,
    /// The stream that held it.
    pub stream: &'a str,
    /// Its sequence there.
    pub sequence: u64,
    /// Why it is none.
    pub fault: &'a EnvelopeFault,
    /// Its bytes.
    pub payload: &'a Bytes,
}

impl Broker {
    /// Removes the ids of a cancelled pass, and the consumer that delivers them; how many batches they were. The ids of a run
    /// stay for its other passes.
    ///
    /// # Errors
    /// The broker's. It can be called again at any time.
    pub(crate) async fn free_ids(&self, run: &RunName, pass: &PassRecord) -> Result<u64, Error> {
        self.remove_work_consumer(&run.pass(pass.pass)).await?;
        let names = self.names();
        match (&pass.covers, pass.pass) {
            (Some(_), _) => self.purge_ids(names.replay_ids(&run.pass(pass.pass))).await,
            (None, 1) => self.purge_ids(names.run_ids(run)).await,
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

    /// The number of the batch of a run that was stored last; where an open run has ended, that of its end.
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

    /// Removes every message whose subject matches from the rows stream.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_rows(&self, filter: String) -> Result<u64, Error> {
        self.purge(self.names.rows_stream(), filter).await
    }

    /// Messages and bytes of the rows stream.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn rows_stream_size(&self) -> Result<(u64, u64), Error> {
        let info = self.stream_info(&self.names.rows_stream()).await?;
        Ok(info.map_or((0, 0), |info| (info.state.messages, info.state.bytes)))
    }

    /// Once the rows stream is more than half full, removes what sinks have acked: without it, a run whose rows are more
    /// than the stream holds would never end. What a worker stores again afterwards, sinks find stored in ClickHouse.
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
        let doing = format!("make room in stream `{name}`");
        let handle = self.jetstream.get_stream_no_info(name).await.map_err(broker(&doing))?;
        // Up to, and without, this sequence.
        let purge = handle.purge().sequence(acked + 1).into_future();
        let answer = tokio::time::timeout(ANSWER_WITHIN * 6, purge)
            .await
            .map_err(|_| Error::BrokerSilent { doing: doing.clone(), after: ANSWER_WITHIN * 6 })?;
        let purged = answer.map_err(broker(doing))?.purged;
        tracing::debug!(purged, acked, "made room in the rows stream");
        Ok(())
    }

    /// Removes the rows of one batch, or its cut and its parts, from the rows stream, so that they can be stored anew.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_batch(&self, pass: &PassId, batch: u32) -> Result<(), Error> {
        // Parts first: a cut without them has them computed again; nobody would look for parts without a cut.
        self.purge_rows(self.names.batch_parts(pass, batch)).await?;
        self.purge_rows(self.names.rows_subject(pass, batch)).await.map(drop)
    }

    /// Removes what the ids stream holds under this subject.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_ids(&self, subject: String) -> Result<u64, Error> {
        self.purge(self.names.ids_stream(), subject).await
    }

    /// Removes what was set aside under this subject.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn purge_aside(&self, subject: String) -> Result<u64, Error> {
        self.purge(self.names.aside_stream(), subject).await
    }

    /// Removes what there is now; what is published meanwhile stays.
    async fn purge(&self, stream: String, filter: String) -> Result<u64, Error> {
        let doing = format!("purge `{filter}` from stream `{stream}`");
        let Some(info) = self.stream_info(&stream).await? else { return Ok(0) };
        let handle = self.jetstream.get_stream_no_info(&stream).await.map_err(broker(&doing))?;
        // Removing a hundred thousand messages takes the server longer than an ordinary answer.
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
                let seen = format!("message {} is there still", message.sequence);
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

    /// How many batches of a run the ids stream holds, and the end of an open one.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn count_ids(&self, run: &RunName) -> Result<u64, Error> {
        self.count(self.names.ids_stream(), self.names.run_ids(run)).await
    }

    /// How many messages of a run's ids were set aside.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn count_aside(&self, run: &RunName) -> Result<u64, Error> {
        let filter = self.names.aside_subject(&self.names.run_ids(run));
        self.count(self.names.aside_stream(), filter).await
    }

    /// Counts without listing: what a new consumer would have to deliver, which the server takes from its index.
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
                    tracing::debug!(consumer = info.name, "left for the server to forget");
                }
                Ok(info.num_pending)
            }
            Err(error) => match error.kind() {
                ConsumerErrorKind::JetStream(refusal) if is_no_stream(&refusal) => Ok(0),
                _ => Err(broker(doing)(error)),
            },
        }
    }

    /// Keeps a copy of a message that is no batch, with all that is known of it.
    ///
    /// # Errors
    /// The broker's: nothing is known to be kept then.
    pub async fn keep_aside(&self, stray: &Stray<'_>) -> Result<(), Error> {
        let subject = self.names.aside_subject(stray.subject);
        let doing = format!("set a message aside as `{subject}`");
        let message = PublishMessage::build()
            .payload(stray.payload.clone())
            // Delivered again before its ack arrived, it is kept once.
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

    /// Messages that were set aside, of all runs.
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
