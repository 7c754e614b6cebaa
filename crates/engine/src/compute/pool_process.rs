//! The pool in a process of its own, from the worker's side: started when it is needed, again when it has died.
//!
//! Pieces come back as they are done, so when the process dies only what was in hand is in doubt.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
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
use crate::model::counts::WorkCounts;

/// The process's memory is looked at every so many looks.
const LOOKS_AT_MEMORY: u32 = 10;
/// A process says something every second: what it does in a longer silence is not known.
const QUIET: Duration = Duration::from_secs(3);
/// Orders on their way into the pipe.
const SENDING: usize = 4;

/// What became of ids that are not done.
pub(super) struct Leftover<I> {
    /// Those that were lost with the process.
    pub left: Vec<I>,
    /// Whether one of them may be why.
    pub suspect: Suspect,
}

/// Whether an id that was in hand may be why its process is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Suspect {
    /// None of them is.
    No,
    /// The process gave no sign any more, which may happen to any. Twice in a row, it is one of them perhaps.
    Silent,
    /// One of them may be.
    Yes,
}

struct Order<I> {
    key: BatchKey,
    ids: Vec<I>,
    /// Where what is done is put.
    results: Arc<Results<I>>,
    /// Places of the pieces that came.
    covered: Vec<Range<u32>>,
    /// Ids that those have not.
    missing: usize,
    answer: oneshot::Sender<Leftover<I>>,
}

/// What the worker waits for; `None` once the process has died.
struct Shared<I> {
    orders: Mutex<Option<HashMap<u64, Order<I>>>>,
    /// Orders that nobody waits for any more, to be told to the process.
    off: Mutex<Vec<u64>>,
    call_off: Notify,
    schema: Arc<Schema>,
    counts: Arc<WorkCounts>,
    load: Load,
    got_going: Arc<AtomicBool>,
}

/// Calls an order off when it is dropped, unless it is answered.
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
    /// Reading and writing end with this value, and the process with them.
    _pipes: JoinSet<()>,
}

/// Why a process is over, and whose fault that may be.
enum End {
    /// It died, or took too much memory: any order may be the reason.
    All(String),
    /// This order has an id that overran the hard limit.
    One(u64),
    /// It gave no sign for too long.
    Silent,
}

