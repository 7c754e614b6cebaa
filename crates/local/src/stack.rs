//! Opening the stack, keeping its servers up, closing it.

use std::env;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

use crate::data::{self, Access, Dir, Holder, Kept, Kind, Lock, Owner, Record, Stage};
use crate::error::Error;
use crate::event::{Event, Progress, Server};
use crate::fetch::off_thread;
use crate::find::{self, ClickHouse};
use crate::keep::Keeper;
use crate::program::Program;
use crate::{clickhouse, leftover, nats, net};

/// How often an attached stack looks whether the servers are still there, and how long they may be away.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const AWAY: Duration = Duration::from_secs(45);
/// How many chosen ports may be lost to others between the choice and the server's start, in one opening.
const MOST_LOST: usize = 10;

/// What to open.
#[derive(Debug, Clone)]
pub struct Options {
    /// The data directory; created if missing.
    pub data: PathBuf,
    /// nats-server's port. 0 picks one, the same at every start of a data directory while it is free.
    pub nats_port: u16,
    /// ClickHouse's HTTP port. 0 picks one, as for `nats_port`.
    pub clickhouse_port: u16,
    /// Whether nats-server is wanted.
    pub need_nats: bool,
    /// Whether ClickHouse is wanted.
    pub need_clickhouse: bool,
    /// What for.
    pub owner: Owner,
    /// The binary that is started for children and calls [`child_main`](crate::child_main). `None`: the running one.
    pub exe: Option<PathBuf>,
}

/// An open local stack: servers of our own, or those of another process on the same data directory.
///
/// Dropped without [`stop`](Stack::stop), the servers end on their own, but their end is not awaited.
#[derive(Debug)]
pub struct Stack {
    nats_url: Option<String>,
    clickhouse_url: Option<String>,
    hold: Hold,
}

#[derive(Debug)]
enum Hold {
    Own { lock: Lock, stop: watch::Sender<bool>, keepers: JoinSet<Result<(), Error>> },
    Attached(Record),
}

/// Opens the stack of a data directory: takes the directory, finds the servers (fetching them once), starts them and
/// waits until they answer; or attaches to the servers of who holds the directory.
///
/// # Errors
/// When the directory cannot be used, is in use, or a server cannot be found, fetched or started. Nothing that was
/// started stays.
pub async fn open(options: Options, progress: Progress) -> Result<Stack, Error> {
    let dir = Dir::create(&options.data)?;
    let needed: Vec<Server> =
        [(options.need_nats, Server::Nats), (options.need_clickhouse, Server::ClickHouse)]
            .into_iter()
            .filter_map(|(need, server)| need.then_some(server))
            .collect();
    match data::acquire(&dir, options.owner, &needed, &progress).await? {
        Access::Own(lock) => own(&options, &dir, lock, progress).await,
        Access::Attached(record) => {
            progress(Event::Attached { holder: record.holder });
            Ok(Stack {
                nats_url: record.nats_url().filter(|_| options.need_nats),
                clickhouse_url: record.clickhouse_url().filter(|_| options.need_clickhouse),
                hold: Hold::Attached(record),
            })
        }
    }
}

/// Whether a directory holds a stack, or did.
pub fn is_there(data: &Path) -> bool {
    data.join(data::LOCK).exists()
}

/// Whether a process holds the stack of a directory: `up`, `run`, or a short command for the moment. Starts and changes nothing.
pub fn is_held(data: &Path) -> bool {
    // Shared: of two that look at once, neither is a holder to the other.
    let held = |file: File| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
    File::open(data.join(data::LOCK)).is_ok_and(held)
}

