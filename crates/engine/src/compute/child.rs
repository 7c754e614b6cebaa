//! The child's end of the socket: a pipeline's binary as a process that computes.
//!
//! The user's code owns stdin, stdout and stderr. The protocol uses a socket that this process connects to, which is
//! closed in every program that the user's code starts. When the connection ends, the answers have no use, so this
//! process ends at once with everything that it started.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream::Id;
use millstream::child::{self as wire, Answer, Frame, frame, split};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use tokio::signal::unix::{SignalKind, signal};

use super::ahead::Ahead;
use super::cgroup;
use super::function::{AnyFunction, Function};
use super::group::{end_a_copy, end_own};
use super::guard::{ask_when_ids_fail, install_panic_hook, tell_panics};
use super::leaks::Leaks;
use super::order::{Off, Order};
use super::pool::{Pool, Shared};
use super::protocol::{self, BUSY, OVERDUE, OrderFrame, OverdueFrame, encode, encode_piece};
use super::watch::{Overdue, Watch};

/// How often the watch polls the pool's threads.
const POLL: Duration = Duration::from_millis(100);
/// Polls after which the watch reports to the worker for how long threads had an id.
const POLLS_A_REPORT: u32 = 10;
/// How often the process sends a sign of life.
const BEAT: Duration = Duration::from_secs(1);
/// Frames that may be read ahead of computing.
const AHEAD: usize = 64;
/// OOM score. The kernel then kills children before workers: a child's ids are known, a worker holds many more.
const OOM_SCORE: &str = "800";

/// If this process was started as a computing child, runs that child and returns its exit code.
///
/// Call it before anything starts a thread. Returns `None` in every other process.
pub fn child_main(function: &AnyFunction) -> Option<ExitCode> {
    match function {
        AnyFunction::Numbers(function) => child(function),
        AnyFunction::Texts(function) => child(function),
    }
}

fn child<I: Id>(function: &Function<I>) -> Option<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ended = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [wire::ARGUMENT, address, pipe, memory] => {
            let mark = Mark::new(address, number(pipe));
            connect(address).and_then(|socket| isolated(function, socket, mark, number(memory)))
        }
        [protocol::ARGUMENT, address, _, threads, soft, hard] => connect(address)
            .and_then(|socket| pool(function, socket, number(threads) as usize, [soft, hard].map(limit))),
        _ => return None,
    };
    // The worker sees the connection end; its log holds the reason.
    Some(ended.map_or_else(
        |error| {
            complain(&error);
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    ))
}

#[expect(clippy::print_stderr, reason = "goes to the worker, which logs it")]
fn complain(error: &io::Error) {
    eprintln!("the compute process ends: {error}");
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

/// A limit, given in milliseconds; 0 means none.
fn limit(text: &str) -> Option<Duration> {
    Some(Duration::from_millis(number(text))).filter(|limit| !limit.is_zero())
}

/// Connects to the worker, and resets the environment before the user's code runs.
fn connect(address: &str) -> io::Result<Socket> {
    clean_signals()?;
    // Best effort: without it the kernel chooses by size alone.
    let _unprivileged = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(address)?)?;
    let writing = stream.try_clone()?;
    Ok(Socket { stream, sender: Sender(Arc::new(Mutex::new(writing))) })
}

/// Unblocks all signals, and catches SIGINT, SIGTERM, SIGHUP and SIGQUIT: they are meant for the worker, which drains
/// and then ends this process. They are not ignored, because programs that the user's code starts would inherit that. A
/// shell ignores some of them for a worker in the background.
fn clean_signals() -> io::Result<()> {
    SigSet::all().thread_unblock()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let _entered = runtime.enter();
    // The handlers stay installed when these values are dropped.
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()] {
        drop(signal(kind)?);
    }
    Ok(())
}

struct Socket {
    stream: UnixStream,
    sender: Sender,
}

/// Sends whole frames, one after the other. Clones share one socket.
#[derive(Clone)]
struct Sender(Arc<Mutex<UnixStream>>);

impl Sender {
    /// Sends frames. Ends the process if the worker no longer takes them.
    fn send(&self, frames: &[u8]) {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(frames).is_err() {
            end_own();
        }
    }

    fn answer(&self, answer: &Answer<'_>) {
        let mut bytes = Vec::new();
        answer.write(&mut bytes);
        self.send(&bytes);
    }

    /// Reports the outcome of `start`, and ends the process if it failed.
    fn started<T>(&self, started: Result<T, String>) -> io::Result<T> {
        match started {
            Ok(ready) => {
                self.answer(&Answer::Started);
                Ok(ready)
            }
            Err(reason) => {
                self.answer(&Answer::NotStarted(&reason));
                Err(io::Error::other(reason))
            }
        }
    }
}

/// Writes a mark into the output where the next id begins, so that the worker can assign lines to ids.
struct Mark {
    to: Option<File>,
    line: Vec<u8>,
}

