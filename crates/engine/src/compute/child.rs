//! The other end of the pipes: a pipeline's binary as a child process that computes.
//!
//! It speaks over the pipes that were its stdin and stdout; whatever the user's function prints goes to stderr. The end
//! of its stdin means that nobody waits for its answers any more, and it leaves at once, whatever it computes.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream::Id;
use millstream::child::{self as wire, Answer, Frame, split};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};

use super::order::{self, BUSY, OVERDUE, OrderFrame, OverdueFrame, encode, encode_piece};
use super::watch::{Overdue, Watch};
use super::{AnyFunction, Function, Off, Order, Pool, install_panic_hook};

/// How often the pool's threads are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Looks after which the worker is told for how long threads had an id.
const LOOKS_TOLD: u32 = 10;
/// Frames read ahead of computing.
const AHEAD: usize = 64;
/// When memory runs out, the kernel ends children before workers: their ids are known, a worker's are many.
const OOM_SCORE: &str = "800";

/// If this process was started as a computing child, does that child's work and returns its exit code.
///
/// Must come before anything that starts threads, reads stdin or writes to stdout. `None` in every other process.
pub fn child_main(function: &AnyFunction) -> Option<ExitCode> {
    match function {
        AnyFunction::Numbers(function) => child(function),
        AnyFunction::Texts(function) => child(function),
    }
}

fn child<I: Id>(function: &Function<I>) -> Option<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ended = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [wire::ARGUMENT, memory] => alone(function, number(memory)),
        [order::ARGUMENT, threads, soft, hard] => {
            pool(function, number(threads) as usize, [soft, hard].map(limit))
        }
        _ => return None,
    };
    // Whoever started it sees the pipe's end; what went wrong is on stderr.
    Some(ended.map_or_else(
        |error| {
            complain(&error);
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    ))
}

