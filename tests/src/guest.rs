//! A function that makes itself at home: it starts programs, prints, uses rayon, loads, leaks, dies. The variable `GUEST`
//! says what it does.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use millstream::{Failure, Outcome, Pipeline};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Says what the function does.
pub const VARIABLE: &str = "GUEST";
/// With `lasts`, the id that lasts until there is [`GO`]; with `asks`, it asks for another attempt until then.
pub const LASTING: u64 = 77;
/// A file in the directory of the processes.
pub const GO: &str = "go";
/// The file there in which each id has a line for each time that it was begun.
pub const TIMES: &str = "times";

/// The function.
pub struct Guest;

/// The pipeline as a program, for one that is linked in another way than cargo would.
pub fn main() -> std::process::ExitCode {
    millstream_cli::main(Guest)
}

/// A row of [`Guest`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Said {
    /// What came of it.
    pub said: String,
}

impl Pipeline for Guest {
    const NAME: &'static str = "guest";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("said", "String")];
    type Id = u64;
    type Row = Said;

    fn start(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match doing().as_str() {
            "start" => std::thread::sleep(crate::micros("GUEST_MICROS")),
            "refuses" if !Path::new("model").exists() => return Err("no file `model`".into()),
            _ => {}
        }
        Ok(())
    }

    fn compute(&self, id: &u64) -> Outcome<Said> {
        crate::spin(crate::micros("GUEST_ID_MICROS"));
        let mut said = match doing().as_str() {
            "ends" => run("timeout", &["1", "sleep", "600"]),
            "reads" => run("wc", &["-c"]),
            "signals" => run("grep", &["-E", "^Sig(Blk|Ign):", "/proc/self/status"]),
            "descriptors" => run("ls", &["-l", "/proc/self/fd"]),
            "prints" => prints(*id),
            "floods" => floods(),
            "locks" => locks(),
            "spawns" => spawns(),
            "leaves" => leaves(*id),
            "helper" => helper(*id),
            "leaks" => leaks(),
            "opens" => match std::fs::File::open("/dev/null") {
                Ok(file) => {
                    std::mem::forget(file);
                    String::new()
                }
                Err(fault) => return Err(Failure::reject(format!("cannot open: {fault}"))),
            },
            "runs_on" => match std::thread::Builder::new().stack_size(32 << 10).spawn(std::thread::park) {
                Ok(_) => String::new(),
                Err(fault) => return Err(Failure::reject(format!("no thread: {fault}"))),
            },
            "loads" => loads(),
            "aborts" => aborts(*id),
            "panics" if *id % 10 == 3 => panic!("the reason of id {id}"),
            "recurses" => recurse(*id, if *id % 10 == 3 { 1 << 40 } else { 20_000 }).to_string(),
            "threads" => threads(*id),
            "lasts" => lasts(*id),
            "asks" => {
                note_time(*id);
                if *id == LASTING && !Path::new(GO).exists() {
                    return Err(Failure::retry("it is not told to go"));
                }
                String::new()
            }
            "service" => match Path::new("service").exists() {
                true => String::new(),
                false => return Err(Failure::retry("the service is away")),
            },
            "host" => match std::env::var_os("GUEST_BROKEN") {
                Some(_) => "failed: no file `model`".to_owned(),
                None => String::new(),
            },
            "forks" => forks(),
            "orphans" => run("sh", &["-c", "(sleep 0.2; sleep 0.1) & exec true"]),
            _ => String::new(),
        };
        if let Some(bytes) = std::env::var("GUEST_BYTES").ok().and_then(|text| text.parse().ok()) {
            said = crate::noise(*id, bytes);
        }
        if said.starts_with("failed: ") { Err(Failure::reject(said)) } else { Ok(Said { said }) }
    }
}

fn doing() -> String {
    std::env::var(VARIABLE).unwrap_or_default()
}

/// How a program ended, and what it said.
fn run(program: &str, arguments: &[&str]) -> String {
    // Its stdin is that of this process, as with any program that is not told otherwise.
    match Command::new(program).args(arguments).stdin(Stdio::inherit()).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ");
            format!("{} {said}", output.status.code().unwrap_or(-1))
        }
        Err(fault) => format!("failed: {fault}"),
    }
}

