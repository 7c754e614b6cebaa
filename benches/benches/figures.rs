//! Five figures, each beside its bound from the same run:
//!
//! 1. end-to-end ids/s of `collatz` against the bare ClickHouse insert of the same rows;
//! 2. wall of a function of 20 µs against plain rayon on the same cores;
//! 3. peak memory of producer, worker and sink as the number of ids grows;
//! 4. end-to-end time with batches of the size that `--batch auto` chooses against the best size of a sweep, for `collatz`
//!    and for `factor`, whose ids are of very uneven cost;
//! 5. what it costs the pool to know where its time goes, in looks at the clock;
//! 6. another build of `bench-collatz`, whose path `MILLSTREAM_BEFORE` gives, against this one, run by run: ids/s, and CPU of
//!    the ClickHouse process a row.
//!
//! `cargo bench` runs all of them; `cargo bench -- insert rayon memory batch looks before` chooses. `FIGURES_SCALE=0.01` is for trying it
//! out. Nothing asserts a time: the machine is what it is, and the ratios are printed.

#![expect(clippy::print_stdout, reason = "printing figures is what it does")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use benches::{Heavy, ROUNDS, Up, mix};
use bytes::Bytes;
use collatz::Collatz;
use millstream::envelope::{Rows, decode_rows};
use millstream::names::PassId;
use millstream::{Pipeline, check};
use millstream_engine::compute::{BatchKey, Function, Maker, Pool};
use millstream_engine::work::rows_message::whole_message;
use millstream_engine::{Environment, Store, StoreAddress};
use rayon::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

const COLLATZ: &str = env!("CARGO_BIN_EXE_bench-collatz");
const HEAVY: &str = env!("CARGO_BIN_EXE_bench-heavy");
const FACTOR: &str = env!("CARGO_BIN_EXE_bench-factor");
/// Runs of each figure; the best of each side is compared, as disturbance only ever adds time.
const RUNS: usize = 3;
/// Batches that a run is cut into for the sweep, as far as one message holds so many ids.
const SWEEP: [u64; 5] = [4096, 1024, 256, 64, 16];
const MESSAGE: u64 = 65_000;
/// The first of `factor`'s ids: products of large primes are among those from there on.
const HARD: u64 = 1 << 62;
/// How often the pool looks at the clock for a full piece of a batch: around it, around every 128th of its 1024 rows as it
/// is written, around its compression.
const LOOKS: f64 = 2.0 + 2.0 * 8.0 + 2.0;
const PIECE: f64 = 1024.0;
/// Rows of one bare insert, and inserts at once: what the sink does.
const GROUP: u64 = 400_000;
const WRITERS: usize = 2;

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|chosen| chosen == name);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{cores} cores, {}, scale {}\n", cpu(), scale());
    if wanted("insert") {
        against_insert(scaled(10_000_000));
    }
    if wanted("rayon") {
        against_rayon(scaled(1_000_000), cores);
    }
    if wanted("memory") {
        memory(&[scaled(1_000_000), scaled(10_000_000), scaled(100_000_000)]);
    }
    if let (true, Some(before)) = (wanted("before"), std::env::var_os("MILLSTREAM_BEFORE")) {
        against_before(Path::new(&before), scaled(10_000_000));
    }
    if wanted("looks") {
        cost_of_looks();
    }
    if wanted("batch") {
        against_sweep("collatz", COLLATZ, 1, scaled(20_000_000));
        against_sweep("factor", FACTOR, HARD, scaled(1_000_000));
    }
}

fn scale() -> f64 {
    std::env::var("FIGURES_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0)
}

/// The lightest function that there is here, on one core: a heavier one makes the share smaller.
fn cost_of_looks() {
    const TIMES: u32 = 20_000_000;
    let look = best(|| {
        let begun = Instant::now();
        for _ in 0..TIMES {
            std::hint::black_box(Instant::now());
        }
        begun.elapsed().as_secs_f64() / f64::from(TIMES)
    });
    let ids = scaled(4_000_000);
    let id = best(|| pool_seconds(Collatz, ids, MESSAGE, 1) / ids as f64);
    println!("looks at the clock in the pool, `collatz`, one core, best of {RUNS}");
    println!("  a look        {:8.1} ns", look * 1e9);
    println!("  an id         {:8.1} ns    computed and encoded", id * 1e9);
    println!("  share         {:8.3} %     (target: under 0.5)\n", 100.0 * LOOKS * look / (PIECE * id));
}

fn scaled(ids: u64) -> u64 {
    (ids as f64 * scale()) as u64
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| "unknown CPU".to_owned(), |(_, name)| name.to_owned())
}

