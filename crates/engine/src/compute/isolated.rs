//! Isolated processes, from the worker's side: each computes one id at a time, so the worker knows which id broke its
//! process. The protocol is [`millstream::child`]'s.

use std::marker::PhantomData;
use std::ops::Range;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::child::{self as wire, Answer};
use millstream::columns::Columns;
use millstream::names::PassId;
use millstream::schema::Schema;
use millstream::{Id, Limits};
use tokio::sync::Semaphore;

use super::child_link::ChildLink;
use super::computed::{BatchKey, Computed, PIECE_BYTES};
use super::id_queue::IdQueue;
use super::pool_process::{host_memory, shown, slow};
use super::process::{Age, Ended, News, Process, Program, said, silent};
use super::results::Results;
use super::row::gave_up;
use crate::error::{Code, Error};
use crate::telemetry::metrics::Metrics;

/// Ids sent to a process and not answered: few enough to fit its socket always, with ids of 4 KiB.
const AHEAD: usize = 8;
/// After so long without a sign of life an id's clock stops: its process is stopped, or will soon count as silent.
const ASLEEP: Duration = Duration::from_secs(5);
/// Age at which an id in flight counts as long: the worker stores finished results, and other lanes get the ids behind
/// it.
const LASTS: Duration = Duration::from_millis(200);
/// How many times to try an id whose process was stopped, or killed from outside. The OOM killer picks the largest
/// process, which need not be the guilty one.
const KILLED_TRIES: u32 = 3;
/// Text that Rust's allocator prints before it aborts; with RUST_BACKTRACE set, a line follows it.
const NO_MEMORY: &str = "memory allocation of ";
/// So many first ids that overran, while no process got beyond its first id, are no coincidence.
const FIRST_IDS: u32 = 3;
/// What a dead letter then says.
const FIRST_ID: &str = "it was the first id of its process, and no process has got beyond its first id so far: what is loaded once in each \
                        process belongs into `Pipeline::start`, which has a limit of its own";

pub(super) struct Isolated<I> {
    program: Program,
    limits: Limits,
    /// Memory limit of one process, from the limit of an id.
    memory: u64,
    schema: Arc<Schema>,
    metrics: Metrics,
    /// Thread slots: one process a core, over all batches.
    slots: Semaphore,
    threads: usize,
    /// Processes without a batch, at most one for each slot.
    idle: Mutex<Vec<ChildLink>>,
    /// Whether a process has computed its first id.
    got_going: Arc<AtomicBool>,
    /// First ids that overran, while no process got beyond its first id.
    first_late: AtomicU32,
    ids: PhantomData<fn(I)>,
}

/// Why a process stopped answering.
enum End {
    /// All ids are answered.
    Done,
    /// The process is gone, and this worker did not kill it.
    Died,
    /// The process sends no sign of life.
    Silent,
    /// The worker must kill the process, for this reason.
    Over(String),
    /// The worker must kill the process, because an id takes longer than the hard limit.
    Late(String),
}

impl<I: Id> Isolated<I> {
    pub fn new(
        program: Program,
        threads: usize,
        limits: Limits,
        schema: Arc<Schema>,
        metrics: Metrics,
        got_going: Arc<AtomicBool>,
    ) -> Self {
        let memory = limits.memory.unwrap_or_else(|| host_memory() / threads as u64);
        let slots = Semaphore::new(threads);
        let idle = Mutex::default();
        Self {
            program,
            limits,
            memory,
            schema,
            metrics,
            slots,
            threads,
            idle,
            got_going,
            first_late: AtomicU32::new(0),
            ids: PhantomData,
        }
    }

