//! The pool process, from the worker's side: started when it is needed, and again after it died.
//!
//! Pieces return as they finish, so a death of the process leaves only the ids in progress in doubt.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use millstream::names::PassId;
use millstream::schema::Schema;
use millstream::{Id, Limits};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;

use super::cgroup;
use super::computed::{BatchKey, Computed, Piece};
use super::output::Said;
use super::process::{News, Process, Program, print, silent};
use super::protocol::{self, BUSY, CALL_OFF, OVERDUE, OverdueFrame, PIECE, encode, encode_order};
use super::results::Results;
use crate::error::{Code, Error};
use crate::fleet::times::Load;
use crate::telemetry::metrics::Metrics;

/// The worker checks the process's memory once in so many polls.
const POLLS_A_MEMORY_CHECK: u32 = 10;
/// The process sends something every second: in a longer silence the worker does not know whether it works.
const QUIET: Duration = Duration::from_secs(3);
/// Orders that may wait to be written to the socket.
const SENDING: usize = 4;

/// Ids without a result after the process ended.
pub(super) struct Leftover<I> {
    /// Ids that were lost with the process.
    pub left: Vec<I>,
    /// Whether one of these ids may be the reason.
    pub suspect: Suspect,
}

/// Whether an id in progress may be the reason why its process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Suspect {
    /// No id is suspect.
    No,
    /// The process was silent, which may happen to any process. Twice in a row, an id may be the reason.
    Silent,
    /// An id may be the reason.
    Yes,
}

struct Order<I> {
    key: BatchKey,
    ids: Vec<I>,
    /// Where results are stored.
    results: Arc<Results<I>>,
    /// Places of the pieces that arrived.
    covered: Vec<Range<u32>>,
    /// Ids that no piece has covered yet.
    missing: usize,
    answer: oneshot::Sender<Leftover<I>>,
}

/// Open orders; `None` once the process has died.
struct Shared<I> {
    orders: Mutex<Option<HashMap<u64, Order<I>>>>,
    /// Orders that the worker called off, to be reported to the process.
    off: Mutex<Vec<u64>>,
    call_off: Notify,
    schema: Arc<Schema>,
    metrics: Metrics,
    load: Load,
    got_going: Arc<AtomicBool>,
    /// Whether the worker ends the process: its end is then no news.
    is_dismissed: AtomicBool,
}

/// Calls an order off when it is dropped before the answer.
struct Waiting<I> {
    number: u64,
    shared: Arc<Shared<I>>,
}

impl<I> Drop for Waiting<I> {
    fn drop(&mut self) {
        let mut open = self.shared.open();
        if open.as_mut().and_then(|orders| orders.remove(&self.number)).is_some() {
            self.shared.off.lock().unwrap_or_else(PoisonError::into_inner).push(self.number);
            self.shared.call_off.notify_one();
        }
    }
}

struct Live<I> {
    shared: Arc<Shared<I>>,
    sender: mpsc::Sender<(u64, Vec<u8>)>,
    /// Reading and writing tasks; dropping the value ends them and the process.
    _pipes: JoinSet<()>,
}

/// The pipes end one after the other: the process may see the first end, and the reader the process's, before the reader is
/// ended too.
impl<I> Drop for Live<I> {
    fn drop(&mut self) {
        self.shared.is_dismissed.store(true, Ordering::Relaxed);
    }
}

/// Why a process ended, and which order may be the reason.
enum End {
    /// The process died, or used too much memory: any order may be the reason.
    All(String),
    /// This order has an id that exceeded the hard limit.
    One(u64),
    /// The process was silent for too long.
    Silent,
}

pub(super) struct PoolProcess<I> {
    program: Program,
    schema: Arc<Schema>,
    threads: usize,
    limits: Limits,
    metrics: Metrics,
    load: Load,
    /// Whether a process has computed its first id.
    got_going: Arc<AtomicBool>,
    live: tokio::sync::Mutex<Option<Live<I>>>,
    orders: AtomicU64,
}

