//! Messages that hold rows of a pass: found one by one, and handed out to sinks once more.

use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use bytes::Bytes;
use futures_util::StreamExt;
use millstream::envelope::{Rows, decode_rows};
use millstream::names::RunName;

use super::{Broker, within};
use crate::error::{Error, broker};
use crate::moment::since_1970_ms;

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
}

impl From<StreamMessage> for RowsMessage {
    fn from(message: StreamMessage) -> Self {
        let at_ms = since_1970_ms(message.time);
        let StreamMessage { subject, sequence, payload, .. } = message;
        Self { subject: subject.to_string(), sequence, at_ms, payload }
    }
}

impl Broker {
    /// The last message that holds rows of a pass.
    ///
    /// # Errors
    /// The broker's.
    pub async fn last_rows(&self, run: &RunName, pass: u32) -> Result<Option<RowsMessage>, Error> {
        let found = self.last_message(self.names.rows_stream(), &self.names.pass_rows(run, pass)).await?;
        Ok(found.map(RowsMessage::from))
    }

    /// The messages that hold the rows of a batch: one, or its parts. None where not all of them are there.
    ///
    /// # Errors
    /// The broker's.
    pub async fn rows_of_batch(
        &self,
        run: &RunName,
        pass: u32,
        batch: u32,
    ) -> Result<Vec<RowsMessage>, Error> {
        let stream = self.names.rows_stream();
        let subject = self.names.rows_subject(run, pass, batch);
        let Some(first) = self.last_message(stream.clone(), &subject).await? else { return Ok(Vec::new()) };
        let wanted = match decode_rows(&first.payload) {
            Ok(Rows::Cut(cut)) => cut.parts.len(),
            Ok(Rows::Batch(_)) | Err(_) => return Ok(vec![first.into()]),
        };
        let mut parts = Vec::new();
        for subject in self.rows_subjects(self.names.batch_parts(run, pass, batch)).await? {
            parts.extend(self.last_message(stream.clone(), &subject).await?.map(RowsMessage::from));
        }
        Ok(if parts.len() < wanted { Vec::new() } else { parts })
    }

    /// Puts a message behind all others, so that a sink draws it whatever became of it before. A kill between the two steps
    /// leaves none: its batch is then one that has to be computed.
    ///
    /// # Errors
    /// The broker's.
    pub async fn hand_out_again(&self, message: RowsMessage) -> Result<(), Error> {
        let RowsMessage { subject, payload, .. } = message;
        let doing = format!("hand out `{subject}` again");
        self.purge_rows(subject.clone()).await?;
        let again = PublishMessage::build().payload(payload).expected_last_subject_sequence(0);
        let again = async { self.jetstream.send_publish(subject, again).await?.await };
        within(&doing, again).await?.map_err(broker(doing))?;
        Ok(())
    }

    /// Subjects of the rows stream that match.
    async fn rows_subjects(&self, filter: String) -> Result<Vec<String>, Error> {
        let doing = format!("list `{filter}`");
        let stream = self.names.rows_stream();
        let stream =
            within(&doing, self.jetstream.get_stream_no_info(stream)).await?.map_err(broker(&doing))?;
        let mut subjects =
            within(&doing, stream.info_with_subjects(filter)).await?.map_err(broker(&doing))?;
        let mut found = Vec::new();
        while let Some(subject) = within(&doing, subjects.next()).await? {
            found.push(subject.map_err(broker(&doing))?.0);
        }
        Ok(found)
    }
}
