//! Children that compute one id at a time, from the worker's side: what an id does to its child is known to be that
//! id's doing. The protocol is [`millstream::child`]'s.

use std::marker::PhantomData;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::try_join_all;
use millstream::child::{self as wire, Answer, frame};
use millstream::columns::Columns;
use millstream::schema::Schema;
use millstream::{Id, Limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::apart::{host_memory, shown, slow};
use super::frames::Frames;
use super::row::gave_up;
use super::{BatchKey, Computed};
use crate::error::{Error, Source};
use crate::work::WorkCounts;

/// Ids that one child takes at a time, while others take theirs.
const CHUNK: usize = 64;
/// Ids sent to a child and not answered: few enough that they always fit its pipe (64 KiB), with ids of 4 KiB.
const AHEAD: usize = 8;
/// How often a child's time and memory are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// A look that comes later than this counts as one that came in time: the worker itself was stopped, not the id slow.
const LATE: Duration = Duration::from_secs(1);
/// How long a pipeline may take from its start to the first id.
const HELLO_WITHIN: Duration = Duration::from_secs(120);
/// How often an id is tried whose child somebody else killed: the kernel, for want of memory, means the largest.
const KILLED_TRIES: u32 = 3;
/// What is kept of a child's stderr.
const LAST_WORDS: usize = 4 << 10;
/// What Rust's allocator says before it aborts; with RUST_BACKTRACE set, a line follows it.
const NO_MEMORY: &str = "memory allocation of ";
/// How long the last words of a dead child are waited for: a process that it started may hold the pipe.
const LAST_WORDS_WITHIN: Duration = Duration::from_millis(200);

/// What a child is started from.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub path: PathBuf,
    /// What it has to say that it computes.
    pub pipeline: &'static str,
}

pub(super) struct Alone<I> {
    program: Program,
    limits: Limits,
    /// What one child may take, with what an id may.
    memory: u64,
    schema: Arc<Schema>,
    counts: Arc<WorkCounts>,
    /// One child a core, over all batches.
    seats: Semaphore,
    threads: usize,
    /// Children without a batch, no more than seats.
    idle: Mutex<Vec<Kid>>,
    ids: PhantomData<fn(I)>,
}

/// A child process that has said hello.
struct Kid {
    process: Child,
    stdin: ChildStdin,
    frames: Frames<ChildStdout>,
    last_words: Arc<Mutex<Vec<u8>>>,
    listening: JoinSet<()>,
    /// Memory that it had at its hello.
    base: u64,
}

/// How a child came to stop answering.
enum End {
    /// All ids are answered.
    Done,
    /// It is gone; whoever killed it, it was not this worker.
    Died,
    /// It was killed here: why.
    Ended(String),
}

impl<I: Id> Alone<I> {
    pub fn new(
        program: Program,
        threads: usize,
        limits: Limits,
        schema: Arc<Schema>,
        counts: Arc<WorkCounts>,
    ) -> Self {
        let memory = limits.memory.unwrap_or_else(|| host_memory() / threads as u64);
        let (seats, idle) = (Semaphore::new(threads), Mutex::default());
        Self { program, limits, memory, schema, counts, seats, threads, idle, ids: PhantomData }
    }

    pub async fn compute(&self, key: &BatchKey, ids: Vec<I>, last: bool) -> Result<Computed<I>, Error> {
        self.counts.alone.fetch_add(1, Ordering::Relaxed);
        let size = ids.len().div_ceil(self.threads * 4).clamp(1, CHUNK);
        let chunks: Vec<&[I]> = ids.chunks(size).collect();
        let next = AtomicUsize::new(0);
        let lanes = (0..self.threads.min(chunks.len())).map(|_| self.lane(key, &chunks, &next, last));
        let mut parts: Vec<(usize, Computed<I>)> = try_join_all(lanes).await?.into_iter().flatten().collect();
        parts.sort_unstable_by_key(|(number, _)| *number);
        Ok(parts.into_iter().fold(Computed::none(&self.schema), |mut whole, (_, part)| {
            whole.append(part);
            whole
        }))
    }