#[expect(clippy::print_stderr, reason = "a child's only way to say what went wrong")]
fn complain(error: &io::Error) {
    eprintln!("a child that computes ends: {error}");
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

/// A limit in milliseconds; 0 for none.
fn limit(text: &str) -> Option<Duration> {
    Some(Duration::from_millis(number(text))).filter(|limit| !limit.is_zero())
}

/// One id at a time.
fn alone<I: Id>(function: &Function<I>, memory: u64) -> io::Result<()> {
    let mut out = take_stdout()?;
    leave_signals_to_the_worker()?;
    install_panic_hook();
    let frames = incoming()?;
    if memory > 0 {
        limit_memory(memory)?;
    }
    let mut bytes = Vec::new();
    Answer::Hello { version: wire::VERSION, pipeline: function.spec().name }.write(&mut bytes);
    out.write_all(&bytes)?;
    for (kind, body) in frames {
        let id = I::from_bytes(&body).filter(|_| kind == b'C');
        let id = id.ok_or_else(|| io::Error::other("the worker sent no id"))?;
        bytes.clear();
        function.typed.answer(&id, &mut bytes);
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// All ids of an order at once, on every core.
fn pool<I: Id>(
    function: &Function<I>,
    threads: usize,
    [soft, hard]: [Option<Duration>; 2],
) -> io::Result<()> {
    let out = Arc::new(Mutex::new(take_stdout()?));
    leave_signals_to_the_worker()?;
    let pool = Pool::start(function.clone(), threads).map_err(io::Error::other)?;
    let (hands, watched) = (pool.hands.clone(), out.clone());
    let mut watch = Watch::new(threads, soft, hard);
    std::thread::Builder::new().name("watch".into()).spawn(move || {
        loop {
            let (begun, mut busy) = (Instant::now(), 0);
            for _ in 0..LOOKS_TOLD {
                std::thread::sleep(LOOK);
                for Overdue { order, at, hard } in watch.look(&hands, LOOK) {
                    send(&watched, &encode(OVERDUE, &OverdueFrame { order, at, hard }));
                }
                busy += hands.iter().filter(|hand| hand.is_busy()).count() as u32;
            }
            let looks = f64::from(LOOKS_TOLD);
            send(&watched, &encode(BUSY, &begun.elapsed().mul_f64(f64::from(busy) / looks)));
        }
    })?;
    let mut hello = Vec::new();
    Answer::Hello { version: wire::VERSION, pipeline: function.spec().name }.write(&mut hello);
    send(&out, &hello);
    let open: Arc<Mutex<HashMap<u64, Off>>> = Arc::default();
    for (kind, body) in incoming()? {
        // The number of an order comes first in it.
        let (number, _) = postcard::take_from_bytes::<u64>(&body).map_err(io::Error::other)?;
        let mut orders = open.lock().unwrap_or_else(PoisonError::into_inner);
        match kind {
            order::ORDER => {}
            order::CALL_OFF => {
                drop(orders.remove(&number));
                continue;
            }
            _ => return Err(io::Error::other("the worker sent no order")),
        }
        let off = Off::default();
        let switch = off.0.clone();
        orders.insert(number, off);
        let (pool_, out, open) = (pool.clone(), out.clone(), open.clone());
        // Read on the pool too: unpacking a large batch is work.
        pool.spawn(move || {
            if let Err(fault) = grind(&pool_, &body, switch, &out) {
                complain(&fault);
                std::process::exit(1);
            }
            open.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        });
    }
    Ok(())
}

fn grind<I: Id>(pool: &Pool<I>, body: &[u8], off: Arc<AtomicBool>, out: &Mutex<File>) -> io::Result<()> {
    let frame: OrderFrame<'_> = postcard::from_bytes(body).map_err(io::Error::other)?;
    let OrderFrame { order: number, last, codec, count, block } = frame;
    let ids = I::unpack(codec, block, count).map_err(io::Error::other)?;
    let order = Order { number, ids, last, off };
    pool.grind(&order, &|piece| send(out, &encode_piece(number, &piece)));
    Ok(())
}

/// Writes whole frames, one after the other. Where nobody reads them, nobody needs this process.
fn send(out: &Mutex<File>, bytes: &[u8]) {
    let written = out.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes);
    if written.is_err() {
        std::process::exit(0);
    }
}

/// Frames from stdin, read by a thread of their own, which also notices the end while an id is computed.
fn incoming() -> io::Result<Receiver<(u8, Vec<u8>)>> {
    let (sender, receiver) = sync_channel(AHEAD);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let (mut stdin, mut bytes, mut chunk) = (io::stdin().lock(), Vec::new(), vec![0; 64 << 10]);
        loop {
            match stdin.read(&mut chunk) {
                Ok(read) if read > 0 => bytes.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => std::process::exit(0),
            }
            let mut start = 0;
            while let Ok(Some(Frame { kind, body, taken })) = split(&bytes[start..]) {
                if sender.send((kind, body.to_vec())).is_err() {
                    return;
                }
                start += taken;
            }
            bytes.drain(..start);
        }
    })?;
    Ok(receiver)
}

/// The pipe that was stdout, with stderr in its place: what the user's function prints must not get between frames.
fn take_stdout() -> io::Result<File> {
    let pipe = nix::unistd::dup(io::stdout())?;
    nix::unistd::dup2_stdout(io::stderr())?;
    Ok(pipe.into())
}

/// A supervisor's SIGTERM to the whole group, or Ctrl-C, is for the worker, which drains: this process ends with it.
fn leave_signals_to_the_worker() -> io::Result<()> {
    // Best effort: without it the kernel chooses by size alone.
    let _unprivileged = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    Ok([Signal::SIGINT, Signal::SIGTERM].into_iter().collect::<SigSet>().thread_block()?)
}

/// Allows this many bytes of data beyond what the process has now: an allocation beyond it fails.
fn limit_memory(bytes: u64) -> io::Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let has = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let has = has.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10;
    let most = has.saturating_add(bytes);
    Ok(setrlimit(Resource::RLIMIT_DATA, most, most)?)
}