    /// Computes ids, and stores results as they arrive.
    pub async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        last: bool,
        results: &Results<I>,
    ) -> Result<(), Error> {
        self.metrics.isolated();
        let queue = IdQueue::new(&ids, results, self.threads);
        let lane = || self.lane(key, &queue, last);
        let mut lanes: FuturesUnordered<_> = (0..queue.count().min(self.threads)).map(|_| lane()).collect();
        // The batch does not wait for a lane whose slot is taken by other batches once no ids are left.
        while queue.has_left() {
            tokio::select! {
                Some(ended) = lanes.next() => ended?,
                () = queue.given_back.notified() => if lanes.len() < self.threads {
                    lanes.push(lane());
                },
            }
        }
        Ok(())
    }

    /// One lane: computes chunks with one process until none is left.
    async fn lane(&self, key: &BatchKey, queue: &IdQueue<'_, I>, last: bool) -> Result<(), Error> {
        let _slot = self.slots.acquire().await.expect("the semaphore is never closed");
        let _busy = queue.busy();
        let Some(mut chunk) = queue.next() else { return Ok(()) };
        let mut link = self.idle().pop();
        loop {
            self.chunk(&mut link, key, queue, chunk, last).await?;
            match queue.next() {
                Some(next) => chunk = next,
                None => break,
            }
        }
        // A process that still computes an id given to another lane would run on unwatched.
        let free = self.caught_up(link).await;
        self.idle().extend(free);
        Ok(())
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<ChildLink>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a process can compute.
    pub async fn ready(&self) -> Result<(), Error> {
        if self.idle().is_empty() {
            let link = self.start().await?;
            self.idle().push(link);
        }
        Ok(())
    }

    /// Computes a chunk, and replaces the process as often as its ids break it.
    async fn chunk(
        &self,
        link: &mut Option<ChildLink>,
        key: &BatchKey,
        queue: &IdQueue<'_, I>,
        mut chunk: Range<usize>,
        last: bool,
    ) -> Result<(), Error> {
        let mut chunk_rows = ChunkRows { schema: &self.schema, computed: Computed::none(&self.schema), last };
        let mut killed = 0;
        while !chunk.is_empty() {
            let mut child = match self.caught_up(link.take()).await {
                Some(child) => child,
                None => self.start().await?,
            };
            let begun = Instant::now();
            let before = chunk.start;
            let end = self.run_chunk(&mut child, key, queue, &mut chunk, &mut chunk_rows).await;
            chunk_rows.computed.spent.computing += begun.elapsed();
            if matches!(end, End::Done) {
                *link = Some(child);
                continue;
            }
            killed = if chunk.start > before { 0 } else { killed };
            let others = child.computed;
            let id = &queue.ids[chunk.start];
            let verdict = self.verdict(child, key, id, end).await;
            let reason = match verdict {
                // A process worn out by many ids is not the last id's fault; a fresh process will tell.
                Verdict::Crashed(reason) if others > 0 => {
                    let (id, BatchKey { pass: PassId { run, .. }, batch, .. }) = (shown(id), key);
                    tracing::debug!(%run, batch, id, reason, others, "isolated process replaced; its last id is tried in a fresh process");
                    continue;
                }
                Verdict::Crashed(reason) => reason,
                Verdict::Killed(reason) => {
                    killed += 1;
                    if killed < KILLED_TRIES {
                        continue;
                    }
                    reason
                }
            };
            killed = 0;
            self.metrics.id_crashed();
            let BatchKey { pass: PassId { run, .. }, batch, .. } = key;
            tracing::warn!(%run, batch, id = shown(id), reason, code = %Code::IdEndedProcess, "an id ended its process: it becomes a dead letter");
            chunk_rows.dead(id, &reason);
            chunk.start += 1;
        }
        queue.put(chunk_rows.take());
        Ok(())
    }

    /// Ends a process that does not answer its id, and says why it does not.
    async fn verdict(&self, mut child: ChildLink, key: &BatchKey, id: &I, end: End) -> Verdict {
        let by_itself = matches!(end, End::Died);
        let mut ended = child.process.end(by_itself).await;
        child.tell(std::mem::take(&mut ended.said));
        match end {
            End::Silent => {
                let why = silent();
                let BatchKey { pass: PassId { run, .. }, batch, .. } = key;
                tracing::warn!(%run, batch, id = shown(id), why, code = %Code::PoolReplaced, "isolated process is silent and is replaced");
                Verdict::Killed(why)
            }
            End::Over(reason) => Verdict::Crashed(reason),
            End::Late(reason) => Verdict::Crashed(self.late(reason)),
            End::Done | End::Died => match &ended.status {
                Ok(status) => verdict(*status, &ended, child.panicked.as_deref(), self.memory),
                Err(error) => Verdict::Crashed(format!("crashed: {error}")),
            },
        }
    }

    /// The dead letter's text for an id that took too long.
    fn late(&self, reason: String) -> String {
        if self.got_going.load(Ordering::Relaxed) {
            return reason;
        }
        match self.first_late.fetch_add(1, Ordering::Relaxed) + 1 {
            FIRST_IDS.. => format!("{reason}; {FIRST_ID}"),
            _ => reason,
        }
    }

    /// Has the process compute the chunk, which begins with the id in flight; returns why it stops.
    async fn run_chunk(
        &self,
        child: &mut ChildLink,
        key: &BatchKey,
        queue: &IdQueue<'_, I>,
        chunk: &mut Range<usize>,
        chunk_rows: &mut ChunkRows<'_, I>,
    ) -> End {
        let mut sent = chunk.start;
        let mut flight = Flight::new();
        child.process.listen_again();
        while chunk.start < chunk.end {
            if sent < chunk.end && sent - chunk.start <= AHEAD / 2 {
                let ids = &queue.ids[sent..chunk.end.min(chunk.start + AHEAD)];
                sent = match child.send(key, ids).await {
                    Ok(()) => sent + ids.len(),
                    // Answers from before its death are still in the socket.
                    Err(_) => chunk.end,
                };
            }
            let id = &queue.ids[chunk.start];
            let (kind, body) = match child.process.next().await {
                News::Frame(kind, body) => (kind, body),
                News::Printed(said) => {
                    child.tell(said);
                    continue;
                }
                News::Look => {
                    if let Some(end) = self.overrun(child, key, id, &mut flight) {
                        return end;
                    }
                    if flight.lasts() {
                        queue.put(chunk_rows.take());
                        queue.give_back(chunk);
                        child.forget(sent.saturating_sub(chunk.end)).await;
                        sent = sent.min(chunk.end);
                    }
                    continue;
                }
                News::Gone => return End::Died,
                News::Silent => return End::Silent,
                News::Broken(fault) => return End::Over(spoke(&fault)),
            };
            match chunk_rows.take_answer(id, kind, &body) {
                Ok(Some(panic)) => child.panicked = child.panicked.take().or(Some(panic)),
                Ok(None) => {
                    (flight, child.panicked) = (Flight::new(), None);
                    chunk.start += 1;
                    child.computed += 1;
                    self.got_going.store(true, Ordering::Relaxed);
                    if chunk_rows.computed.rows.bytes() >= PIECE_BYTES {
                        queue.put(chunk_rows.take());
                    }
                }
                Err(fault) => return End::Over(spoke(&fault)),
            }
        }
        End::Done
    }

    /// Why the process must end, if the id in flight exceeds a hard limit.
    fn overrun(&self, child: &ChildLink, key: &BatchKey, id: &I, flight: &mut Flight) -> Option<End> {
        if child.process.silence() > ASLEEP {
            flight.age.rest();
            return None;
        }
        flight.age.grow();
        let (age, Limits { soft, hard, .. }) = (flight.age.time, self.limits);
        if soft.is_some_and(|soft| age >= soft) && !std::mem::replace(&mut flight.logged, true) {
            self.metrics.id_is_slow();
            slow(key, id);
        }
        if let Some(hard) = hard.filter(|hard| age >= *hard) {
            return Some(End::Late(format!("timed out after {} s", hard.as_secs_f64())));
        }
        let taken = child.process.resident().saturating_sub(child.base);
        (taken > self.memory).then(|| End::Over(out_of_memory(self.memory)))
    }

    /// The process, if it has nothing in progress; otherwise it is ended.
    async fn caught_up(&self, link: Option<ChildLink>) -> Option<ChildLink> {
        let mut link = link?;
        if link.catch_up().await {
            return Some(link);
        }
        let ended = link.process.end(false).await;
        tracing::debug!(%ended, "isolated process replaced: it still computes an id that another process has");
        None
    }

    async fn start(&self) -> Result<ChildLink, Error> {
        let arguments = [self.memory.to_string()];
        let (process, to) = Process::start(&self.program, wire::ARGUMENT, &arguments).await?;
        Ok(ChildLink::new(process, to))
    }
}