    /// One core's share: whatever chunk is next, until there is none.
    async fn lane(
        &self,
        key: &BatchKey,
        chunks: &[&[I]],
        next: &AtomicUsize,
        last: bool,
    ) -> Result<Vec<(usize, Computed<I>)>, Error> {
        let _seat = self.seats.acquire().await.expect("the semaphore is never closed");
        let mut kid = self.idle().pop();
        let mut parts = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = chunks.get(number) else { break };
            parts.push((number, self.chunk(&mut kid, key, chunk, last).await?));
        }
        self.idle().extend(kid);
        Ok(parts)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Kid>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Computes these ids with `kid`, and with as many others as they cost.
    async fn chunk(
        &self,
        kid: &mut Option<Kid>,
        key: &BatchKey,
        mut ids: &[I],
        last: bool,
    ) -> Result<Computed<I>, Error> {
        let mut part = Part { schema: &self.schema, computed: Computed::none(&self.schema), last };
        let mut killed = 0;
        while !ids.is_empty() {
            let mut child = match kid.take() {
                Some(child) => child,
                None => self.start().await?,
            };
            let begun = Instant::now();
            let (answered, end) = self.grind(&mut child, key, ids, &mut part).await;
            part.computed.spent.computing += begun.elapsed();
            ids = &ids[answered..];
            let reason = match end {
                End::Done => {
                    *kid = Some(child);
                    continue;
                }
                End::Ended(reason) => reason,
                End::Died => {
                    killed = if answered > 0 { 1 } else { killed + 1 };
                    match child.verdict(self.memory).await {
                        Verdict::Killed if killed < KILLED_TRIES => continue,
                        Verdict::Killed => {
                            "killed: signal 9, which is what the kernel does when memory runs out".into()
                        }
                        Verdict::Crashed(reason) => reason,
                    }
                }
            };
            killed = 0;
            self.counts.ended.fetch_add(1, Ordering::Relaxed);
            let BatchKey { run, batch, .. } = key;
            tracing::warn!(%run, batch, id = shown(&ids[0]), reason, "an id ended its process: it is a dead letter");
            part.dead(&ids[0], &reason);
            ids = &ids[1..];
        }
        Ok(part.computed)
    }

    /// Has the child compute these ids; how many it answered, and why no more.
    async fn grind(
        &self,
        child: &mut Kid,
        key: &BatchKey,
        ids: &[I],
        part: &mut Part<'_, I>,
    ) -> (usize, End) {
        let (mut sent, mut answered) = (0, 0);
        let mut age = Age::new();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while answered < ids.len() {
            if sent < ids.len() && sent - answered <= AHEAD / 2 {
                let upto = ids.len().min(answered + AHEAD);
                let mut frames = Vec::new();
                ids[sent..upto].iter().for_each(|id| frame(b'C', &id.to_bytes(), &mut frames));
                sent = upto;
                if child.stdin.write_all(&frames).await.is_err() {
                    // What it answered before it died is still in the pipe.
                    sent = ids.len();
                }
            }
            let answer = tokio::select! {
                biased;
                answer = child.frames.next() => answer,
                _ = look.tick() => {
                    if let Some(reason) = self.overrun(child, key, &ids[answered], &mut age) {
                        return (answered, End::Ended(reason));
                    }
                    continue;
                }
            };
            match answer {
                Ok(Some((kind, body))) => match part.take(&ids[answered], kind, &body) {
                    Ok(()) => (answered, age) = (answered + 1, Age::new()),
                    Err(fault) => {
                        return (answered, End::Ended(format!("crashed: its child process said: {fault}")));
                    }
                },
                Ok(None) => return (answered, End::Died),
                Err(fault) => {
                    return (answered, End::Ended(format!("crashed: its child process said: {fault}")));
                }
            }
        }
        (answered, End::Done)
    }

