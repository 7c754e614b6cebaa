//! The durable consumers: one for each pass, shared by all workers, and one that all sinks share.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{ErrorCode, context};
use futures_util::StreamExt;
use millstream::names::PassId;

use super::Broker;
use crate::error::{Error, broker};
use crate::model::record::{PassRecord, PassState};
use crate::model::rows::Drawn;
use crate::nats::answer::within;

/// The `ack_wait` that is set for a moment so that every open delivery is redelivered.
const RECLAIM: Duration = Duration::from_millis(500);

/// How long a rebuild's consumer may go without a pull before the server deletes it.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// How long a worker may go without a progress report before the server redelivers its batch.
pub const WORK_ACK_WAIT: Duration = Duration::from_secs(60);
/// How long a sink may go without a progress report before the server redelivers its batch.
pub const SINK_ACK_WAIT: Duration = Duration::from_secs(120);

/// The most deliveries that may be open on one consumer, over all hosts: far above what the permits of a fleet
/// allow.
const MAX_ACK_PENDING: i64 = 100_000;

/// The state of a pass's worker consumer. Two equal values mean that nothing happened in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Batches that were not delivered yet.
    pub pending: u64,
    /// Batches that were delivered and not acked yet.
    pub open: usize,
    /// The sequence of the last delivery.
    pub delivered: u64,
    /// The sequence below which every message is acked.
    pub acked: u64,
}

impl Broker {
    /// The state of the worker consumers of all passes, by consumer name: one request for some hundreds of
    /// consumers.
    ///
    /// # Errors
    /// When NATS refuses or does not answer. A cluster may leave some consumers out.
    pub async fn work_standings(&self) -> Result<HashMap<String, Standing>, Error> {
        let doing = format!("list the consumers of stream `{}`", self.names.ids_stream());
        let stream = self.jetstream.get_stream_no_info(self.names.ids_stream());
        let stream = within(&doing, stream).await?.map_err(broker(&doing))?;
        let mut consumers = stream.consumers();
        let mut standings = HashMap::new();
        while let Some(info) = within(&doing, consumers.next()).await? {
            let info = info.map_err(broker(&doing))?;
            let standing = Standing {
                pending: info.num_pending,
                open: info.num_ack_pending,
                delivered: info.delivered.consumer_sequence,
                acked: info.ack_floor.consumer_sequence,
            };
            standings.insert(info.name, standing);
        }
        Ok(standings)
    }