fn spoke(fault: &dyn std::fmt::Display) -> String {
    format!("crashed: its process said: {fault}")
}

/// Rows of a chunk, as they arrive.
struct ChunkRows<'a, I> {
    schema: &'a Schema,
    computed: Computed<I>,
    last: bool,
}

impl<I: Id> ChunkRows<'_, I> {
    /// Takes the results out.
    fn take(&mut self) -> Computed<I> {
        std::mem::replace(&mut self.computed, Computed::none(self.schema))
    }

    /// Takes a frame that answers `id`. Returns the panic message if the frame announces a panic, whose answer is still
    /// to come.
    fn take_answer(&mut self, id: &I, kind: u8, body: &Bytes) -> Result<Option<String>, String> {
        match Answer::read(kind, body).map_err(|fault| fault.to_string())? {
            Answer::Row(row) => {
                let row: Columns = postcard::from_bytes(row).map_err(|fault| fault.to_string())?;
                if !row.is_sound(self.schema, 1) {
                    return Err("a row that does not have the pipeline's columns".to_owned());
                }
                self.computed.ids.push(id.clone());
                self.computed.rows.ok_columns(row);
            }
            Answer::Reject(reason) => self.dead(id, reason),
            Answer::Again(reason) if self.last => self.dead(id, &gave_up(reason)),
            Answer::Again(reason) => self.computed.again.push((id.clone(), reason.to_owned())),
            Answer::Panicked(reason) => return Ok(Some(reason.to_owned())),
            Answer::Hello { .. } | Answer::Started | Answer::NotStarted(_) | Answer::Forgotten => {
                return Err("a frame that is no answer to an id".to_owned());
            }
        }
        Ok(None)
    }

    fn dead(&mut self, id: &I, reason: &str) {
        self.computed.ids.push(id.clone());
        self.computed.rows.dead(self.schema, reason);
    }
}