    /// Why the child must end, if the id in flight is beyond a hard limit. It is killed when it is dropped.
    fn overrun(&self, child: &mut Kid, key: &BatchKey, id: &I, age: &mut Age) -> Option<String> {
        age.grow();
        let Limits { soft, hard, .. } = self.limits;
        if soft.is_some_and(|soft| age.time >= soft) && !std::mem::replace(&mut age.told, true) {
            self.counts.slow.fetch_add(1, Ordering::Relaxed);
            slow(key, id);
        }
        if let Some(hard) = hard.filter(|hard| age.time >= *hard) {
            return Some(format!("timed out after {} s", hard.as_secs_f64()));
        }
        let taken = resident(&child.process).unwrap_or(0).saturating_sub(child.base);
        (taken > self.memory).then(|| out_of_memory(self.memory))
    }

    async fn start(&self) -> Result<Kid, Error> {
        let mut command = Command::new(&self.program.path);
        command.args([wire::ARGUMENT, &self.memory.to_string()]).stderr(Stdio::piped());
        let (mut process, stdin, stdout) = start_child(&self.program, command)?;
        let last_words = Arc::new(Mutex::default());
        let mut listening = JoinSet::new();
        if let Some(stderr) = process.stderr.take() {
            listening.spawn(listen(stderr, last_words.clone()));
        }
        let mut frames = Frames::new(stdout);
        check_hello(&self.program, &mut frames).await?;
        let base = resident(&process).unwrap_or(0);
        Ok(Kid { process, stdin, frames, last_words, listening, base })
    }
}

/// Rows of a chunk, as they come.
struct Part<'a, I> {
    schema: &'a Schema,
    computed: Computed<I>,
    last: bool,
}

impl<I: Id> Part<'_, I> {
    fn take(&mut self, id: &I, kind: u8, body: &Bytes) -> Result<(), String> {
        match Answer::read(kind, body).map_err(|fault| fault.to_string())? {
            Answer::Row(row) => {
                let row: Columns = postcard::from_bytes(row).map_err(|fault| fault.to_string())?;
                if !row.is_sound(self.schema, 1) {
                    return Err("a row that is none of the pipeline's".to_owned());
                }
                self.computed.ids.push(id.clone());
                self.computed.rows.ok_columns(row);
            }
            Answer::Reject(reason) => self.dead(id, reason),
            Answer::Again(reason) if self.last => self.dead(id, &gave_up(reason)),
            Answer::Again(reason) => self.computed.again.push((id.clone(), reason.to_owned())),
            Answer::Hello { .. } => return Err("hello a second time".to_owned()),
        }
        Ok(())
    }

    fn dead(&mut self, id: &I, reason: &str) {
        self.computed.ids.push(id.clone());
        self.computed.rows.dead(self.schema, reason);
    }
}

/// How long the id in flight has been computed.
struct Age {
    last: Instant,
    time: Duration,
    told: bool,
}

impl Age {
    fn new() -> Self {
        Self { last: Instant::now(), time: Duration::ZERO, told: false }
    }

    fn grow(&mut self) {
        let now = Instant::now();
        self.time += (now - self.last).min(LATE);
        self.last = now;
    }
}

/// What a dead child died of.
enum Verdict {
    /// Of a SIGKILL that this worker did not send.
    Killed,
    /// Of what the id did.
    Crashed(String),
}

impl Kid {
    async fn verdict(mut self, memory: u64) -> Verdict {
        // Its stdout is closed; a child that goes on nevertheless is ended.
        let _ended = tokio::time::timeout(LAST_WORDS_WITHIN, self.process.wait())
            .await
            .is_err()
            .then(|| self.process.start_kill());
        let status = self.process.wait().await;
        let heard = async { while self.listening.join_next().await.is_some() {} };
        let _cut_short = tokio::time::timeout(LAST_WORDS_WITHIN, heard).await;
        let words = self.last_words.lock().unwrap_or_else(PoisonError::into_inner);
        status.map_or_else(
            |error| Verdict::Crashed(format!("crashed: {error}")),
            |status| verdict(status, &String::from_utf8_lossy(&words), memory),
        )
    }
}