fn best(mut measure: impl FnMut() -> f64) -> f64 {
    (0..RUNS).map(|_| measure()).fold(f64::INFINITY, f64::min)
}

/// Runs a pipeline over `1..=ids` on a fresh local stack; seconds from its first batch to its seal.
fn run_seconds(program: &str, ids: u64, env: &[(&str, String)]) -> f64 {
    let (summary, _) = run(program, &["--ids", &format!("1..={ids}")], env);
    assert_eq!(summary["rows"], ids);
    summary["seconds"].as_f64().expect("seconds")
}

/// Runs a pipeline on a fresh local stack; its summary, and what it said beside.
fn run(program: &str, args: &[&str], env: &[(&str, String)]) -> (Value, String) {
    let dir = TempDir::new().expect("a temporary directory");
    let output = Command::new(program)
        .args(["run", "--json", "--log", "error"])
        .args(args)
        .envs(env.iter().map(|(name, value)| (name, value)))
        .current_dir(dir.path())
        .output()
        .expect("the binary starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    (serde_json::from_slice(&output.stdout).expect("a summary"), said)
}

fn against_insert(ids: u64) {
    let run = best(|| run_seconds(COLLATZ, ids, &[]));
    let bare = bare_insert(ids);
    let rate = |seconds: f64| ids as f64 / seconds;
    println!("collatz, {ids} ids, best of {RUNS}");
    println!("  end to end    {run:8.2} s  {:10.0} ids/s", rate(run));
    println!("  bare insert   {bare:8.2} s  {:10.0} rows/s", rate(bare));
    println!("  ratio         {:8.2}    (target: at least 0.40)\n", rate(run) / rate(bare));
}

/// Both builds in turn, so that what disturbs one disturbs the other.
fn against_before(before: &Path, ids: u64) {
    let mut sides = [(before, Vec::new()), (Path::new(COLLATZ), Vec::new())];
    for _ in 0..RUNS {
        for (program, runs) in &mut sides {
            runs.push(run_with_cpu(program, ids));
        }
    }
    println!("collatz, {ids} ids, another build and this one in turn, {RUNS} runs each");
    println!("  {:>8} {:>24} {:>24}", "", "seconds", "server CPU, us a row");
    let [(_, before), (_, now)] = &sides;
    for (name, runs) in [("before", before), ("now", now)] {
        let figures = |of: fn(&(f64, f64)) -> f64| {
            let all: Vec<String> = runs.iter().map(|run| format!("{:.2}", of(run))).collect();
            all.join(" ")
        };
        println!("  {name:>8} {:>24} {:>24}", figures(|run| run.0), figures(|run| run.1));
    }
    let least =
        |runs: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| runs.iter().map(of).fold(f64::INFINITY, f64::min);
    println!(
        "  speed    {:8.2}    (target: at least 1.8)",
        least(before, |run| run.0) / least(now, |run| run.0)
    );
    println!(
        "  CPU      {:8.2}    (target: at most 0.5)\n",
        least(now, |run| run.1) / least(before, |run| run.1)
    );
}

/// Seconds of a run on a fresh local stack from its first batch to its seal, and microseconds of CPU that the ClickHouse
/// process had taken for each row when the run ended.
fn run_with_cpu(program: &Path, ids: u64) -> (f64, f64) {
    let dir = TempDir::new().expect("a temporary directory");
    let child = Command::new(program)
        .args(["run", "--json", "--log", "error", "--ids", &format!("1..={ids}")])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let (data, pid) = (dir.path().to_string_lossy().into_owned(), child.id());
    let watch = std::thread::spawn(move || {
        let mut cpu = 0.0f64;
        while Path::new(&format!("/proc/{pid}/exe")).exists() {
            cpu = cpu.max(engine_cpu(&data));
            std::thread::sleep(Duration::from_millis(20));
        }
        cpu
    });
    let output = child.wait_with_output().expect("it ends");
    let summary: Value = serde_json::from_slice(&output.stdout).expect("a summary");
    assert_eq!(summary["rows"], ids);
    let cpu = watch.join().expect("no panic");
    (summary["seconds"].as_f64().expect("seconds"), cpu * 1e6 / ids as f64)
}

/// Seconds of CPU that the ClickHouse process of a data directory has taken so far.
fn engine_cpu(data: &str) -> f64 {
    const TICKS: f64 = 100.0;
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let engine = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains("__local-engine") && line.contains(data) && !line.contains("__local-guard")
    });
    let stat =
        engine.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()).unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|field| field.parse().ok())
        .collect();
    // The state, which is no number, comes before them; user and system time are the 14th and 15th of all.
    fields.get(10).zip(fields.get(11)).map_or(0.0, |(user, system)| (user + system) / TICKS)
}