pub(super) struct PoolProcess<I> {
    program: Program,
    schema: Arc<Schema>,
    threads: usize,
    limits: Limits,
    counts: Arc<WorkCounts>,
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
        counts: Arc<WorkCounts>,
        load: Load,
        got_going: Arc<AtomicBool>,
    ) -> Self {
        let live = tokio::sync::Mutex::default();
        Self { program, schema, threads, limits, counts, load, got_going, live, orders: AtomicU64::new(0) }
    }

    /// Computes ids, and puts each piece down as it is done.
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
        let (missing, covered) = (ids.len(), Vec::new());
        let order = Order { key: key.clone(), ids, results: results.clone(), covered, missing, answer };
        let (_waiting, sender) = self.place(number, order).await?;
        // A process that has just died takes nothing any more; its reader says so to everybody who waits.
        let _died = sender.send((number, frame)).await;
        answered.await.map_err(|_| Error::Stopped)
    }

    /// Waits until there is a process that computes.
    pub async fn ready(&self) -> Result<(), Error> {
        self.keep_alive(&mut *self.live.lock().await).await.map(drop)
    }

    /// The process that lives, or a new one.
    async fn keep_alive<'a>(&self, live: &'a mut Option<Live<I>>) -> Result<&'a Live<I>, Error> {
        if live.as_ref().is_none_or(|live| live.shared.open().is_none()) {
            *live = Some(self.start().await?);
        }
        Ok(live.as_ref().expect("it was just started"))
    }

    /// Hands the order to the process that lives, or to a new one.
    async fn place(
        &self,
        number: u64,
        order: Order<I>,
    ) -> Result<(Waiting<I>, mpsc::Sender<(u64, Vec<u8>)>), Error> {
        let mut live = self.live.lock().await;
        let there = self.keep_alive(&mut live).await?;
        match &mut *there.shared.open() {
            Some(orders) => drop(orders.insert(number, order)),
            // It died this very moment, before it was given anything.
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
            counts: self.counts.clone(),
            load: self.load.clone(),
            got_going: self.got_going.clone(),
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
                // One that was called off meanwhile is not begun.
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

/// Takes what the process sends until it is over, and then tells everybody who waits.
async fn read<I: Id>(mut process: Process, shared: Arc<Shared<I>>, most: u64) {
    let mut looks = 0;
    let end = loop {
        match process.next().await {
            News::Frame(kind, body) => match shared.take(kind, &body) {
                Ok(None) => {}
                Ok(Some(order)) => break End::One(order),
                Err(fault) => break End::All(fault),
            },
            News::Printed(said) => shared.print(said),
            News::Look => {
                looks += 1;
                shared.load.is_silent(process.silence() > QUIET && shared.has_ids());
                if looks % LOOKS_AT_MEMORY == 0 {
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
        End::All(why) => {
            tracing::warn!(
                status,
                why,
                code = %Code::IdEndedProcess,
                "the compute pool died: ids that were in it are computed one at a time"
            );
        }
        End::One(_) => tracing::debug!("the compute pool was ended for an id beyond its hard limit"),
        End::Silent => {
            let why = silent();
            let batches = shared.batches();
            tracing::warn!(why, batches, status, code = %Code::PoolReplaced, "the compute pool is replaced: its ids are computed again");
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

    /// Frames that call off what nobody waits for.
    fn called_off(&self) -> Vec<u8> {
        let off = std::mem::take(&mut *self.off.lock().unwrap_or_else(PoisonError::into_inner));
        off.iter().flat_map(|number| encode(CALL_OFF, number)).collect()
    }
}

impl<I: Id> Shared<I> {
    /// Logs what was printed, with the batch in hand; which of several it is about is not known.
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
            Some((key, id)) => print(said, Some((key.run.as_str(), &key.batch.to_string(), &id))),
            None => {
                let batches = self.batches();
                print(said, Some(("", &batches, "")));
            }
        }
    }

    /// The batches in hand, by their runs.
    fn batches(&self) -> String {
        let open = self.open();
        let mut names: Vec<String> = open
            .iter()
            .flat_map(HashMap::values)
            .map(|order| format!("{}/{}", order.key.run, order.key.batch))
            .collect();
        names.sort_unstable();
        names.dedup();
        names.join(" ")
    }

    /// Takes a frame; the order for which the process must end, if it brings such news.
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
            _ => Err(format!("it sent a frame of kind {kind:#04x}")),
        }
    }

    fn take_piece(&self, number: u64, piece: Piece) -> Result<(), String> {
        self.got_going.store(true, Ordering::Relaxed);
        let mut open = self.open();
        let Some(orders) = &mut *open else { return Ok(()) };
        // One that was called off meanwhile.
        let Some(order) = orders.get_mut(&number) else { return Ok(()) };
        if !piece.is_sound(&self.schema, order.ids.len()) {
            return Err("it sent rows that are none of the pipeline's".to_owned());
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
        self.counts.slow.fetch_add(1, Ordering::Relaxed);
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
        // The receiver is gone when work was given up.
        let _forgotten = self.answer.send(Leftover { left, suspect });
    }

    /// Ids that no piece covers.
    fn left(&self) -> Vec<I> {
        let mut covered = self.covered.clone();
        covered.sort_unstable_by_key(|places| places.start);
        let end = self.ids.len() as u32;
        covered.push(end..end);
        let (mut left, mut next) = (Vec::new(), 0);
        for places in covered {
            left.extend_from_slice(&self.ids[next as usize..places.start as usize]);
            next = places.end;
        }
        left
    }
}

/// Says that an id takes long. Rare by what a soft limit is for, so each is told.
pub(super) fn slow<I: Id>(key: &BatchKey, id: &I) {
    let BatchKey { run, batch, .. } = key;
    tracing::warn!(%run, batch, id = shown(id), code = %Code::IdSlow, "an id takes longer than its soft limit");
}

/// An id fit for a log.
pub(super) fn shown<I: Id>(id: &I) -> String {
    id.to_string().chars().take(80).collect()
}

/// Memory that compute processes of this host may take, in bytes: four fifths of what there is.
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
        let key = BatchKey { run: "r".parse().expect("legal"), pass: 1, batch: 0, ids: 10 };
        let (ids, results) = ((100..110).collect(), Arc::default());
        let order = Order { key, ids, results, covered: vec![6..8, 1..4], missing: 5, answer };
        assert_eq!(order.left(), [100, 104, 105, 108, 109]);
    }

    #[test]
    fn the_hosts_memory_is_known() {
        assert!((1 << 20..u64::MAX).contains(&host_memory()));
    }
}