impl Mark {
    /// The mark writer. The pipeline's `main` may have redirected stdout, stderr or both: then no mark is written
    /// there.
    fn new(address: &str, pipe: u64) -> Self {
        let opened = [io::stdout().as_fd().try_clone_to_owned(), io::stderr().as_fd().try_clone_to_owned()];
        let mut files = opened.into_iter().flatten().map(File::from);
        let to = files.find(|file| file.metadata().is_ok_and(|metadata| metadata.ino() == pipe));
        Self { to, line: (wire::mark(address) + "\n").into_bytes() }
    }

    fn write(&mut self) {
        if let Some(to) = &mut self.to {
            // Once the worker stops reading, the end of the socket ends this process.
            let _unread = to.write_all(&self.line);
        }
    }
}

/// Runs an isolated process: one id at a time.
fn isolated<I: Id>(function: &Function<I>, socket: Socket, mut mark: Mark, memory: u64) -> io::Result<()> {
    let sender = socket.sender.clone();
    sender.answer(&Answer::Hello { version: wire::VERSION, pipeline: function.spec().name });
    let process = std::process::id();
    let busy = Arc::new(AtomicBool::new(true));
    let ahead = Arc::<Ahead>::default();
    let noting = ahead.clone();
    let beating =
        beat(&sender, &busy).and_then(|()| incoming(socket, move |kind, body| noting.note(kind, body)));
    let frames = beating.map_err(|fault| threads_refused(1, &fault));
    let started = frames.and_then(|frames| function.typed.start().map(|()| frames));
    if memory > 0 && started.is_ok() {
        // After `start`: what `start` loaded counts for no id.
        limit_memory(memory)?;
    }
    busy.store(false, Ordering::Relaxed);
    let frames = sender.started(started)?;
    let witness = sender.clone();
    tell_panics(move |panic| witness.answer(&Answer::Panicked(panic)));
    let leaks = watch_leaks();
    let mut bytes = Vec::new();
    let mut numbers = 0..;
    for (kind, body) in frames {
        if kind == wire::FORGET {
            sender.answer(&Answer::Forgotten);
            continue;
        }
        if numbers.next().is_some_and(|number| ahead.is_forgotten(number)) {
            continue;
        }
        let id = I::from_bytes(&body).filter(|_| kind == b'C');
        let id = id.ok_or_else(|| io::Error::other("the worker sent no id"))?;
        bytes.clear();
        mark.write();
        busy.store(true, Ordering::Relaxed);
        function.typed.answer(&id, &mut bytes);
        busy.store(false, Ordering::Relaxed);
        end_a_copy(process);
        leaks.computed(1);
        sender.send(&bytes);
    }
    Ok(())
}

/// Makes this process end once ids have used up its files or threads.
fn watch_leaks() -> Arc<Leaks> {
    let leaks = Arc::new(Leaks::new());
    let asked = leaks.clone();
    ask_when_ids_fail(move || asked.look());
    leaks
}

/// Starts a thread that sends a sign of life every second while ids are in progress.
fn beat(sender: &Sender, busy: &Arc<AtomicBool>) -> io::Result<()> {
    let sender = sender.clone();
    let busy = busy.clone();
    let mut beat = Vec::new();
    frame(wire::BEAT, &[], &mut beat);
    let thread = std::thread::Builder::new().name("beat".into()).spawn(move || {
        loop {
            std::thread::sleep(BEAT);
            if busy.load(Ordering::Relaxed) {
                sender.send(&beat);
            }
        }
    });
    thread.map(drop)
}

/// Runs a pool process: all ids of an order at once, on every core.
fn pool<I: Id>(
    function: &Function<I>,
    socket: Socket,
    threads: usize,
    limits: [Option<Duration>; 2],
) -> io::Result<()> {
    let sender = socket.sender.clone();
    sender.answer(&Answer::Hello { version: wire::VERSION, pipeline: function.spec().name });
    install_panic_hook();
    let started = Arc::new(AtomicBool::new(false));
    let ready = Pool::start(function.clone(), threads)
        .map_err(|error| threads_refused(threads * 2, &error))
        .and_then(|pool| {
            let watched = watch(&sender, pool.shared(), limits, started.clone());
            let frames = watched.and_then(|()| incoming(socket, |_, _| {}));
            let frames = frames.map_err(|fault| threads_refused(2, &fault))?;
            function.typed.start().map(|()| (pool, frames))
        });
    let (pool, frames) = sender.started(ready)?;
    started.store(true, Ordering::Relaxed);
    // Several ids are in progress, so no single one is to blame: isolated processes find out which.
    watch_leaks().computed(1);
    take_orders(&pool, frames, &sender)
}

