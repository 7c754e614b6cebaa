//! A child process that computes, from the worker's side: starting, reading, missing and ending it.
//!
//! The process gets a clean environment for the user's code. Its stdin is /dev/null, its output goes through a pipe
//! into the log. Frames go over a socket that it connects to once it runs, so programs that it starts inherit neither.
//! It leads a group that the worker kills as a whole (`group`). Only its exit counts as its end, because other
//! processes may hold copies of its descriptors.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use millstream::child::{self as wire, Answer};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::time::{Interval, MissedTickBehavior};

use super::frames::Frames;
use super::group::{Group, MARK, mark_of};
use super::output::{LAST_WORDS_WITHIN, Output, Said};
use crate::error::{Error, Source};
use crate::model::moment::length;

/// How often the worker polls a process.
const POLL: Duration = Duration::from_millis(20);
/// A poll that comes later than this counts as punctual, because the worker itself was stopped meanwhile.
const LATE: Duration = Duration::from_secs(1);
/// How long a pipeline's `main` may take until it calls Millstream.
const HELLO_WITHIN: Duration = Duration::from_secs(120);
/// A process that is silent for so long is stopped, or hangs in the kernel: it sends a sign of life every second.
pub(crate) const SILENT: Duration = Duration::from_secs(30);
/// How long a killed process may take to end.
const END_WITHIN: Duration = Duration::from_secs(5);

/// What a child is started from.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub path: PathBuf,
    /// The pipeline that the child must announce.
    pub pipeline: &'static str,
    /// How long the pipeline's `start` may take.
    pub start_within: Duration,
}

/// A child that runs and is connected.
pub(super) struct Process {
    // The first field to be dropped: the group must be killed before its leader is reaped.
    group: Group,
    child: Child,
    frames: Frames<OwnedReadHalf>,
    output: Output,
    poll: Interval,
    /// Time since the last sign of life, without time for which the worker itself was stopped.
    silence: Age,
    polled: Instant,
    ended: bool,
    /// A frame that was read behind printed lines.
    waiting: Option<(u8, Bytes)>,
}

/// Time measured in polls.
#[derive(Debug)]
pub(super) struct Age {
    last: Instant,
    pub time: Duration,
}

/// Events of a process.
#[derive(Debug)]
pub(super) enum News {
    /// The process sent a frame.
    Frame(u8, Bytes),
    /// The process printed this, before any later frame.
    Printed(Vec<Said>),
    /// The process has ended.
    Gone,
    /// The process is silent.
    Silent,
    /// The process sends malformed frames.
    Broken(io::Error),
    /// Time has passed.
    Look,
}

impl Age {
    pub fn new() -> Self {
        Self { last: Instant::now(), time: Duration::ZERO }
    }

    /// Skips time that does not count.
    pub fn rest(&mut self) {
        self.last = Instant::now();
    }

    pub fn grow(&mut self) {
        let now = Instant::now();
        self.time += (now - self.last).min(LATE);
        self.last = now;
    }
}

