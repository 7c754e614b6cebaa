//! One arrival of a batch: payload, acker and permit in one value that is ended exactly once; and the ticker
//! that reports progress for all of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::{AckKind, Message};
use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::nats::broker::Broker;
use crate::stop::Stop;
use crate::telemetry::labels::{End, Stage};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::TraceContext;

/// A message that cannot be processed now, and for which another host may be better, is redelivered after this long.
pub(crate) const REDELIVER_AFTER: Duration = Duration::from_secs(60);
/// Interval of the progress reports for held deliveries: a quarter of the shortest `ack_wait`.
const PROGRESS: Duration = Duration::from_secs(15);
/// After a gap of this length between ticks the process was paused, and its deliveries may be held by another
/// process too.
const PAUSED: Duration = Duration::from_secs(40);

/// All deliveries that this process holds. Clones share them.
#[derive(Debug, Clone)]
pub struct Held {
    shared: Arc<Shared>,
    broker: Broker,
    stage: Stage,
    metrics: Metrics,
}

#[derive(Debug)]
struct Shared {
    open: Mutex<Open>,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct Open {
    replies: HashMap<u64, async_nats::Subject>,
    next: u64,
    last_tick: Instant,
    woke: Option<Instant>,
}

impl Held {
    /// Starts the ticker. It runs until held work is given up, or until taking has stopped and no delivery is
    /// held.
    ///
    /// It lives outside the pool, so that a busy pool causes no redelivery: **progress-outside-the-pool**.
    pub fn start(broker: Broker, stage: Stage, metrics: Metrics, stop: &Stop) -> Self {
        let open = Open { replies: HashMap::new(), next: 0, last_tick: Instant::now(), woke: None };
        let shared = Arc::new(Shared { open: Mutex::new(open), dropped: AtomicU64::new(0) });
        let held = Self { shared, broker, stage, metrics };
        let ticking = held.clone();
        let stopping = stop.clone();
        stop.spawn(async move {
            while stopping.pause(PROGRESS_STEP).await {
                if stopping.taking_stopped() && ticking.open().replies.is_empty() {
                    break;
                }
                ticking.tick().await;
            }
        });
        held
    }

    /// The number of open deliveries.
    pub fn count(&self) -> usize {
        self.open().replies.len()
    }

    /// Holds a message until its delivery is ended.
    pub fn take(&self, message: Message, permit: OwnedSemaphorePermit) -> Delivery {
        let mut open = self.open();
        open.next += 1;
        let key = open.next;
        if let Some(reply) = &message.reply {
            open.replies.insert(key, reply.clone());
        }
        drop(open);
        let deliveries = message.info().map_or(1, |info| info.delivered);
        self.metrics.arrived(self.stage, deliveries, message.payload.len());
        let sent = TraceContext::of(message.headers.as_ref());
        Delivery {
            message: Box::new(message),
            deliveries,
            received: Instant::now(),
            trace: sent.map_or_else(TraceContext::begin, TraceContext::next),
            key,
            held: self.clone(),
            end: End::Dropped,
            permit: Mutex::new(Some(permit)),
        }
    }

    /// Whether this process was paused since `then` for so long that another process may hold its deliveries
    /// too.
    pub fn woke_since(&self, then: Instant) -> bool {
        let mut open = self.open();
        open.note_pause();
        open.woke.is_some_and(|woke| woke > then)
    }

    async fn tick(&self) {
        let due = {
            let mut open = self.open();
            open.note_pause();
            let due = open.last_tick.elapsed() >= PROGRESS;
            if due {
                open.last_tick = Instant::now();
            }
            if due { open.replies.values().cloned().collect() } else { Vec::new() }
        };
        for reply in due {
            let progress = self.broker.client().publish(reply, Bytes::from(AckKind::Progress));
            if !matches!(tokio::time::timeout(PROGRESS_STEP, progress).await, Ok(Ok(()))) {
                self.metrics.progress_failed(self.stage);
                tracing::warn!("progress could not be reported to NATS: held batches may be redelivered");
                break;
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.shared.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Interval of the ticker's checks; it reports every [`PROGRESS`].
const PROGRESS_STEP: Duration = Duration::from_secs(1);

impl Open {
    fn note_pause(&mut self) {
        if self.last_tick.elapsed() > PAUSED {
            self.woke = Some(Instant::now());
        }
    }
}

/// A delivery that this process holds. If it is dropped without an ack or nak, the server redelivers it after
/// `ack_wait`, and it is counted.
#[derive(Debug)]
pub struct Delivery {
    // Boxed because it contains a whole client context and deliveries are moved often.
    message: Box<Message>,
    deliveries: i64,
    received: Instant,
    trace: TraceContext,
    key: u64,
    held: Held,
    /// How the delivery ends; `Dropped` unless set.
    end: End,
    permit: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Delivery {
    /// The message's bytes.
    pub fn payload(&self) -> &Bytes {
        &self.message.payload
    }

    /// The message's subject.
    pub fn subject(&self) -> &str {
        &self.message.subject
    }

    /// The stream of the message, and the sequence in that stream.
    pub fn origin(&self) -> Option<(String, u64)> {
        self.message.info().ok().map(|info| (info.stream.to_owned(), info.stream_sequence))
    }

    /// The number of this delivery of the batch, from 1.
    pub fn deliveries(&self) -> i64 {
        self.deliveries
    }

    /// The time of arrival.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// The trace context of the batch, from the message's header. A message without one begins a trace.
    pub fn trace(&self) -> TraceContext {
        self.trace
    }

    /// Records that the message was put into quarantine.
    pub(crate) fn is_set_aside(&self) {
        self.held.metrics.set_aside(self.held.stage);
    }

    /// Replaces the permit that the delivery holds; `None` while it waits and needs none.
    pub fn hold(&self, permit: Option<OwnedSemaphorePermit>) {
        *self.permit() = permit;
    }

    /// Releases the permits that the delivery holds beyond `permits`.
    pub fn need_no_more(&self, permits: u32) {
        if let Some(held) = self.permit().as_mut()
            && let Some(more) = held.num_permits().checked_sub(permits as usize)
        {
            drop(held.split(more));
        }
    }

    fn permit(&self) -> MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.permit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Acks the delivery, because the result is durable.
    pub async fn ack(self) {
        self.end(AckKind::Ack, End::Acked).await;
    }

    /// Naks the delivery, so that the server redelivers it after `delay`.
    pub async fn nak(self, delay: Duration) {
        self.end(AckKind::Nak((!delay.is_zero()).then_some(delay)), End::HandedBack).await;
    }

    /// Drops this delivery without an end, because another delivery of the same message is held and will be
    /// ended.
    pub fn leave(mut self) {
        self.end = End::Left;
    }

    #[expect(clippy::disallowed_methods, reason = "the one place where a delivery is ended")]
    async fn end(mut self, kind: AckKind, end: End) {
        self.end = end;
        // The ack is queued, not sent. If the connection breaks now, the batch is redelivered and found done.
        let acked = tokio::time::timeout(Duration::from_secs(5), self.message.ack_with(kind)).await;
        if !matches!(acked, Ok(Ok(()))) {
            tracing::warn!(
                subject = self.subject(),
                "an ack could not be queued: the batch will be redelivered"
            );
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.held.open().replies.remove(&self.key);
        self.held.metrics.ended(self.held.stage, self.end, self.payload().len(), self.received.elapsed());
        if self.end == End::Dropped {
            let dropped = self.held.shared.dropped.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::warn!(
                subject = self.subject(),
                dropped,
                "a delivery was dropped without an ack or nak: it will be redelivered"
            );
        }
    }
}