/// Starts a thread that polls the pool's threads, reports to the worker, and relieves threads whose id takes long. It
/// needs nothing of the user's code.
fn watch<I: Id>(
    sender: &Sender,
    pool: Arc<Shared<I>>,
    [soft, hard]: [Option<Duration>; 2],
    started: Arc<AtomicBool>,
) -> io::Result<()> {
    let sender = sender.clone();
    let mut watch = Watch::new(pool.hands().len(), soft, hard);
    let mut beat = Vec::new();
    frame(wire::BEAT, &[], &mut beat);
    let thread = std::thread::Builder::new().name("watch".into()).spawn(move || {
        loop {
            let begun = Instant::now();
            let mut busy = 0;
            for _ in 0..POLLS_A_REPORT {
                std::thread::sleep(POLL);
                let overdue = watch.look(pool.hands(), POLL);
                // First relieve: an order may end because of an overdue id.
                pool.relieve(&watch);
                for Overdue { order, at, hard } in overdue {
                    sender.send(&encode(OVERDUE, &OverdueFrame { order, at, hard }));
                }
                busy += pool.hands().iter().filter(|hand| hand.is_busy()).count() as u32;
            }
            let polls = f64::from(POLLS_A_REPORT);
            if started.load(Ordering::Relaxed) {
                sender.send(&encode(BUSY, &begun.elapsed().mul_f64(f64::from(busy) / polls)))
            } else {
                sender.send(&beat)
            }
        }
    });
    thread.map(drop)
}

fn take_orders<I: Id>(pool: &Pool<I>, frames: Receiver<(u8, Vec<u8>)>, sender: &Sender) -> io::Result<()> {
    let open: Arc<Mutex<HashMap<u64, Off>>> = Arc::default();
    for (kind, body) in frames {
        // The order's number comes first in the frame.
        let (number, _) = postcard::take_from_bytes::<u64>(&body).map_err(io::Error::other)?;
        let mut orders = open.lock().unwrap_or_else(PoisonError::into_inner);
        match kind {
            protocol::ORDER => {}
            protocol::CALL_OFF => {
                drop(orders.remove(&number));
                continue;
            }
            _ => return Err(io::Error::other("the worker sent no order")),
        }
        let off = Off::default();
        let switch = off.0.clone();
        orders.insert(number, off);
        let sender = sender.clone();
        let open = open.clone();
        let over = move || drop(open.lock().unwrap_or_else(PoisonError::into_inner).remove(&number));
        // Unpacking a large batch is CPU work, so the pool does it.
        pool.spawn(move |shared| {
            if let Err(fault) = begin(shared, &body, switch, sender, over) {
                complain(&fault);
                std::process::exit(1);
            }
        });
    }
    Ok(())
}

fn begin<I: Id>(
    pool: &Shared<I>,
    body: &[u8],
    off: Arc<AtomicBool>,
    sender: Sender,
    over: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let frame: OrderFrame<'_> = postcard::from_bytes(body).map_err(io::Error::other)?;
    let OrderFrame { order: number, last, codec, count, block } = frame;
    let ids = I::unpack(codec, block, count).map_err(io::Error::other)?;
    let order = Order { number, ids, last, off };
    pool.begin(order, move |_, piece| sender.send(&encode_piece(number, &piece)), over);
    Ok(())
}

/// Frames from the worker, read by a thread of their own, which also notices the connection's end while an id is
/// computed. `note` sees each frame before it is passed on.
fn incoming(
    socket: Socket,
    note: impl Fn(u8, &[u8]) + Send + 'static,
) -> io::Result<Receiver<(u8, Vec<u8>)>> {
    let (sender, receiver) = sync_channel(AHEAD);
    std::thread::Builder::new().name("frames".into()).spawn(move || {
        let mut from = socket.stream;
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 64 << 10];
        loop {
            match from.read(&mut chunk) {
                Ok(read) if read > 0 => bytes.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => end_own(),
            }
            let mut start = 0;
            loop {
                match split(&bytes[start..]) {
                    Ok(Some(Frame { kind, body, taken })) => {
                        note(kind, body);
                        if sender.send((kind, body.to_vec())).is_err() {
                            return;
                        }
                        start += taken;
                    }
                    Ok(None) => break,
                    Err(fault) => {
                        complain(&io::Error::other(fault));
                        end_own();
                    }
                }
            }
            bytes.drain(..start);
        }
    })?;
    Ok(receiver)
}

/// Why the system gave no threads, with its limits.
fn threads_refused(threads: usize, fault: &dyn std::error::Error) -> String {
    let limit = getrlimit(Resource::RLIMIT_NPROC)
        .map_or_else(|fault| fault.to_string(), |(soft, _)| soft.to_string());
    let pids = match cgroup::processes() {
        Some((most, now)) => format!("; its control group has {now} of {most} processes"),
        None => String::new(),
    };
    let cause = crate::error::full_cause(fault);
    format!(
        "this host gives no {threads} threads: {cause} (processes of this user, `ulimit -u`: {limit} at most{pids})"
    )
}

/// Allows `bytes` of data more than the process has now: a larger allocation fails.
fn limit_memory(bytes: u64) -> io::Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let has = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let has = has.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10;
    let most = has.saturating_add(bytes);
    Ok(setrlimit(Resource::RLIMIT_DATA, most, most)?)
}