impl<I: Id> PoolProcess<I> {
    pub fn new(
        program: Program,
        schema: Arc<Schema>,
        threads: usize,
        limits: Limits,
        metrics: Metrics,
        load: Load,
        got_going: Arc<AtomicBool>,
    ) -> Self {
        let live = tokio::sync::Mutex::default();
        Self { program, schema, threads, limits, metrics, load, got_going, live, orders: AtomicU64::new(0) }
    }

    /// Computes ids, and stores each piece as it arrives.
    pub async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        last: bool,
        results: &Arc<Results<I>>,
    ) -> Result<Leftover<I>, Error> {
        let number = self.orders.fetch_add(1, Ordering::Relaxed) + 1;
        let frame = encode_order(number, &ids, last);
        let (answer, answered) = oneshot::channel();
        let missing = ids.len();
        let covered = Vec::new();
        let order = Order { key: key.clone(), ids, results: results.clone(), covered, missing, answer };
        let (_waiting, sender) = self.place(number, order).await?;
        // A process that has just died takes no orders; its reader answers all open orders.
        let _died = sender.send((number, frame)).await;
        answered.await.map_err(|_| Error::Stopped)
    }

    /// Waits until a process can compute.
    pub async fn ready(&self) -> Result<(), Error> {
        self.keep_alive(&mut *self.live.lock().await).await.map(drop)
    }

    /// The running process, or a new one.
    async fn keep_alive<'a>(&self, live: &'a mut Option<Live<I>>) -> Result<&'a Live<I>, Error> {
        if live.as_ref().is_none_or(|live| live.shared.open().is_none()) {
            *live = Some(self.start().await?);
        }
        Ok(live.as_ref().expect("it was just started"))
    }

    /// Gives the order to the running process, or to a new one.
    async fn place(
        &self,
        number: u64,
        order: Order<I>,
    ) -> Result<(Waiting<I>, mpsc::Sender<(u64, Vec<u8>)>), Error> {
        let mut live = self.live.lock().await;
        let there = self.keep_alive(&mut live).await?;
        match &mut *there.shared.open() {
            Some(orders) => drop(orders.insert(number, order)),
            // The process died just now, before it received the order.
            None => {
                let _gone = order.answer.send(Leftover { left: order.ids, suspect: Suspect::No });
            }
        }
        Ok((Waiting { number, shared: there.shared.clone() }, there.sender.clone()))
    }

    async fn start(&self) -> Result<Live<I>, Error> {
        let millis = |limit: Option<Duration>| limit.map_or(0, |limit| limit.as_millis()).to_string();
        let arguments = [self.threads.to_string(), millis(self.limits.soft), millis(self.limits.hard)];
        let (process, to) = Process::start(&self.program, protocol::ARGUMENT, &arguments).await?;
        let room = self.limits.memory.map(|bytes| bytes.saturating_mul(self.threads as u64));
        let most = room.unwrap_or_else(host_memory).saturating_add(process.resident());
        let shared = Arc::new(Shared {
            orders: Mutex::new(Some(HashMap::new())),
            off: Mutex::default(),
            call_off: Notify::new(),
            schema: self.schema.clone(),
            metrics: self.metrics.clone(),
            load: self.load.clone(),
            got_going: self.got_going.clone(),
            is_dismissed: AtomicBool::new(false),
        });
        let (sender, outgoing) = mpsc::channel(SENDING);
        let mut pipes = JoinSet::new();
        pipes.spawn(write(to, outgoing, shared.clone()));
        pipes.spawn(read(process, shared.clone(), most));
        Ok(Live { shared, sender, _pipes: pipes })
    }
}

