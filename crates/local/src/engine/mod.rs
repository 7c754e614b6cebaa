//! The local ClickHouse: the engine as a library in a child process, behind ClickHouse's HTTP interface.
//!
//! [`run`] is the whole life of the child: it locks the data's directory, loads and boots the engine, prints
//! `{"port":N}` on stdout, and serves on loopback until SIGTERM, SIGINT, or until stdin ends, which is how it follows a
//! parent that was killed. Then it takes no more requests, gives those that run [`LAST`], and closes the engine.
//!
//! A request, in the order of the files:
//!
//! | module | what it does |
//! |---|---|
//! | `http` | routes, queues for a slot, answers |
//! | `request`, `body`, `frames`, `encoding` | takes the URL and the form apart; reads the body whole, out of its frames or coding |
//! | `running` | holds its query id while it is under way |
//! | `tokens`, `statement` | tells a SELECT, an INSERT with rows, a KILL, anything else |
//! | `execute`, `insert` | a session of its own: database, settings, parameters, the statement |
//! | `directory`, `chdb` | the data's lock; the engine's C interface |
//! | `answer`, `errors` | the result as it comes, or the exception with ClickHouse's code |
//! | `dissect` | the same up to the engine, without one, for the fuzz targets |
//!
//! What it promises beyond a server: an INSERT with rows is read whole before it runs, so a cut body inserts nothing, and
//! up to 1,048,449 rows are one block, hence atomic, for one partition.
//!
//! What is not as with a server:
//! - Users and passwords are accepted and ignored. There are no sessions between requests: what only a later request
//!   could notice (SET, USE, temporary tables) is refused with code 48.
//! - The engine makes query ids of its own. `KILL QUERY WHERE query_id = …` (or `IN`) is answered here, from the requests
//!   under way; other conditions go to the engine. In `FROM system.processes`, `query_id` is the client's, by way of
//!   the setting `log_comment`, which clients therefore cannot use; `query` shows statements as the engine got them.
//! - Results are not compressed by headers (`Accept-Encoding`), only by `compress=1`.
//! - INSERT INTO FUNCTION with rows, INSERT from `input()`, a column list with `*` or EXCEPT, and external tables are
//!   refused with code 48 or 36. `async_insert` has no effect.
//! - The engine never removes the data of a dropped table; the next start does. So DROP … SYNC does not wait.
//! - System logs (`system.query_log` …), replication and clusters do not exist.

mod answer;
mod body;
mod chdb;
mod directory;
pub mod dissect;
mod encoding;
mod errors;
mod execute;
mod frames;
mod http;
mod insert;
mod request;
mod running;
mod statement;
mod tokens;

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use chdb::{Engine, OpenError};
use http::{Face, KILLS, SLOTS};
use running::Running;

/// How long requests that run have to end once the child is to stop.
const LAST: Duration = Duration::from_secs(10);
/// How long they have after that, once they are killed.
const KILLED: Duration = Duration::from_secs(3);
/// Connections at once; more wait in the kernel.
const CONNECTIONS: usize = 256;
/// Clients that may leave their queries behind at once.
const ABANDONED: usize = 256;
/// The engine's recursive descent needs more than tokio's two megabytes.
const STACK: usize = 8 << 20;
/// Slots, kills, and room for the queries that are being abandoned.
const THREADS: usize = 32;
/// How long to rest after accept failed, which it does when descriptors run out.
const AFTER_FAILED_ACCEPT: Duration = Duration::from_millis(50);

/// What suits a laptop that grinds numbers at the same time: small caches, few merges at once.
const OPTIONS: &[&str] = &[
    "progress=off",
    "progress-table=off",
    "enable-progress-table-toggle=0",
    "mark_cache_size=67108864",
    "index_mark_cache_size=16777216",
    "primary_index_cache_size=67108864",
    "uncompressed_cache_size=0",
    "index_uncompressed_cache_size=0",
    "query_condition_cache_size=16777216",
    "compiled_expression_cache_size=33554432",
    "max_server_memory_usage_to_ram_ratio=0.5",
    "background_pool_size=2",
    "background_merges_mutations_concurrency_ratio=2",
    "background_common_pool_size=2",
    "background_move_pool_size=1",
    "background_fetches_pool_size=1",
    "background_schedule_pool_size=8",
    "background_buffer_flush_schedule_pool_size=1",
    "background_distributed_schedule_pool_size=1",
    "background_message_broker_schedule_pool_size=1",
];

