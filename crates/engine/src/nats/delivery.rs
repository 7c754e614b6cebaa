//! One arrival of a batch: payload, acker and permit in one value that is ended exactly once, and the ticker that says
//! "still working" for all of them.

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

/// How often progress is reported for everything held: a quarter of the shortest `ack_wait`.
const PROGRESS: Duration = Duration::from_secs(15);
/// A process that has not ticked for this long was paused, and what it holds may be somebody else's by now.
const PAUSED: Duration = Duration::from_secs(40);

/// All deliveries that this process holds. Clones are the same.
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
    /// Starts the ticker, which runs until work is given up or nothing is held after taking stopped.
    ///
    /// It lives outside the pool: **progress-outside-the-pool** is what keeps a busy host from causing redeliveries.
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

    /// How many deliveries are open.
    pub fn count(&self) -> usize {
        self.open().replies.len()
    }

    /// Takes charge of a message until the delivery is ended.
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
            room: Mutex::new(Some(permit)),
        }
    }

    /// Whether this process was paused since `then`, for so long that what it holds may be in other hands too.
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
                tracing::warn!("progress could not be reported: held batches may be delivered again");
                break;
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.shared.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ticker looks around this often; it reports every [`PROGRESS`].
const PROGRESS_STEP: Duration = Duration::from_secs(1);

impl Open {
    fn note_pause(&mut self) {
        if self.last_tick.elapsed() > PAUSED {
            self.woke = Some(Instant::now());
        }
    }
}

/// A batch in our hands. Dropping it without an end leaves it to be delivered again after `ack_wait`, and is counted.
#[derive(Debug)]
pub struct Delivery {
    // Boxed: it carries a whole client context, and deliveries are moved about.
    message: Box<Message>,
    deliveries: i64,
    received: Instant,
    trace: TraceContext,
    key: u64,
    held: Held,
    /// How it ends; dropped, unless something else is said before.
    end: End,
    room: Mutex<Option<OwnedSemaphorePermit>>,
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

    /// The stream that it came from, and its sequence there.
    pub fn origin(&self) -> Option<(String, u64)> {
        self.message.info().ok().map(|info| (info.stream.to_owned(), info.stream_sequence))
    }

    /// Which arrival of this batch it is, from 1.
    pub fn deliveries(&self) -> i64 {
        self.deliveries
    }

    /// When it arrived.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// Its place in the trace of the batch, which the message's header names. A message without one begins a trace.
    pub fn trace(&self) -> TraceContext {
        self.trace
    }

    /// The message was put into quarantine.
    pub(crate) fn is_set_aside(&self) {
        self.held.metrics.set_aside(self.held.stage);
    }

    /// Replaces the room that the delivery takes up: none while it waits without needing any.
    pub fn hold(&self, room: Option<OwnedSemaphorePermit>) {
        *self.room() = room;
    }

    /// Gives back what the delivery has of room beyond so much.
    pub fn need_no_more(&self, room: u32) {
        if let Some(held) = self.room().as_mut()
            && let Some(more) = held.num_permits().checked_sub(room as usize)
        {
            drop(held.split(more));
        }
    }

    fn room(&self) -> MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The result is durable: the batch is done.
    pub async fn ack(self) {
        self.end(AckKind::Ack, End::Acked).await;
    }

    /// The batch is handed back, to be delivered again after `delay`.
    pub async fn nak(self, delay: Duration) {
        self.end(AckKind::Nak((!delay.is_zero()).then_some(delay)), End::HandedBack).await;
    }

    /// Another delivery of the same message is in our hands and will be ended: this one needs no end.
    pub fn leave(mut self) {
        self.end = End::Left;
    }

    #[expect(clippy::disallowed_methods, reason = "the one place where a delivery is ended")]
    async fn end(mut self, kind: AckKind, end: End) {
        self.end = end;
        // Queued, not sent: should the connection break now, the batch comes again and is found done.
        let acked = tokio::time::timeout(Duration::from_secs(5), self.message.ack_with(kind)).await;
        if !matches!(acked, Ok(Ok(()))) {
            tracing::warn!(
                subject = self.subject(),
                "an ack could not be queued: the batch will be delivered again"
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
            tracing::warn!(subject = self.subject(), dropped, "a delivery was left without an ack or a nak");
        }
    }
}
