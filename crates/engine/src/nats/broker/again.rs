//! Messages that hold rows of a pass: found one by one, and handed out to sinks once more.

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
    /// Its subject.
    pub subject: String,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// When it was stored, by the server's clock, in milliseconds since 1970.
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

    /// The messages that hold the rows of a batch: one, or its parts. None where not all of them are there.
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

    /// Puts a message behind all others, so that a sink draws it whatever became of it before. A kill between the two steps
    /// leaves none: its batch is then one that has to be computed.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn hand_out_again(&self, message: RowsMessage) -> Result<(), Error> {
        let RowsMessage { subject, payload, trace, .. } = message;
        let doing = format!("hand out `{subject}` again");
        self.purge_rows(subject.clone()).await?;
        let again = once(payload, trace);
        let again = async { self.jetstream.send_publish(subject, again).await?.await };
        within(&doing, again).await?.map_err(broker(doing))?;
        Ok(())
    }
}