/// How long the id in flight has been computing.
struct Flight {
    age: Age,
    logged: bool,
    relieved: bool,
}

impl Flight {
    fn new() -> Self {
        Self { age: Age::new(), logged: false, relieved: false }
    }

    /// Whether the id takes long; `true` only once.
    fn lasts(&mut self) -> bool {
        self.age.time >= LASTS && !std::mem::replace(&mut self.relieved, true)
    }
}

/// Why a process does not answer.
enum Verdict {
    /// Something from outside, which the id in flight need not have caused.
    Killed(String),
    /// The id, or the state that the process is in.
    Crashed(String),
}

fn verdict(status: ExitStatus, ended: &Ended, panicked: Option<&str>, memory: u64) -> Verdict {
    use std::os::unix::process::ExitStatusExt;

    const SIGABRT: i32 = nix::sys::signal::Signal::SIGABRT as i32;
    const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;
    // A panic that aborts prints nothing else of interest.
    let said = panicked.map_or_else(|| said(&ended.last_words), |panic| format!(": {panic}"));
    match (status.signal(), status.code()) {
        (Some(SIGABRT), _) if ended.last_words.lines().any(|line| line.starts_with(NO_MEMORY)) => {
            Verdict::Crashed(out_of_memory(memory))
        }
        (Some(SIGKILL), _) => {
            Verdict::Killed("killed: signal 9, which is what the kernel does when memory runs out".into())
        }
        (Some(signal), _) => Verdict::Crashed(format!("crashed: signal {signal}{said}")),
        (None, code) => Verdict::Crashed(format!("crashed: exit code {}{said}", code.unwrap_or(-1))),
    }
}

fn out_of_memory(limit: u64) -> String {
    format!("out of memory: limit {} MB", limit >> 20)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn reason_of(raw: i32, last_words: &str) -> String {
        let status = ExitStatus::from_raw(raw);
        let ended = Ended { status: Ok(status), said: Vec::new(), last_words: last_words.to_owned() };
        match verdict(status, &ended, None, 512 << 20) {
            Verdict::Killed(_) => "killed".to_owned(),
            Verdict::Crashed(reason) => reason,
        }
    }

    #[test]
    fn a_dead_child_says_what_it_died_of() {
        let table = [
            (11, "", "crashed: signal 11"),
            (6, "free(): invalid pointer\n", "crashed: signal 6: free(): invalid pointer"),
            (6, "memory allocation of 8589934592 bytes failed\n", "out of memory: limit 512 MB"),
            (
                6,
                "memory allocation of 8 bytes failed\nskipping backtrace printing to avoid potential recursion\n",
                "out of memory: limit 512 MB",
            ),
            (9, "", "killed"),
            (7 << 8, "", "crashed: exit code 7"),
        ];
        for (status, words, reason) in table {
            assert_eq!(reason_of(status, words), reason);
        }
    }
}
