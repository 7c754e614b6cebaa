//! Messages that are no batch of ours: kept in a stream of their own, counted, told, and only then acked.
//!
//! Nothing is dropped for being unreadable: a person can look at what came. The batch that it should have been is
//! repaired like one that never came.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use millstream::Id;
use millstream::envelope::{EnvelopeFault, decode_ids, is_end};
use millstream::names::RunName;

use crate::error::{Code, full_cause};
use crate::nats::broker::{Broker, Stray};
use crate::nats::delivery::Delivery;

/// What cannot be set aside, or is of a later build, is handed back for this long.
const SET_BACK: Duration = Duration::from_secs(60);

const NEWER: &str = "run a build of this pipeline that is as new as the one that wrote it; the message waits";
const KEPT: &str = "`nats stream view` shows the copy; rows are computed again by themselves, ids come back with `produce` \
                    of the same input";
const NOT_KEPT: &str = "`setup` makes the stream for it; this user needs the right to publish to it";

/// Ends the delivery of a message that cannot be read. It is acked only once a copy is stored; a later build's message,
/// or one of which no copy can be made, is handed back.
pub async fn set_aside(broker: &Broker, delivery: Delivery, fault: &EnvelopeFault, counted: &AtomicU64) {
    let subject = delivery.subject().to_owned();
    if let EnvelopeFault::NewerVersion { .. } = fault {
        tracing::error!(subject, %fault, hint = NEWER, code = %Code::BuildTooOld, "the message is set back for 60 s");
        return delivery.nak(SET_BACK).await;
    }
    let (stream, sequence) = delivery.origin().unwrap_or_default();
    let stray = Stray { subject: &subject, stream: &stream, sequence, fault, payload: delivery.payload() };
    match broker.keep_aside(&stray).await {
        Ok(()) => {
            counted.fetch_add(1, Ordering::Relaxed);
            let kept_in = broker.names().aside_stream();
            tracing::error!(subject, %fault, kept_in, hint = KEPT, code = %Code::MessageForeign, "the message is no batch, and is set aside");
            delivery.ack().await;
        }
        Err(error) => {
            let error = full_cause(&error);
            tracing::error!(subject, %fault, error, hint = NOT_KEPT, code = %Code::MessageForeign, "the message is no batch, and is set back for 60 s");
            delivery.nak(SET_BACK).await;
        }
    }
}

/// Why these bytes are not the ids of this batch; `None` when they are, or say that an open run ends before it.
pub(crate) fn fault_of_ids<I: Id>(run: &RunName, batch: u32, bytes: &[u8]) -> Option<EnvelopeFault> {
    match decode_ids::<I>(bytes) {
        Ok(read) if read.run == run.as_str() && read.batch == batch => None,
        Err(_) if is_end(bytes, run.as_str(), batch) => None,
        Ok(_) => Some(EnvelopeFault::Foreign { length: bytes.len() }),
        Err(fault) => Some(fault),
    }
}
