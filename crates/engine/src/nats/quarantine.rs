//! Messages that are not valid batches: stored in a stream of their own, counted, logged, and only then acked.
//!
//! No unreadable message is dropped, so that an operator can inspect it. Its batch is repaired like one that
//! never came.

use millstream::Id;
use millstream::envelope::{EnvelopeFault, decode_ids, is_end};
use millstream::names::RunName;

use crate::error::{Code, full_cause};
use crate::nats::broker::{Broker, Stray};
use crate::nats::delivery::{Delivery, REDELIVER_AFTER};

const NEWER: &str = "run a build of this pipeline that is as new as the one that wrote it; the message waits";
const COPIED: &str = "`nats stream view` shows the copy; rows are computed again automatically, ids come back with `produce` \
                    of the same input";
const NOT_COPIED: &str = "`setup` creates the quarantine stream; this user needs the right to publish to it";

/// Ends the delivery of an invalid message. It is acked only once a copy is stored. A later build's message, or
/// one whose copy cannot be stored, is redelivered after a pause.
pub async fn set_aside(broker: &Broker, delivery: Delivery, fault: &EnvelopeFault) {
    let subject = delivery.subject().to_owned();
    if let EnvelopeFault::NewerVersion { .. } = fault {
        tracing::error!(subject, %fault, hint = NEWER, code = %Code::BuildTooOld, "the message is from a newer build, and is redelivered after 60 s");
        return delivery.nak(REDELIVER_AFTER).await;
    }
    let (stream, sequence) = delivery.origin().unwrap_or_default();
    let stray = Stray { subject: &subject, stream: &stream, sequence, fault, payload: delivery.payload() };
    match broker.keep_aside(&stray).await {
        Ok(()) => {
            delivery.is_set_aside();
            let kept_in = broker.names().aside_stream();
            tracing::error!(subject, %fault, kept_in, hint = COPIED, code = %Code::MessageForeign, "the message is no batch, and is quarantined");
            delivery.ack().await;
        }
        Err(error) => {
            let error = full_cause(&error);
            tracing::error!(subject, %fault, error, hint = NOT_COPIED, code = %Code::MessageForeign, "the message is no batch, and could not be quarantined: it is redelivered after 60 s");
            delivery.nak(REDELIVER_AFTER).await;
        }
    }
}

/// Why these bytes are not the ids of this batch; `None` if they are, or if they are the end marker of an open
/// run.
pub(crate) fn fault_of_ids<I: Id>(run: &RunName, batch: u32, bytes: &[u8]) -> Option<EnvelopeFault> {
    match decode_ids::<I>(bytes) {
        Ok(read) if read.run == run.as_str() && read.batch == batch => None,
        Err(_) if is_end(bytes, run.as_str(), batch) => None,
        Ok(_) => Some(EnvelopeFault::Foreign { length: bytes.len() }),
        Err(fault) => Some(fault),
    }
}
