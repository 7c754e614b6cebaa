//! Finds the messages that hold rows of a pass, and publishes them to the sinks again.

use async_nats::jetstream::message::StreamMessage;
use bytes::Bytes;
use millstream::envelope::{Rows, decode_rows};
use millstream::names::PassId;

use super::{Broker, once};
use crate::error::{Error, broker};
use crate::model::moment::since_1970_ms;
use crate::nats::answer::within;
use crate::telemetry::trace::TraceContext;

/// A message of the rows stream.
#[derive(Debug, Clone)]
pub struct RowsMessage {
    /// The subject of the message.
    pub subject: String,
    /// The sequence of the message in the stream.
    pub sequence: u64,
    /// The time when NATS stored the message, by the server's clock, in milliseconds since 1970.
    pub at_ms: u64,
    payload: Bytes,
    trace: Option<TraceContext>,
}

impl From<StreamMessage> for RowsMessage {
    fn from(message: StreamMessage) -> Self {
        let at_ms = since_1970_ms(message.time);
        let StreamMessage { subject, sequence, payload, headers, .. } = message;
        let trace = TraceContext::of(Some(&headers));
        Self { subject: subject.to_string(), sequence, at_ms, payload, trace }
    }
}

impl Broker {
    /// The last message that holds rows of a pass.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn last_rows(&self, pass: &PassId) -> Result<Option<RowsMessage>, Error> {
        let found = self.last_message(self.names.rows_stream(), &self.names.pass_rows(pass)).await?;
        Ok(found.map(RowsMessage::from))
    }

    /// The messages that hold the rows of a batch: one, or its split messages. Empty if any of them is missing.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn rows_of_batch(&self, pass: &PassId, batch: u32) -> Result<Vec<RowsMessage>, Error> {
        let mut messages = Vec::new();
        let mut left = vec![self.names.rows_subject(pass, batch)];
        while let Some(subject) = left.pop() {
            let Some(message) = self.last_message(self.names.rows_stream(), &subject).await? else {
                return Ok(Vec::new());
            };
            match decode_rows(&message.payload) {
                Ok(Rows::Cut(cut)) => {
                    left.extend(cut.ranges().map(|places| self.names.part_subject(pass, batch, &places)));
                }
                Ok(Rows::Batch(_)) | Err(_) => messages.push(message.into()),
            }
        }
        Ok(messages)
    }

    /// Moves a message to the end of the stream, so that a sink receives it whatever happened to it before. If
    /// the process is killed between the two steps, the message is gone and its batch has to be computed again.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn hand_out_again(&self, message: RowsMessage) -> Result<(), Error> {
        let RowsMessage { subject, payload, trace, .. } = message;
        let doing = format!("deliver `{subject}` again");
        self.purge_rows(subject.clone()).await?;
        let again = once(payload, trace);
        let again = async { self.jetstream.send_publish(subject, again).await?.await };
        within(&doing, again).await?.map_err(broker(doing))?;
        Ok(())
    }
}