async fn own(options: &Options, dir: &Dir, lock: Lock, progress: Progress) -> Result<Stack, Error> {
    let holder = Holder { owner: options.owner, pid: std::process::id() };
    let mut record = Record { holder, stage: Stage::Finding, nats_port: None, clickhouse_port: None };
    lock.write_record(&record)?;
    let mut kept = dir.kept();
    let servers = find_servers(options, dir, &kept, &progress).await?;
    // Before the ports are chosen: a leftover sits on those of the last start.
    stop_leftovers(dir).await?;
    if let Some(found) = &servers.clickhouse {
        kept.clickhouse = Some(match found {
            ClickHouse::Server(_) => Kind::Server,
            ClickHouse::Library(_) => Kind::Library,
        });
    }
    let exe = options.exe.clone().unwrap_or_else(own_exe);
    let (stop, stopped) = watch::channel(false);
    record.stage = Stage::Starting;
    let mut lost = Vec::new();
    let keepers = loop {
        choose_ports(options, dir, &lost, &mut kept)?;
        lock.write_kept(&kept)?;
        record.nats_port = options.need_nats.then_some(kept.nats_port);
        record.clickhouse_port = options.need_clickhouse.then_some(kept.clickhouse_port);
        lock.write_record(&record)?;
        let programs = servers.programs(dir, &kept)?;
        let keepers = programs.into_iter().map(|(program, store)| Keeper {
            program,
            store,
            exe: exe.clone(),
            progress: Arc::clone(&progress),
            stop: stopped.clone(),
        });
        match start_all(keepers.collect()).await {
            Ok(keepers) => break keepers,
            // Another process was faster: a port that the operator did not name is replaced.
            Err(Error::Port { server, port })
                if ![options.nats_port, options.clickhouse_port].contains(&port)
                    && lost.len() < MOST_LOST =>
            {
                tracing::info!(%server, port, "the port was taken while the server started, choosing another");
                lost.push(port);
            }
            Err(error) => return Err(error),
        }
    };
    record.stage = Stage::Ready;
    lock.write_record(&record)?;
    Ok(Stack {
        nats_url: record.nats_url(),
        clickhouse_url: record.clickhouse_url(),
        hold: Hold::Own { lock, stop, keepers },
    })
}

/// The programs of a stack, those that it needs.
struct Servers {
    nats: Option<PathBuf>,
    clickhouse: Option<ClickHouse>,
}

impl Servers {
    /// How each is started, and the directory of those that do not come up on a full disk.
    fn programs(&self, dir: &Dir, kept: &Kept) -> Result<Vec<(Program, Option<PathBuf>)>, Error> {
        let mut programs = Vec::new();
        if let Some(binary) = self.nats.clone() {
            let program = nats::program(dir, binary, kept.nats_port, kept.nats_http_port)?;
            programs.push((program, Some(dir.nats())));
        }
        if let Some(found) = self.clickhouse.clone() {
            programs.push((clickhouse::program(dir, found, kept.clickhouse_port)?, None));
        }
        Ok(programs)
    }
}

/// Finds the programs on PATH, or fetches them.
async fn find_servers(
    options: &Options,
    dir: &Dir,
    kept: &Kept,
    progress: &Progress,
) -> Result<Servers, Error> {
    let nats =
        async { if options.need_nats { find::find_nats_server(progress).await.map(Some) } else { Ok(None) } };
    let clickhouse = async {
        if options.need_clickhouse { find_engine(dir, kept, progress).await.map(Some) } else { Ok(None) }
    };
    let (nats, clickhouse) = tokio::try_join!(nats, clickhouse)?;
    Ok(Servers { nats, clickhouse })
}

/// Starts all servers at once. The first error is answered after the others have been stopped.
async fn start_all(keepers: Vec<Keeper>) -> Result<JoinSet<Result<(), Error>>, Error> {
    let mut starting = JoinSet::new();
    for keeper in keepers {
        starting.spawn(async move {
            data::rotate(&keeper.program.log)
                .map_err(|source| Error::Data { path: keeper.program.log.clone(), source })?;
            let running = keeper.start().await?;
            Ok((keeper, running))
        });
    }
    let mut started = Vec::new();
    let mut failed = None;
    while let Some(joined) = starting.join_next().await {
        match joined.unwrap_or_else(|source| Err(Error::Supervise { source })) {
            Ok(pair) => started.push(pair),
            Err(error) => {
                failed.get_or_insert(error);
            }
        }
    }
    if let Some(error) = failed {
        for (_, running) in &mut started {
            running.stop().await;
        }
        return Err(error);
    }
    let mut keeping = JoinSet::new();
    for (keeper, running) in started {
        (keeper.progress)(Event::Started { server: keeper.program.server, url: keeper.program.url.clone() });
        keeping.spawn(keeper.keep(running));
    }
    Ok(keeping)
}

async fn stop_leftovers(dir: &Dir) -> Result<(), Error> {
    let all = [
        (Server::Nats, nats::words(dir)),
        (Server::ClickHouse, clickhouse::engine_words(dir)),
        (Server::ClickHouse, clickhouse::server_words(dir)),
    ];
    off_thread(move || all.iter().try_for_each(|(server, words)| leftover::stop(*server, words))).await?
}