/// The same rows, computed and encoded before the clock starts, inserted as the sink does, and nothing else.
fn bare_insert(ids: u64) -> f64 {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let groups = encode_groups(ids).await;
        let mut seconds = f64::INFINITY;
        for _ in 0..RUNS {
            let up = Up::start(COLLATZ);
            let store = store_of(&up).await;
            let begun = Instant::now();
            insert_groups(&store, &groups).await;
            seconds = seconds.min(begun.elapsed().as_secs_f64());
            assert_eq!(store.raw_rows(&bare()).await.expect("counted"), ids);
        }
        seconds
    })
}

/// The pass under whose name rows are inserted without a run.
fn bare() -> PassId {
    PassId { run: "bare".parse().expect("legal"), pass: 1 }
}

async fn encode_groups(ids: u64) -> Vec<Bytes> {
    let function = Function::of(Arc::new(Collatz)).expect("sound");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::start(function.clone(), cores).expect("threads");
    let mut groups = Vec::new();
    for (batch, first) in (1..=ids).step_by(GROUP as usize).enumerate() {
        let list: Vec<u64> = (first..=ids.min(first + GROUP - 1)).collect();
        let message = compute_message(&function, &pool, batch, list).await;
        let Ok(Rows::Batch(rows)) = decode_rows(&message) else { panic!("no rows") };
        groups.push(message.slice_ref(rows.rows));
    }
    groups
}

/// Computes a batch and packs it as a worker does.
async fn compute_message(function: &Function<u64>, pool: &Pool<u64>, batch: usize, ids: Vec<u64>) -> Bytes {
    let key = BatchKey { pass: bare(), batch: batch as u32, ids: ids.len() as u32 };
    let computed = pool.compute(ids, true).await;
    let schema = function.spec().schema.clone();
    let maker = Arc::new(Maker { host: "bench".into(), build: "bench".into() });
    let packed = tokio::task::spawn_blocking(move || whole_message(&key, computed, &schema, &maker));
    packed.await.expect("packing does not panic")
}