/// What the child is told on its command line.
pub(crate) struct Args {
    /// `libchdb.so`.
    pub(crate) lib: PathBuf,
    /// The directory of ClickHouse's data; made if it is missing.
    pub(crate) path: PathBuf,
    /// The port on 127.0.0.1; 0 to pick one.
    pub(crate) port: u16,
}

/// Why the child could not serve.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("use the directory `{}`", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("open the ClickHouse data at `{}`: another process has it open", path.display())]
    InUse { path: PathBuf },
    #[error(transparent)]
    Engine(#[from] OpenError),
    #[error("ask the ClickHouse engine for its version: {text}")]
    Version { text: String },
    #[error("listen on 127.0.0.1:{port}")]
    Listen {
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    #[error("say on stdout that the engine is ready")]
    Ready(#[source] io::Error),
}

impl Error {
    fn hint(&self) -> &'static str {
        match self {
            Self::Directory { .. } => "check that the directory can be written, or name another with --data",
            Self::InUse { .. } => {
                "stop the run or `up` that uses this data directory, or name another with --data"
            }
            Self::Engine(OpenError::Load { .. }) => {
                "the library needs 64-bit Linux with glibc; delete the cached copy to have it fetched again, \
                 or set CLICKHOUSE_URL"
            }
            Self::Engine(OpenError::Path { .. } | OpenError::Boot { .. }) => {
                "the engine's own message, if any, is above; check the directory's owner and free space"
            }
            Self::Version { .. } => {
                "the library may be damaged; delete the cached copy to have it fetched again"
            }
            Self::Listen { .. } => "another process may use this port; 0 picks a free one",
            Self::Runtime(_) | Self::Ready(_) => "check the limits on threads and open files",
        }
    }
}

/// Serves until told to stop. Failures are told on stderr: one `error:` line with its causes, one `hint:` line.
pub(crate) fn run(args: Args) -> ExitCode {
    match start(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn complain(error: &Error) {
    let mut text = format!("error: failed to {error}\n");
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text.push_str(&format!("  {source}\n"));
        cause = source.source();
    }
    text.push_str(&format!("hint: {}\n", error.hint()));
    // Nobody reads stderr: nothing left to try.
    io::stderr().write_all(text.as_bytes()).unwrap_or_default();
}

fn start(args: &Args) -> Result<(), Error> {
    let _lock = directory::open(&args.path)?;
    let engine = Engine::open(&args.lib, &args.path, OPTIONS)?;
    let version = version(&engine)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(THREADS)
        .thread_stack_size(STACK)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let (abandoned, abandonments) = mpsc::channel(ABANDONED);
    let face = Arc::new(Face {
        engine,
        running: Arc::new(Running::default()),
        slots: Arc::new(Semaphore::new(SLOTS as usize)),
        kills: Arc::new(Semaphore::new(KILLS as usize)),
        abandoned,
        version,
    });
    let all_over = runtime.block_on(serve(&face, args.port, abandonments))?;
    if all_over {
        close(face, runtime);
    } else {
        tracing::warn!("statements still run after being killed; leaving without closing the engine");
        runtime.shutdown_background();
        // What they held is what a crash leaves: whole parts, or none.
        std::process::exit(0);
    }
    Ok(())
}

fn version(engine: &Engine) -> Result<Arc<str>, Error> {
    let Some(mut connection) = engine.connect() else {
        return Err(Error::Version { text: "it opens no session".to_owned() });
    };
    let output =
        connection.query(b"SELECT version()", "TSVRaw", &[]).map_err(|text| Error::Version { text })?;
    Ok(String::from_utf8_lossy(&output.data).trim().into())
}

fn close(face: Arc<Face>, runtime: Runtime) {
    // Connections that idle hold the face too; with the runtime they are gone.
    runtime.shutdown_timeout(LAST);
    drop(face);
}

/// Whether all requests were over in time.
async fn serve(face: &Arc<Face>, port: u16, abandonments: mpsc::Receiver<String>) -> Result<bool, Error> {
    let listening = |source| Error::Listen { port, source };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.map_err(listening)?;
    let port = listener.local_addr().map_err(listening)?.port();
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
    let mut orphaned = stdin_end()?;
    let (stop, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut reaper = JoinSet::new();
    reaper.spawn(reap(Arc::clone(face), abandonments));
    say_ready(port).map_err(Error::Ready)?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = orphaned.recv() => break,
            Some(ended) = connections.join_next() => trace_end(ended),
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(Arc::clone(face), stream, stopped.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(AFTER_FAILED_ACCEPT).await;
                }
            },
        }
    }
    drop(listener);
    stop.send_replace(true);
    let mut over = end_within(LAST, face, &mut connections).await;
    if !over {
        kill_all(face).await;
        if !end_within(KILLED, face, &mut connections).await {
            // Those whose clients do not read their answers.
            connections.shutdown().await;
        }
        over = end_within(KILLED, face, &mut connections).await;
    }
    reaper.shutdown().await;
    Ok(over)
}