async fn write<I>(
    mut to: OwnedWriteHalf,
    mut outgoing: mpsc::Receiver<(u64, Vec<u8>)>,
    shared: Arc<Shared<I>>,
) {
    loop {
        let frame = tokio::select! {
            () = shared.call_off.notified() => shared.called_off(),
            order = outgoing.recv() => match order {
                // An order that was called off meanwhile is not begun.
                Some((number, frame)) if shared.is_open(number) => frame,
                Some(_) => continue,
                None => return,
            },
        };
        if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}

/// Takes what the process sends until it ends, then answers all open orders.
async fn read<I: Id>(mut process: Process, shared: Arc<Shared<I>>, most: u64) {
    let mut polls = 0;
    let end = loop {
        match process.next().await {
            News::Frame(kind, body) => match shared.take(kind, &body) {
                Ok(None) => {}
                Ok(Some(order)) => break End::One(order),
                Err(fault) => break End::All(fault),
            },
            News::Printed(said) => shared.print(said),
            News::Look => {
                polls += 1;
                shared.load.is_silent(process.silence() > QUIET && shared.has_ids());
                if polls % POLLS_A_MEMORY_CHECK == 0 {
                    let memory = process.resident();
                    if memory > most {
                        break End::All(format!("it took {} MB of memory", memory >> 20));
                    }
                }
            }
            News::Gone => break End::All(String::new()),
            News::Silent => break End::Silent,
            News::Broken(fault) => break End::All(fault.to_string()),
        }
    };
    shared.load.is_silent(false);
    let by_itself = matches!(&end, End::All(why) if why.is_empty());
    let mut ended = process.end(by_itself).await;
    shared.print(std::mem::take(&mut ended.said));
    let status = ended.to_string();
    match &end {
        _ if shared.is_dismissed.load(Ordering::Relaxed) => {
            tracing::debug!(status, "the compute pool has ended")
        }
        End::All(why) => {
            tracing::warn!(
                status,
                why,
                code = %Code::IdEndedProcess,
                "the compute pool died: its ids are computed one at a time in isolated processes"
            );
        }
        End::One(_) => tracing::debug!("the compute pool was killed: an id exceeded its hard limit"),
        End::Silent => {
            let why = silent();
            let batches = shared.batches();
            tracing::warn!(
                why,
                batches,
                status,
                code = %Code::PoolReplaced,
                "the compute pool is replaced, because it sent no sign of life: its ids are computed again"
            );
        }
    }
    shared.end(&end);
}

impl<I> Shared<I> {
    fn open(&self) -> MutexGuard<'_, Option<HashMap<u64, Order<I>>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ids(&self) -> bool {
        self.open().as_ref().is_some_and(|orders| !orders.is_empty())
    }

    fn is_open(&self, number: u64) -> bool {
        self.open().as_ref().is_some_and(|orders| orders.contains_key(&number))
    }

    /// Frames that report called-off orders to the process.
    fn called_off(&self) -> Vec<u8> {
        let off = std::mem::take(&mut *self.off.lock().unwrap_or_else(PoisonError::into_inner));
        off.iter().flat_map(|number| encode(CALL_OFF, number)).collect()
    }
}

impl<I: Id> Shared<I> {
    /// Logs printed lines with the batches in progress; which of several batches printed a line is unknown.
    fn print(&self, said: Vec<Said>) {
        if said.is_empty() {
            return;
        }
        let only = match self.open().as_ref().map(|orders| orders.values().collect::<Vec<_>>()).as_deref() {
            Some([only]) => Some((
                only.key.clone(),
                match &only.ids[..] {
                    [id] => shown(id),
                    _ => String::new(),
                },
            )),
            _ => None,
        };
        match only {
            Some((key, id)) => print(said, Some((key.pass.run.as_str(), &key.batch.to_string(), &id))),
            None => {
                let batches = self.batches();
                print(said, Some(("", &batches, "")));
            }
        }
    }

    /// The batches in progress, with their runs.
    fn batches(&self) -> String {
        let open = self.open();
        let mut names: Vec<String> = open
            .iter()
            .flat_map(HashMap::values)
            .map(|order| format!("{}/{}", order.key.pass.run, order.key.batch))
            .collect();
        names.sort_unstable();
        names.dedup();
        names.join(" ")
    }

    /// Takes a frame. Returns an order if the process must end because of it.
    fn take(&self, kind: u8, body: &Bytes) -> Result<Option<u64>, String> {
        match kind {
            PIECE => {
                let (order, piece) = postcard::from_bytes(body).map_err(|fault| fault.to_string())?;
                self.take_piece(order, piece).map(|()| None)
            }
            OVERDUE => {
                let frame: OverdueFrame = postcard::from_bytes(body).map_err(|fault| fault.to_string())?;
                if !frame.hard {
                    self.warn(&frame);
                }
                Ok(frame.hard.then_some(frame.order))
            }
            BUSY => {
                self.load.busy(postcard::from_bytes(body).map_err(|fault| fault.to_string())?);
                Ok(None)
            }
            _ => Err(format!("it sent a frame of unknown kind {kind:#04x}")),
        }
    }