fn verdict(status: ExitStatus, last_words: &str, memory: u64) -> Verdict {
    use std::os::unix::process::ExitStatusExt;

    const SIGABRT: i32 = nix::sys::signal::Signal::SIGABRT as i32;
    const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;
    let line = last_words.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let said = if line.is_empty() { String::new() } else { format!(": {line}") };
    match (status.signal(), status.code()) {
        (Some(SIGABRT), _) if last_words.lines().any(|line| line.starts_with(NO_MEMORY)) => {
            Verdict::Crashed(out_of_memory(memory))
        }
        (Some(SIGKILL), _) => Verdict::Killed,
        (Some(signal), _) => Verdict::Crashed(format!("crashed: signal {signal}{said}")),
        (None, code) => Verdict::Crashed(format!("crashed: exit code {}{said}", code.unwrap_or(-1))),
    }
}

fn out_of_memory(limit: u64) -> String {
    format!("out of memory: limit {} MB", limit >> 20)
}

/// Keeps the end of what a child says on stderr.
async fn listen(mut stderr: ChildStderr, last_words: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = [0; 1024];
    while let Ok(read) = stderr.read(&mut chunk).await
        && read > 0
    {
        let mut words = last_words.lock().unwrap_or_else(PoisonError::into_inner);
        words.extend_from_slice(&chunk[..read]);
        let surplus = words.len().saturating_sub(LAST_WORDS);
        words.drain(..surplus);
    }
}

/// Starts a child that computes, with its pipes.
pub(super) fn start_child(
    program: &Program,
    mut command: Command,
) -> Result<(Child, ChildStdin, ChildStdout), Error> {
    // A group of its own: Ctrl-C at a terminal is for the worker.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).kill_on_drop(true);
    let mut child = command.spawn().map_err(|source| no_child(program, source))?;
    match (child.stdin.take(), child.stdout.take()) {
        (Some(stdin), Some(stdout)) => Ok((child, stdin, stdout)),
        _ => Err(no_child(program, "it has no pipes")),
    }
}

/// Waits until a child says that it computes this pipeline.
pub(super) async fn check_hello(program: &Program, frames: &mut Frames<ChildStdout>) -> Result<(), Error> {
    let hello = tokio::time::timeout(HELLO_WITHIN, frames.next()).await;
    let hello = hello.map_err(|_| no_child(program, "it did not say hello in two minutes"))?;
    let (kind, body) = hello
        .map_err(|source| no_child(program, source))?
        .ok_or_else(|| no_child(program, "it ended before it said hello; its stderr may say why"))?;
    match Answer::read(kind, &body) {
        Ok(Answer::Hello { version: wire::VERSION, pipeline }) if pipeline == program.pipeline => Ok(()),
        Ok(Answer::Hello { version, pipeline }) => {
            Err(no_child(program, format!("it speaks version {version} for pipeline `{pipeline}`")))
        }
        Ok(_) => Err(no_child(program, "it did not begin with hello")),
        Err(fault) => Err(no_child(program, fault)),
    }
}

fn no_child(program: &Program, source: impl Into<Source>) -> Error {
    Error::Child { program: program.path.display().to_string(), source: source.into() }
}

/// Memory that a process has in RAM, in bytes.
pub(super) fn resident(child: &Child) -> Option<u64> {
    const PAGE: u64 = 4096;
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", child.id()?)).ok()?;
    Some(statm.split(' ').nth(1)?.parse::<u64>().ok()? * PAGE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn told(raw: i32, last_words: &str) -> String {
        match verdict(ExitStatus::from_raw(raw), last_words, 512 << 20) {
            Verdict::Killed => "killed".to_owned(),
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
            assert_eq!(told(status, words), reason);
        }
    }
}
