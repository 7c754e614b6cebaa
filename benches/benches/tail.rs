//! The tail of a run: how long the first core to run out of work waits for the last, with one to four workers of one
//! thread each on this machine, for `factor` on ids whose cost varies a thousandfold.
//!
//! A worker's core counts as idle from the moment after which its pool process took no more time of the CPU than its watch
//! does. `TAIL_IDS` says how many ids.

#![expect(clippy::print_stdout, reason = "printing figures is what it does")]

use std::time::{Duration, Instant};

use benches::{Stage, Up};

const FACTOR: &str = env!("CARGO_BIN_EXE_bench-factor");
/// Large numbers: some are products of two large primes, most are not.
const FIRST: u64 = 1_000_000_000_000_000_000;
const LOOK: Duration = Duration::from_millis(50);
/// A pool is busy while it took this many ticks (10 ms) of the CPU in so many looks; four share two cores here.
const BUSY: (u64, usize) = (4, 4);

fn main() {
    let ids = std::env::var("TAIL_IDS").ok().and_then(|text| text.parse().ok()).unwrap_or(400_000u64);
    println!("factor, {ids} ids from {FIRST} on, batches of the size that `auto` chooses");
    println!("  {:>7} {:>9} {:>9} {:>9} {:>9}", "workers", "batches", "seconds", "tail s", "tail %");
    for workers in 1..=4 {
        measure(workers, ids);
    }
    println!("  (target: the tail under 2 s, or under 5 %)");
}

fn measure(workers: usize, ids: u64) {
    let up = Up::start(FACTOR);
    let _sink = up.start_stage(&["sink"]);
    let workers: Vec<Stage> = (0..workers).map(|_| up.start_stage(&["work", "--threads", "1"])).collect();
    let range = format!("{FIRST}..{}", FIRST + ids);
    let mut producer =
        up.command(&["produce", "--run", "m", "--ids", &range]).spawn().expect("the binary starts");
    let mut pools: Vec<Pool> = workers.iter().map(|worker| Pool::of(worker.id())).collect();
    let mut asked = Instant::now();
    loop {
        std::thread::sleep(LOOK);
        pools.iter_mut().for_each(Pool::look);
        if asked.elapsed() > Duration::from_secs(1) {
            asked = Instant::now();
            if up.is_sealed("m") {
                break;
            }
        }
    }
    assert!(producer.wait().expect("it ended").success());
    let status = up.status("m").expect("a status");
    let ends: Vec<Instant> = pools.iter().filter_map(|pool| pool.busy).collect();
    let (first, last) = (ends.iter().min().expect("one worker"), ends.iter().max().expect("one worker"));
    let (tail, seconds) = ((*last - *first).as_secs_f64(), status["seconds"].as_f64().expect("seconds"));
    println!(
        "  {:>7} {:>9} {seconds:>9.1} {tail:>9.2} {:>9.1}",
        workers.len(),
        status["batches"],
        100.0 * tail / seconds
    );
}

/// The pool process of a worker.
struct Pool {
    worker: u32,
    pid: Option<u32>,
    ticks: Vec<u64>,
    /// When it was busy last.
    busy: Option<Instant>,
}

impl Pool {
    fn of(worker: u32) -> Self {
        Self { worker, pid: None, ticks: Vec::new(), busy: None }
    }

    fn look(&mut self) {
        self.pid = self.pid.or_else(|| pool_of(self.worker));
        let Some(ticks) = self.pid.and_then(ticks_of) else { return };
        self.ticks.push(ticks);
        let (most, looks) = BUSY;
        if self.ticks.len() > looks && ticks - self.ticks[self.ticks.len() - 1 - looks] >= most {
            self.busy = Some(Instant::now());
        }
    }
}

/// The child of a worker that computes.
fn pool_of(worker: u32) -> Option<u32> {
    children_of(worker).into_iter().find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("__compute-pool")
    })
}

/// Children that any thread of a process has started.
fn children_of(process: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    children
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Time of the CPU that a process took, in ticks of 10 ms.
fn ticks_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}