    fn take_piece(&self, number: u64, piece: Piece) -> Result<(), String> {
        self.got_going.store(true, Ordering::Relaxed);
        let mut open = self.open();
        let Some(orders) = &mut *open else { return Ok(()) };
        // The order was called off meanwhile.
        let Some(order) = orders.get_mut(&number) else { return Ok(()) };
        if !piece.is_sound(&self.schema, order.ids.len()) {
            return Err("it sent rows that do not have the pipeline's columns".to_owned());
        }
        order.covered.push(piece.from..piece.from + piece.count);
        order.missing = order.missing.saturating_sub(piece.count as usize);
        order.results.put(Computed::of(&order.ids, piece));
        if order.missing == 0
            && let Some(order) = orders.remove(&number)
        {
            drop(open);
            order.finish(Vec::new(), Suspect::No);
        }
        Ok(())
    }

    fn warn(&self, frame: &OverdueFrame) {
        self.metrics.id_is_slow();
        if let Some(order) = self.open().as_ref().and_then(|orders| orders.get(&frame.order))
            && let Some(id) = order.ids.get(frame.at as usize)
        {
            slow(&order.key, id);
        }
    }

    fn end(&self, end: &End) {
        for (number, order) in self.open().take().unwrap_or_default() {
            let suspect = match end {
                End::All(_) => Suspect::Yes,
                End::One(overdue) if *overdue == number => Suspect::Yes,
                End::One(_) => Suspect::No,
                End::Silent => Suspect::Silent,
            };
            let left = order.left();
            order.finish(left, suspect);
        }
    }
}

impl<I: Id> Order<I> {
    fn finish(self, left: Vec<I>, suspect: Suspect) {
        // The receiver is gone if the caller gave up.
        let _forgotten = self.answer.send(Leftover { left, suspect });
    }

    /// Ids that no piece covers.
    fn left(&self) -> Vec<I> {
        let mut covered = self.covered.clone();
        covered.sort_unstable_by_key(|places| places.start);
        let end = self.ids.len() as u32;
        covered.push(end..end);
        let mut left = Vec::new();
        let mut next = 0;
        for places in covered {
            left.extend_from_slice(&self.ids[next as usize..places.start as usize]);
            next = places.end;
        }
        left
    }
}

/// Logs an id that exceeded its soft limit. Not rate-limited, because it should be rare.
pub(super) fn slow<I: Id>(key: &BatchKey, id: &I) {
    let BatchKey { pass: PassId { run, .. }, batch, .. } = key;
    tracing::warn!(%run, batch, id = shown(id), code = %Code::IdSlow, "an id takes longer than its soft limit");
}

/// An id in a form fit for a log.
pub(super) fn shown<I: Id>(id: &I) -> String {
    id.to_string().chars().take(80).collect()
}

/// Memory that compute processes of this host may use, in bytes: four fifths of the total.
pub(super) fn host_memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let total = read("/proc/meminfo");
    let total = total.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total = total.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let least = total.map(|kib| kib << 10).into_iter().chain(cgroup::memory()).min();
    least.map_or(u64::MAX, |bytes| bytes / 5 * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_piece_covers_is_left() {
        let (answer, _) = oneshot::channel::<Leftover<u64>>();
        let key = BatchKey { pass: PassId { run: "r".parse().expect("legal"), pass: 1 }, batch: 0, ids: 10 };
        let ids = (100..110).collect();
        let results = Arc::default();
        let order = Order { key, ids, results, covered: vec![6..8, 1..4], missing: 5, answer };
        assert_eq!(order.left(), [100, 104, 105, 108, 109]);
    }

    #[test]
    fn the_hosts_memory_is_known() {
        assert!((1 << 20..u64::MAX).contains(&host_memory()));
    }
}