async fn insert_groups(store: &Store, groups: &[Bytes]) {
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (store, groups) = (store.clone(), groups.to_vec());
        let schema = check::<Collatz>().expect("sound").schema;
        writers.spawn(async move {
            for (index, group) in groups.iter().enumerate().skip(writer).step_by(WRITERS) {
                store
                    .insert_rows(&format!("bare-{index}"), &schema, false, std::slice::from_ref(group))
                    .await
                    .expect("inserted");
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done.expect("no panic");
    }
}

fn against_rayon(ids: u64, cores: usize) {
    let rounds = rounds_of(Duration::from_micros(20));
    let run = best(|| run_seconds(HEAVY, ids, &[(ROUNDS, rounds.to_string())]));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cores).build().expect("threads");
    let bare = best(|| {
        let begun = Instant::now();
        let sum = pool
            .install(|| (1..=ids).into_par_iter().map(|id| mix(id, rounds)).reduce(|| 0, u64::wrapping_add));
        std::hint::black_box(sum);
        begun.elapsed().as_secs_f64()
    });
    let pool_alone = best(|| pool_seconds(Heavy::new(rounds), ids, 4000, cores));
    println!("function of {rounds} rounds (20 µs), {ids} ids, {cores} cores, best of {RUNS}");
    println!("  end to end    {run:8.2} s");
    println!("  pool alone    {pool_alone:8.2} s    computed and encoded, nothing stored");
    println!("  plain rayon   {bare:8.2} s");
    println!("  ratio         {:8.3}    (target: at most 1.05)\n", run / bare);
}

/// The compute pool with two batches in its hands, as a worker keeps it, and no server anywhere.
fn pool_seconds<P: Pipeline<Id = u64>>(pipeline: P, ids: u64, batch_ids: u64, cores: usize) -> f64 {
    let function = Function::of(Arc::new(pipeline)).expect("sound");
    let pool = Pool::start(function.clone(), cores).expect("threads");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let begun = Instant::now();
    runtime.block_on(async {
        let mut batches = tokio::task::JoinSet::new();
        for (batch, first) in (1..=ids).step_by(batch_ids as usize).enumerate() {
            let list: Vec<u64> = (first..=ids.min(first + batch_ids - 1)).collect();
            let (function, pool) = (function.clone(), pool.clone());
            batches.spawn(async move { compute_message(&function, &pool, batch, list).await.len() });
            if batches.len() == 2 {
                batches.join_next().await;
            }
        }
        while batches.join_next().await.is_some() {}
    });
    begun.elapsed().as_secs_f64()
}

fn rounds_of(time: Duration) -> u64 {
    const TRIED: u64 = 20_000_000;
    let one = best(|| {
        let begun = Instant::now();
        std::hint::black_box(mix(std::hint::black_box(1), TRIED));
        begun.elapsed().as_secs_f64()
    });
    (time.as_secs_f64() / one * TRIED as f64) as u64
}

/// The same run at several sizes of batches and at the size that is chosen, in turn, so that what disturbs one disturbs all.
/// The time that choosing takes is not in it: it is over before the first batch.
fn against_sweep(name: &str, program: &str, first: u64, ids: u64) {
    let mut sizes: Vec<String> =
        SWEEP.iter().map(|batches| (ids / batches).clamp(1, MESSAGE).to_string()).collect();
    sizes.dedup();
    sizes.push("auto".to_owned());
    let mut best = vec![f64::INFINITY; sizes.len()];
    let range = format!("{first}..={}", first + ids - 1);
    let mut said = String::new();
    for _ in 0..RUNS {
        for (size, best) in sizes.iter().zip(&mut best) {
            let (summary, words) = run(program, &["--ids", &range, "--batch", size], &[]);
            assert_eq!(summary["rows"], ids);
            *best = best.min(summary["seconds"].as_f64().expect("seconds"));
            said = words;
        }
    }
    println!("{name}, {ids} ids from {first}, by ids a batch, best of {RUNS}");
    sizes.iter().zip(&best).for_each(|(size, seconds)| println!("  {size:>8} {seconds:8.2} s"));
    let (auto, fixed) = best.split_last().expect("auto is the last");
    let least = fixed.iter().copied().fold(f64::INFINITY, f64::min);
    println!("  auto: {}", said.lines().find(|line| line.starts_with("batches of ")).unwrap_or("not said"));
    println!("  ratio    {:8.3}    (target: at most 1.05)\n", auto / least);
}

fn memory(sizes: &[u64]) {
    println!("peak memory (resident, MB) of collatz's processes");
    let columns = ["producer", "worker", "its pool", "sink", "seconds"].map(|name| format!("{name:>10}"));
    println!("  {:>12} {}", "ids", columns.join(" "));
    for ids in sizes {
        let up = Up::start(COLLATZ);
        let begun = Instant::now();
        let (worker, sink) = (up.start_stage(&["work"]), up.start_stage(&["sink"]));
        let mut producer =
            up.command(&["produce", "--run", "m", "--ids", &format!("1..={ids}")]).spawn().expect("starts");
        let mut peak = 0;
        while producer.try_wait().expect("waited for").is_none() {
            peak = peak.max(peak_of(producer.id()));
            std::thread::sleep(Duration::from_millis(20));
        }
        while !up.is_sealed("m") {
            std::thread::sleep(Duration::from_millis(500));
        }
        let seconds = begun.elapsed().as_secs_f64();
        let pool: u64 = children_of(worker.id()).map(peak_of).sum();
        let [producer, worker, pool, sink] =
            [peak, peak_of(worker.id()), pool, peak_of(sink.id())].map(|kb| kb / 1024);
        println!("  {ids:>12} {producer:>10} {worker:>10} {pool:>10} {sink:>10} {seconds:>10.1}");
    }
    println!("  (target: each under 256, flat within 20 %)\n");
}

/// The most that a process had resident so far, in KiB (`VmHWM`).
fn peak_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

/// Processes that a process has started: the kernel lists them by the thread that did.
fn children_of(pid: u32) -> impl Iterator<Item = u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists: Vec<String> =
        threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok()).collect();
    let children: Vec<u32> =
        lists.iter().flat_map(|list| list.split_whitespace()).filter_map(|pid| pid.parse().ok()).collect();
    children.into_iter()
}

async fn store_of(up: &Up) -> Store {
    let address = StoreAddress {
        url: up.clickhouse.clone(),
        user: String::new(),
        password: String::new(),
        environment: Environment::plain("millstream"),
        origin: "the bench".into(),
    };
    let store = Store::connect(&check::<Collatz>().expect("sound"), address).await.expect("connects");
    store.setup().await.expect("tables");
    store
}