impl Process {
    /// Starts `program` with the socket's address and these arguments, and waits until the pipeline's `start` is over.
    pub async fn start(
        program: &Program,
        argument: &str,
        arguments: &[String],
    ) -> Result<(Self, OwnedWriteHalf), Error> {
        let no_child = |source: Source| no_child(program, source);
        let (address, listener) = listen().map_err(|source| no_child(source.into()))?;
        let (mut command, reader) =
            command(program, argument, &address, arguments).map_err(|source| no_child(source.into()))?;
        let child = command.spawn().map_err(|source| no_child(source.into()))?;
        // Otherwise the parent's copies would keep the other end of the pipe open.
        drop(command);
        let pid = child.id().unwrap_or(0);
        let mark = wire::mark(&address);
        let group = Group::of(pid, address);
        let mut output = Output::new(reader, mark).map_err(|source| no_child(source.into()))?;
        let connected = tokio::time::timeout(HELLO_WITHIN, connected(&listener, &group, pid, &mut output));
        let stream = match connected.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(fault)) => return Err(no_child(format!("{fault}{}", said(&output.last_words())).into())),
            Err(_) => return Err(no_child("its `main` did not call Millstream within two minutes".into())),
        };
        let (from, to) = stream.into_split();
        let mut poll = tokio::time::interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut process = Self {
            group,
            child,
            frames: Frames::new(from),
            output,
            poll,
            silence: Age::new(),
            polled: Instant::now(),
            ended: false,
            waiting: None,
        };
        process.hello(program).await.map_err(no_child)?;
        Ok((process, to))
    }

    /// Waits until the process announces this pipeline, and that it is ready.
    async fn hello(&mut self, program: &Program) -> Result<(), Source> {
        let begun = Instant::now();
        let mut met = false;
        loop {
            match self.next().await {
                News::Frame(kind, body) => match Answer::read(kind, &body)? {
                    Answer::Hello { version: wire::VERSION, pipeline } if pipeline == program.pipeline => {
                        met = true;
                    }
                    Answer::Hello { version, pipeline } => {
                        return Err(format!("it speaks version {version} for pipeline `{pipeline}`").into());
                    }
                    Answer::Started if met => {
                        self.output.forget();
                        return Ok(());
                    }
                    Answer::NotStarted(reason) => return Err(reason.into()),
                    _ => return Err("it did not begin with hello".into()),
                },
                News::Printed(lines) => print(lines, None),
                News::Look if begun.elapsed() > program.start_within => {
                    let limit = length(program.start_within);
                    return Err(format!(
                        "the pipeline's `start` took longer than its limit of {limit} (`start_within`, of the \
                                        pipeline's limits or of [work])"
                    )
                    .into());
                }
                News::Look => {}
                News::Gone => {
                    let ended = self.end(true).await;
                    return Err(format!("it ended before it could compute: {ended}").into());
                }
                News::Silent => return Err(silent().into()),
                News::Broken(fault) => return Err(fault.into()),
            }
        }
    }

    /// The next event, sooner or later. Cancel safe.
    pub async fn next(&mut self) -> News {
        loop {
            // Polls in time even if the process sends a lot.
            if self.polled.elapsed() > POLL * 10 {
                return self.poll_now();
            }
            if let Some((kind, body)) = self.waiting.take() {
                return News::Frame(kind, body);
            }
            // `select!` picks at random if both are ready: a flood of lines must not delay answers.
            let frame = tokio::select! {
                said = self.output.next() => if said.is_empty() { continue } else { return News::Printed(said) },
                frame = self.frames.next() => frame,
                _ = self.poll.tick() => return self.poll_now(),
            };
            self.silence = Age::new();
            match frame {
                Ok(Some((wire::BEAT, _))) => {}
                Ok(Some(frame)) => {
                    self.waiting = Some(frame);
                    let said = self.output.there();
                    if !said.is_empty() {
                        return News::Printed(said);
                    }
                }
                // A child that closes its socket will answer nothing.
                Ok(None) => return News::Gone,
                Err(fault) if fault.kind() == io::ErrorKind::InvalidData => return News::Broken(fault),
                Err(_) => return News::Gone,
            }
        }
    }

    fn poll_now(&mut self) -> News {
        if self.ended {
            return self.last_news();
        }
        self.ended = self.group.has_ended();
        self.silence.grow();
        self.polled = Instant::now();
        if let Some(line) = self.output.tell_left_out(false) {
            return News::Printed(vec![line]);
        }
        if self.silence.time > SILENT { News::Silent } else { News::Look }
    }

    /// The rest of what the process sent before its end, then [`News::Gone`].
    fn last_news(&mut self) -> News {
        loop {
            let frame = match self.waiting.take() {
                Some(frame) => frame,
                None => match self.frames.next().now_or_never() {
                    Some(Ok(Some(frame))) => frame,
                    Some(Err(fault)) if fault.kind() == io::ErrorKind::InvalidData => {
                        return News::Broken(fault);
                    }
                    _ => return News::Gone,
                },
            };
            if frame.0 != wire::BEAT {
                return News::Frame(frame.0, frame.1);
            }
        }
    }

    /// Skips a time in which the worker did not listen to the process.
    pub fn listen_again(&mut self) {
        self.silence = Age::new();
    }

    /// How long the process has been silent.
    pub fn silence(&self) -> Duration {
        self.silence.time
    }

    /// Resident memory of the process, in bytes.
    pub fn resident(&self) -> u64 {
        const PAGE: u64 = 4096;
        let statm =
            self.child.id().and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/statm")).ok());
        statm.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok()).unwrap_or(0) * PAGE
    }

    /// Ends the whole group. With `by_itself` the leader first gets time to end by itself.
    pub async fn end(&mut self, by_itself: bool) -> Ended {
        let limit = Instant::now() + if by_itself { LAST_WORDS_WITHIN } else { Duration::ZERO };
        while !self.group.has_ended() && Instant::now() < limit {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.group.kill();
        let status = match tokio::time::timeout(END_WITHIN, self.child.wait()).await {
            Ok(status) => status,
            Err(_) => Err(io::Error::other("it is killed and does not end: it hangs in the kernel")),
        };
        let mut said = Vec::new();
        let heard = async {
            while !self.output.has_ended() {
                said.extend(self.output.next().await);
            }
        };
        let _cut_short = tokio::time::timeout(LAST_WORDS_WITHIN, heard).await;
        said.extend(self.output.rest());
        said.extend(self.output.tell_left_out(true));
        Ended { status, said, last_words: self.output.last_words() }
    }
}