    /// Creates the durable consumer that all sinks share, unless it exists.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn ensure_sink_consumer(&self) -> Result<(), Error> {
        let config = pull::Config {
            durable_name: Some(self.names.sink_consumer()),
            filter_subject: self.names.all_rows(),
            ack_wait: SINK_ACK_WAIT,
            ..durable()
        };
        self.ensure_consumer(&self.names.rows_stream(), config).await
    }

    /// Creates the durable consumer from which all workers pull a pass, unless it exists.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn ensure_work_consumer(&self, pass: &PassId) -> Result<(), Error> {
        let config = pull::Config { filter_subject: self.names.run_ids(&pass.run), ..self.work_config(pass) };
        self.ensure_consumer(&self.names.ids_stream(), config).await
    }

    /// Creates the durable consumer from which all workers pull a partial pass (some ids of its run), unless it
    /// exists.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn ensure_replay_consumer(&self, pass: &PassId) -> Result<(), Error> {
        let filter_subject = self.names.replay_ids(pass);
        let config = pull::Config { filter_subject, ..self.work_config(pass) };
        self.ensure_consumer(&self.names.ids_stream(), config).await
    }

    /// Replaces the durable consumer of a pass by one for just these batches, or for the whole run.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn replace_work_consumer(&self, pass: &PassId, batches: Option<&[u32]>) -> Result<(), Error> {
        self.remove_work_consumer(pass).await?;
        let Some(batches) = batches else { return self.ensure_work_consumer(pass).await };
        let filter_subjects = batches.iter().map(|batch| self.names.ids_subject(&pass.run, *batch)).collect();
        let config = pull::Config { filter_subjects, ..self.work_config(pass) };
        self.ensure_consumer(&self.names.ids_stream(), config).await
    }

    fn work_config(&self, pass: &PassId) -> pull::Config {
        pull::Config {
            durable_name: Some(self.names.work_consumer(pass)),
            ack_wait: WORK_ACK_WAIT,
            deliver_policy: DeliverPolicy::All,
            ..durable()
        }
    }

    /// Makes the server redeliver, now instead of after `ack_wait`, every open delivery of the sinks' consumer
    /// and of these passes. The caller must know that the processes which held them are gone.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn reclaim(&self, passes: &[PassRecord]) -> Result<(), Error> {
        let mut consumers = vec![(self.names.rows_stream(), self.names.sink_consumer())];
        for pass in passes.iter().filter(|pass| pass.state == PassState::Running) {
            consumers.push((self.names.ids_stream(), self.names.work_consumer(&pass.id())));
        }
        let shortened = self.shorten(&consumers).await;
        if !matches!(shortened, Ok(0)) {
            // The server checks for overdue deliveries once per ack_wait.
            tokio::time::sleep(RECLAIM * 2).await;
        }
        // Restored whatever the outcome, and for consumers that an earlier process, killed in this function,
        // left short.
        for (stream, name) in &consumers {
            if let Some(info) = self.consumer_info(stream, name).await? {
                self.keep_ack_wait(stream, &info).await?;
            }
        }
        shortened.map(drop)
    }

    /// Shortens the `ack_wait` of those of these consumers that have open deliveries, and returns how many.
    async fn shorten(&self, consumers: &[(String, String)]) -> Result<usize, Error> {
        let mut shortened = 0;
        for (stream, name) in consumers {
            if let Some(info) = self.consumer_info(stream, name).await?
                && info.num_ack_pending > 0
            {
                self.set_ack_wait(stream, &info, RECLAIM).await?;
                shortened += 1;
            }
        }
        Ok(shortened)
    }

    /// Restores the `ack_wait` of a durable consumer that a process killed in [`Self::reclaim`] left short;
    /// otherwise batches would be redelivered while they are computed. A value that an operator chose stays.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub(crate) async fn keep_ack_wait(&self, stream: &str, info: &consumer::Info) -> Result<(), Error> {
        let wanted = if stream == self.names.ids_stream() { WORK_ACK_WAIT } else { SINK_ACK_WAIT };
        if info.config.ack_wait != RECLAIM {
            return Ok(());
        }
        tracing::warn!(
            consumer = info.name,
            found_ms = info.config.ack_wait.as_millis() as u64,
            wanted_s = wanted.as_secs(),
            "restored the consumer's ack_wait, which a killed process had left short"
        );
        self.set_ack_wait(stream, info, wanted).await
    }

    async fn set_ack_wait(&self, stream: &str, info: &consumer::Info, wanted: Duration) -> Result<(), Error> {
        let before = info.config.ack_wait;
        let config = consumer::Config { ack_wait: wanted, ..info.config.clone() };
        let name = config.durable_name.clone().unwrap_or_default();
        let doing = format!("change consumer `{name}` on stream `{stream}`");
        within(&doing, self.jetstream.update_consumer_on_stream(config, stream))
            .await?
            .map_err(broker(&doing))?;
        match self.consumer_info(stream, &name).await? {
            Some(info) if info.config.ack_wait == before && before != wanted => {
                let seen = format!("its ack_wait is still {} ms", before.as_millis());
                Err(Error::NoEffect { doing, seen })
            }
            // Another process has removed the consumer meanwhile, or set another value.
            _ => Ok(()),
        }
    }

    async fn ensure_consumer(&self, stream: &str, config: pull::Config) -> Result<(), Error> {
        let name = config.durable_name.clone().unwrap_or_default();
        if let Some(info) = self.consumer_info(stream, &name).await? {
            // Boxed because it is seldom needed and a consumer's description is large.
            return Box::pin(self.keep_ack_wait(stream, &info)).await;
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
                // Without its stream a consumer does not exist either.
                context::ConsumerInfoErrorKind::NotFound | context::ConsumerInfoErrorKind::StreamNotFound => {
                    Ok(None)
                }
                context::ConsumerInfoErrorKind::JetStream(refusal)
                    if refusal.error_code() == ErrorCode::CONSUMER_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(broker(doing)(error)),
            },
        }
    }

    /// The state of a pass's worker consumer; `None` if it does not exist.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn work_progress(&self, pass: &PassId) -> Result<Option<consumer::Info>, Error> {
        self.consumer_info(&self.names.ids_stream(), &self.names.work_consumer(pass)).await
    }

    /// The state of the consumer that all sinks share.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn sink_progress(&self) -> Result<Option<consumer::Info>, Error> {
        self.consumer_info(&self.names.rows_stream(), &self.names.sink_consumer()).await
    }

    /// The consumer to pull a pass's batches from; `None` when it does not exist.
    pub(crate) async fn work_consumer(&self, pass: &PassId) -> Result<Option<PullConsumer>, Error> {
        self.pull_consumer(self.names.ids_stream(), self.names.work_consumer(pass)).await
    }

    /// The consumer to pull rows from. If the shared one was deleted, it is created again and delivers all that
    /// the stream holds.
    pub(crate) async fn drawn_consumer(&self, drawn: &Drawn) -> Result<Option<PullConsumer>, Error> {
        if *drawn == Drawn::Shared {
            self.ensure_sink_consumer().await?;
        }
        self.pull_consumer(self.names.rows_stream(), self.drawn_consumer_name(drawn)).await
    }

    pub(crate) fn drawn_consumer_name(&self, drawn: &Drawn) -> String {
        match drawn {
            Drawn::Shared => self.names.sink_consumer(),
            Drawn::Pass(pass) => self.names.rebuild_consumer(pass),
        }
    }

    /// Creates the consumer that delivers all rows of a pass in the rows stream. An existing one is replaced,
    /// because what it has delivered may have been lost since.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn make_rebuild_consumer(&self, pass: &PassId) -> Result<(), Error> {
        self.remove_rebuild_consumer(pass).await?;
        let config = pull::Config {
            durable_name: Some(self.names.rebuild_consumer(pass)),
            filter_subject: self.names.pass_rows(pass),
            ack_wait: SINK_ACK_WAIT,
            // Deletes the consumer of a rebuild that was killed.
            inactive_threshold: FORGOTTEN_AFTER,
            ..durable()
        };
        self.ensure_consumer(&self.names.rows_stream(), config).await
    }

    /// The state of a rebuild's consumer; `None` if it does not exist.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn rebuild_progress(&self, pass: &PassId) -> Result<Option<consumer::Info>, Error> {
        self.consumer_info(&self.names.rows_stream(), &self.names.rebuild_consumer(pass)).await
    }

    /// Removes the consumer of a rebuild.
    ///
    /// # Errors
    /// When NATS refuses or does not answer. A consumer that is already gone is no error.
    pub async fn remove_rebuild_consumer(&self, pass: &PassId) -> Result<(), Error> {
        self.remove_consumer(self.names.rows_stream(), self.names.rebuild_consumer(pass)).await
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
    /// When NATS refuses or does not answer. A consumer that is already gone is no error.
    pub async fn remove_work_consumer(&self, pass: &PassId) -> Result<(), Error> {
        self.remove_consumer(self.names.ids_stream(), self.names.work_consumer(pass)).await
    }

    async fn remove_consumer(&self, stream: String, name: String) -> Result<(), Error> {
        let Some(before) = self.consumer_info(&stream, &name).await? else { return Ok(()) };
        let doing = format!("remove consumer `{name}` from stream `{stream}`");
        match within(&doing, self.jetstream.delete_consumer_from_stream(&name, &stream)).await? {
            Ok(_) => {}
            Err(error) => match error.kind() {
                // Another process has removed it first.
                ConsumerErrorKind::JetStream(refusal)
                    if refusal.error_code() == ErrorCode::CONSUMER_NOT_FOUND => {}
                _ => return Err(broker(doing)(error)),
            },
        }
        match self.consumer_info(&stream, &name).await? {
            // Another consumer of this name may have been created since.
            Some(info) if info.created == before.created => {
                Err(Error::NoEffect { doing, seen: "it still exists".into() })
            }
            _ => Ok(()),
        }
    }
}

/// The settings that all durable consumers share.
fn durable() -> pull::Config {
    pull::Config {
        ack_policy: AckPolicy::Explicit,
        // Millstream handles poison messages itself: at a delivery limit the server would drop the batch
        // silently.
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        // No backoff list, because it would replace ack_wait. No inactive threshold, because it deletes even
        // durables; only a rebuild's consumer has one.
        ..Default::default()
    }
}