/// Whether all statements were over in time, those whose clients are gone among them.
async fn end_within(limit: Duration, face: &Face, connections: &mut JoinSet<()>) -> bool {
    let all = async {
        while let Some(ended) = connections.join_next().await {
            trace_end(ended);
        }
        let slots = face.slots.acquire_many(SLOTS).await;
        slots.is_ok() && face.kills.acquire_many(KILLS).await.is_ok()
    };
    timeout(limit, all).await.unwrap_or(false)
}

/// What has not ended by itself is killed, so that the engine can be closed.
async fn kill_all(face: &Arc<Face>) {
    let face = Arc::clone(face);
    let killed = tokio::task::spawn_blocking(move || {
        let left = face.running.query_ids();
        tracing::warn!(?left, "killing the statements that still run");
        left.iter().for_each(|query_id| execute::abandon(&face.engine, &face.running, query_id));
    });
    if let Err(error) = killed.await {
        tracing::error!(%error, "cannot kill what still runs");
    }
}

fn trace_end(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task failed");
    }
}

fn say_ready(port: u16) -> io::Result<()> {
    let mut stdout = io::stdout();
    writeln!(stdout, "{{\"port\":{port}}}")?;
    stdout.flush()
}

/// Yields once stdin has ended. Tokio's stdin would keep the runtime from ending; this thread ends with the process.
fn stdin_end() -> Result<mpsc::Receiver<()>, Error> {
    let (sender, receiver) = mpsc::channel(1);
    let read = move || {
        let mut ignored = [0; 256];
        loop {
            match io::stdin().read(&mut ignored) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        drop(sender);
    };
    std::thread::Builder::new().name("stdin".to_owned()).spawn(read).map_err(Error::Runtime)?;
    Ok(receiver)
}

async fn connection(face: Arc<Face>, stream: TcpStream, mut stopped: watch::Receiver<bool>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let service = service_fn(move |request| {
        let face = Arc::clone(&face);
        async move { Ok::<_, std::convert::Infallible>(http::answer(face, request).await) }
    });
    let connection =
        http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop_is_asked(&mut stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

async fn stop_is_asked(stopped: &mut watch::Receiver<bool>) {
    if stopped.wait_for(|stopped| *stopped).await.is_err() {
        tracing::debug!("the listener is gone");
    }
}

/// Kills what the clients that are gone were reading, one after the other.
async fn reap(face: Arc<Face>, mut abandonments: mpsc::Receiver<String>) {
    while let Some(query_id) = abandonments.recv().await {
        let face = Arc::clone(&face);
        let killed = tokio::task::spawn_blocking(move || {
            execute::abandon(&face.engine, &face.running, &query_id);
        });
        if let Err(error) = killed.await {
            tracing::error!(%error, "cannot kill an abandoned query");
        }
    }
}