/// How a process ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub status: io::Result<ExitStatus>,
    /// Its last printed lines.
    pub said: Vec<Said>,
    /// The end of its output.
    pub last_words: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.status {
            Ok(status) => write!(to, "{status}{}", said(&self.last_words)),
            Err(fault) => fault.fmt(to),
        }
    }
}

/// The reason text for a silent process.
pub(super) fn silent() -> String {
    format!("its process gave no sign for {} s: it was stopped, or hung in the kernel", SILENT.as_secs())
}

/// The last line of the output, behind a colon.
pub(super) fn said(last_words: &str) -> String {
    let line = last_words.lines().rev().map(str::trim).find(|line| !line.is_empty());
    line.map_or_else(String::new, |line| format!(": {line}"))
}

/// Logs lines of the user's code with what was in progress: run, batch and id, as far as known.
pub(super) fn print(said: Vec<Said>, about: Option<(&str, &str, &str)>) {
    let (run, batch, id) = about.unwrap_or_default();
    let lines = said.into_iter().filter_map(|said| match said {
        Said::Line(line) => Some(line),
        Said::Next => None,
    });
    for line in lines {
        match (run, batch, id) {
            ("", "", _) => tracing::info!(line, "the pipeline printed"),
            ("", batches, _) => tracing::info!(batches, line, "the function printed"),
            (_, _, "") => tracing::info!(run, batch, line, "the function printed"),
            _ => tracing::info!(run, batch, id, line, "the function printed"),
        }
    }
}

/// A listening address that only this process and its child know.
fn listen() -> io::Result<(String, UnixListener)> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    // The system seeds `RandomState`: two containers may share a network and have equal process ids.
    let random = RandomState::new().hash_one(number);
    let name = mark_of(std::process::id(), number, random);
    let listener = StdListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    listener.set_nonblocking(true)?;
    Ok((name, UnixListener::from_std(listener)?))
}

fn command(
    program: &Program,
    argument: &str,
    address: &str,
    arguments: &[String],
) -> io::Result<(Command, io::PipeReader)> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new(&program.path);
    // The child recognizes the pipe by this number.
    let pipe = nix::sys::stat::fstat(&reader)?.st_ino;
    command.arg(argument).arg(address).arg(pipe.to_string()).args(arguments).env(MARK, address);
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    // A process group of its own, because Ctrl-C at a terminal is meant for the worker.
    command.process_group(0).kill_on_drop(true);
    Ok((command, reader))
}

/// Waits until the child connects, and refuses all other connections.
async fn connected(
    listener: &UnixListener,
    group: &Group,
    pid: u32,
    output: &mut Output,
) -> io::Result<tokio::net::UnixStream> {
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                if stream.peer_cred()?.pid() == Some(pid as i32) {
                    return Ok(stream);
                }
            }
            lines = output.next() => print(lines, None),
            () = tokio::time::sleep(POLL) => if group.has_ended() {
                return Err(io::Error::other("it ended before it called Millstream's command line"));
            }
        }
    }
}

pub(super) fn no_child(program: &Program, source: impl Into<Source>) -> Error {
    Error::Child { program: program.path.display().to_string(), source: source.into() }
}