fn prints(id: u64) -> String {
    let _out = writeln!(std::io::stdout(), "out {id}");
    let _err = writeln!(std::io::stderr(), "err {id}");
    run("echo", &[]);
    let program = Command::new("sh").args(["-c", &format!("echo program {id}")]).status();
    program.map_or_else(|fault| format!("failed: {fault}"), |status| status.to_string())
}

fn floods() -> String {
    let line = "x".repeat(3000);
    for _ in 0..2000 {
        let _flood = writeln!(std::io::stdout(), "{line}");
    }
    String::new()
}

/// A lock around rayon: a thread that takes another id while it waits takes the lock twice.
fn locks() -> String {
    static LOCK: Mutex<()> = Mutex::new(());
    let _held = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let sum: u64 = (0..2000u32)
        .into_par_iter()
        .with_max_len(1)
        .map(|number| {
            crate::spin(Duration::from_micros(5));
            u64::from(number)
        })
        .sum();
    sum.to_string()
}

/// Waits without rayon for what rayon is to do.
fn spawns() -> String {
    let (sender, receiver) = mpsc::channel();
    rayon::spawn(move || {
        let _sent = sender.send(7);
    });
    receiver.recv().map_or_else(|fault| format!("failed: {fault}"), |seven: u64| seven.to_string())
}

/// Notes that an id is begun.
fn note_time(id: u64) {
    let file = std::fs::File::options().create(true).append(true).open(TIMES);
    let noted = file.and_then(|mut file| file.write_all(format!("{id}\n").as_bytes()));
    if let Err(fault) = noted {
        panic!("{TIMES}: {fault}");
    }
}

fn lasts(id: u64) -> String {
    note_time(id);
    while id == LASTING && !Path::new(GO).exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    String::new()
}

/// Id 3 starts programs that outlive it, one of them in a session of its own, and never ends.
fn leaves(id: u64) -> String {
    if id % 10 == 3 {
        let time = std::env::var("GUEST_SLEEP").unwrap_or_default();
        for words in [&["sleep", &time][..], &["setsid", "sleep", &time]] {
            let started = Command::new(words[0]).args(&words[1..]).spawn();
            drop(started);
        }
        crate::spin(Duration::MAX);
    }
    String::new()
}

/// Id 3 starts a program and crashes.
fn helper(id: u64) -> String {
    if id % 10 == 3 {
        drop(Command::new("sleep").arg(std::env::var("GUEST_SLEEP").unwrap_or_default()).spawn());
        std::process::abort();
    }
    String::new()
}

fn leaks() -> String {
    std::mem::forget(vec![1u8; 2 << 20]);
    String::new()
}

fn loads() -> String {
    static MODEL: OnceLock<()> = OnceLock::new();
    MODEL.get_or_init(|| std::thread::sleep(crate::micros("GUEST_MICROS")));
    String::new()
}

/// A panic that cannot unwind ends the process, as all do with `panic = "abort"`.
extern "C" fn cannot_unwind(id: u64) {
    assert!(id % 10 != 3, "the reason of id {id}");
}

fn aborts(id: u64) -> String {
    cannot_unwind(id);
    String::new()
}

#[expect(unconditional_recursion, reason = "that is the point: the depth is bounded by the stack alone")]
fn endless(depth: u64) -> u64 {
    let room = std::hint::black_box([depth; 64]);
    endless(depth + 1).wrapping_add(room[7])
}

fn recurse(id: u64, depth: u64) -> u64 {
    if depth > 1 << 30 {
        return endless(id);
    }
    let room = std::hint::black_box([depth; 16]);
    if depth == 0 { id } else { recurse(id, depth - 1).wrapping_add(room[3] - room[4]) }
}

/// Id 3 asks for more threads than its memory limit has stacks for.
fn threads(id: u64) -> String {
    let many = if id % 10 == 3 { 200 } else { 2 };
    let (mut threads, mut said) = (Vec::new(), String::new());
    for _ in 0..many {
        match std::thread::Builder::new().spawn(std::thread::park) {
            Ok(thread) => threads.push(thread),
            Err(fault) => said = format!("failed: no thread: {fault}"),
        }
    }
    for thread in threads {
        thread.thread().unpark();
        if thread.join().is_err() {
            said = "failed: no thread: it could not begin".to_owned();
        }
    }
    said
}

/// A shell forks; the function itself cannot without `unsafe`.
fn forks() -> String {
    run("sh", &["-c", "(sleep 0.1; true) & wait; echo done"])
}
