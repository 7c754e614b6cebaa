//! The life of the process: boots the engine, serves connections, and ends in order.

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::chdb::Engine;
use crate::http::{Face, KILLS, SLOTS};
use crate::running::Running;
use crate::{Args, Error, directory, execute, http};

/// How long requests that run have to end once the server is to stop.
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

/// Serves until it is told to stop: by SIGTERM, by SIGINT, or by the end of stdin, so that it follows a parent that was killed.
///
/// Writes `{"port":N}` and a line end to stdout once it takes connections. Owns the process: it takes those signals and
/// stdin, and reads stdin from a thread that ends with the process. Where statements still run after they were killed, it
/// returns without closing the engine, which would wait for them; the process is then to end. What such a statement had
/// written is whole parts, as after a crash.
///
/// # Errors
/// The engine could not be opened, or the port could not be listened on. The engine writes its own reasons to stderr.
pub fn run(args: &Args) -> Result<(), Error> {
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
        // Connections that idle hold the engine too; with the runtime they are gone.
        runtime.shutdown_timeout(LAST);
    } else {
        tracing::warn!("statements still run after they were killed; leaving without closing the engine");
        std::mem::forget(face);
        runtime.shutdown_background();
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