/// What wrote a data directory's tables goes on serving them.
async fn find_engine(dir: &Dir, kept: &Kept, progress: &Progress) -> Result<ClickHouse, Error> {
    match kept.clickhouse {
        None => find::find_clickhouse(progress).await,
        Some(Kind::Library) => find::clickhouse_library(progress).await,
        Some(Kind::Server) => match find::clickhouse_on_path(progress).await {
            Some(binary) => Ok(ClickHouse::Server(binary)),
            None => Err(Error::ServerGone { path: dir.clickhouse() }),
        },
    }
}

/// The ports asked for, else those of the last start if they are free, else others; none of those lost already.
fn choose_ports(options: &Options, dir: &Dir, lost: &[u16], kept: &mut Kept) -> Result<(), Error> {
    let mut taken = [lost, &[options.nats_port, options.clickhouse_port]].concat();
    let mut choose = |what, asked: u16, last: u16| {
        let port = if asked != 0 {
            asked
        } else if last != 0 && !taken.contains(&last) && net::is_free(last) {
            last
        } else {
            net::pick(dir.path(), what, &taken)
                .map_err(|source| Error::Data { path: dir.named().to_owned(), source })?
        };
        taken.push(port);
        Ok(port)
    };
    kept.nats_port = choose("nats", options.nats_port, kept.nats_port)?;
    kept.clickhouse_port = choose("clickhouse", options.clickhouse_port, kept.clickhouse_port)?;
    kept.nats_http_port = choose("monitor", 0, kept.nats_http_port)?;
    Ok(())
}

/// On Linux by the kernel's link, which stays right when the file is replaced or removed under a running process.
fn own_exe() -> PathBuf {
    let link = Path::new("/proc/self/exe");
    if link.exists() { link.to_owned() } else { env::current_exe().unwrap_or_else(|_| link.to_owned()) }
}

impl Stack {
    /// nats-server's address, if it was asked for.
    pub fn nats_url(&self) -> Option<&str> {
        self.nats_url.as_deref()
    }

    /// ClickHouse's HTTP address, if it was asked for.
    pub fn clickhouse_url(&self) -> Option<&str> {
        self.clickhouse_url.as_deref()
    }

    /// Whether the servers are those of another process, which [`stop`](Stack::stop) leaves alone.
    pub fn attached(&self) -> bool {
        matches!(self.hold, Hold::Attached(_))
    }

    /// Resolves when a server cannot be kept up, with the reason; never while all is well. Cancel safe.
    pub async fn failed(&mut self) -> Error {
        match &mut self.hold {
            Hold::Own { keepers, lock, .. } => loop {
                let joined = tokio::select! {
                    joined = keepers.join_next() => joined,
                    path = lock.lost() => return Error::DataGone { path },
                };
                match joined {
                    Some(Ok(Ok(()))) => {}
                    Some(Ok(Err(error))) => return error,
                    Some(Err(source)) => return Error::Supervise { source },
                    None => std::future::pending().await,
                }
            },
            Hold::Attached(record) => {
                gone(*record, [self.nats_url.as_deref(), self.clickhouse_url.as_deref()]).await
            }
        }
    }

    /// Stops the servers, waiting up to 25 s for each, and gives the data directory free. Leaves another's servers
    /// alone.
    ///
    /// # Errors
    /// When the data directory's record cannot be removed or its lock not released.
    pub async fn stop(self) -> Result<(), Error> {
        let Hold::Own { lock, stop, mut keepers } = self.hold else { return Ok(()) };
        stop.send_replace(true);
        while let Some(joined) = keepers.join_next().await {
            match joined {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("failed to {error}"),
                Err(error) => tracing::warn!(%error, "a keeper panicked"),
            }
        }
        lock.release()
    }
}

/// Resolves when a server of another process has been away for too long.
async fn gone(record: Record, urls: [Option<&str>; 2]) -> Error {
    let mut seen = [Instant::now(); 2];
    let mut ticks = interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for (index, server) in [Server::Nats, Server::ClickHouse].into_iter().enumerate() {
            let (Some(url), Some(port)) = (urls[index], data::port_of(&record, server)) else { continue };
            if net::listens(port).await {
                seen[index] = Instant::now();
            } else if seen[index].elapsed() > AWAY {
                return Error::HolderGone { server, url: url.to_owned(), holder: record.holder };
            } else {
                sleep(LOOK_EVERY).await;
            }
        }
    }
}
