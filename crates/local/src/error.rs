use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::Server;
use crate::data::Holder;

/// An operation of the local stack that failed.
///
/// Its display is a fragment that fits after "error: failed to "; the cause is in `source`, what to do in
/// [`hint`](Error::hint).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory of the data directory could not be created, read or written.
    #[error("use `{}` in the data directory", path.display())]
    Data {
        /// What was touched.
        path: PathBuf,
        /// Why it could not be.
        #[source]
        source: io::Error,
    },
    /// The data directory's path cannot be written into a server's configuration.
    #[error("use the data directory `{}`, whose path is not UTF-8 or holds a line break", path.display())]
    DataPath {
        /// The path.
        path: PathBuf,
    },
    /// Another process holds the data directory.
    #[error("open the data directory `{}`, which is in use by {holder}", path.display())]
    InUse {
        /// The data directory.
        path: PathBuf,
        /// Who holds it.
        holder: Holder,
    },
    /// Another process holds the data directory, but its servers were not reachable in time.
    #[error("reach the servers of {holder} on the data directory `{}` within {} s", path.display(), waited.as_secs())]
    Unreachable {
        /// The data directory.
        path: PathBuf,
        /// Who holds it.
        holder: Holder,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The process that holds the data directory runs without a server that is needed here.
    #[error("find {server} on the data directory `{}`: {holder} runs without it", path.display())]
    NotServed {
        /// The data directory.
        path: PathBuf,
        /// Who holds it.
        holder: Holder,
        /// What is missing.
        server: Server,
    },
    /// The data directory was written by a `clickhouse` binary which is not there any more.
    #[error("open `{}`, written by a `clickhouse` binary that is not on PATH now", path.display())]
    ServerGone {
        /// ClickHouse's directory.
        path: PathBuf,
    },
    /// No pinned copy exists for this platform.
    #[error("find {server}: none is on PATH, and there is no pinned copy for {platform}")]
    Platform {
        /// What was looked for.
        server: Server,
        /// This machine.
        platform: String,
    },
    /// None of the clients that could fetch a pinned copy is installed.
    #[error("fetch {server}: it is not on PATH, and none of {clients} works here")]
    NoClient {
        /// What was to be fetched.
        server: Server,
        /// The clients that were tried, in backticks.
        clients: &'static str,
    },
    /// A client that fetches or unpacks failed.
    #[error("fetch {server} with `{command}` ({status})")]
    Client {
        /// What was to be fetched.
        server: Server,
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote to stderr.
        #[source]
        said: Tail,
    },
    /// A client could not be started.
    #[error("start `{command}`")]
    Spawn {
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was fetched is not what was pinned; nothing of it was kept.
    #[error("fetch {server}: `{file}` has SHA-256 {found}, expected {expected}; nothing was kept")]
    Checksum {
        /// What was to be fetched.
        server: Server,
        /// The file's name, or `(no file)`.
        file: String,
        /// The pinned sum.
        expected: &'static str,
        /// The sum of what came.
        found: String,
    },
    /// The user's cache cannot be used.
    #[error("use `{}` in the cache", path.display())]
    Cache {
        /// What was touched.
        path: PathBuf,
        /// Why it could not be.
        #[source]
        source: io::Error,
    },
    /// No cache directory: none of MILLSTREAM_CACHE, XDG_CACHE_HOME and HOME is set.
    #[error("find a cache directory: MILLSTREAM_CACHE, XDG_CACHE_HOME and HOME are all unset")]
    NoCache,
    /// Another process has been fetching for too long.
    #[error("fetch {server}: another process holds `{}` for {} s", path.display(), waited.as_secs())]
    FetchBusy {
        /// What was to be fetched.
        server: Server,
        /// The lock file.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Too little space for what is to be fetched.
    #[error("fetch {server} into `{}`: {needed_mb} MB are needed, {free_mb} MB are free", path.display())]
    NoSpace {
        /// What was to be fetched.
        server: Server,
        /// The cache.
        path: PathBuf,
        /// Space needed, in MB.
        needed_mb: u64,
        /// Space free, in MB.
        free_mb: u64,
    },
    /// A port that was asked for is taken.
    #[error("start {server} on port {port}, which another process listens on")]
    Port {
        /// The server.
        server: Server,
        /// The port.
        port: u16,
    },
    /// A server ended, or did not answer in time, while it was being started.
    #[error("start {server}: {how}")]
    Start {
        /// The server.
        server: Server,
        /// What happened.
        how: String,
        /// The end of its log.
        #[source]
        log: Tail,
    },
    /// A server of an earlier, killed owner still runs on the same data and would not end.
    #[error("stop a leftover {server} (pid {pid}) on the same data directory")]
    Leftover {
        /// The server.
        server: Server,
        /// Its process.
        pid: i32,
    },
    /// A server died again and again.
    #[error("keep {server} up: {attempts} starts in a row failed")]
    KeepUp {
        /// The server.
        server: Server,
        /// Starts that failed.
        attempts: u32,
        /// The last failure.
        #[source]
        last: Box<Error>,
    },
    /// The process whose servers were used is gone.
    #[error("reach {server} at `{url}` any more: it was served by {holder}")]
    HolderGone {
        /// The server.
        server: Server,
        /// Its address.
        url: String,
        /// Who held the data directory.
        holder: Holder,
    },
    /// The data directory was removed, moved or replaced under the servers.
    #[error("keep the local stack up: its data directory `{}` is gone", path.display())]
    DataGone {
        /// The data directory, as it was named.
        path: PathBuf,
    },
    /// A supervising task panicked.
    #[error("supervise the local stack")]
    Supervise {
        /// The panic.
        #[source]
        source: tokio::task::JoinError,
    },
}

/// The last lines of a log or of a program's stderr, as an error's cause.
#[derive(Debug, thiserror::Error)]
#[error("{from} ends with:\n{lines}")]
pub struct Tail {
    /// Where the lines are from.
    pub from: String,
    /// The lines.
    pub lines: String,
}

impl Tail {
    const LINES: usize = 12;

    pub(crate) fn new(from: String, text: &str) -> Tail {
        let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let last = all[all.len().saturating_sub(Tail::LINES)..].join("\n");
        Tail { from, lines: if last.is_empty() { "(nothing)".to_owned() } else { last } }
    }
}

impl Error {
    /// What the user can do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Data { source, .. } | Error::Cache { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "free some space on that disk".to_owned()
            }
            Error::Data { .. } => "name a directory that can be written with --data".to_owned(),
            Error::DataPath { .. } => "name another directory with --data".to_owned(),
            Error::InUse { .. } => "wait until it ends, or use another --data directory".to_owned(),
            Error::Unreachable { holder, .. } => {
                format!("see whether pid {} is well, or use another --data directory", holder.pid)
            }
            Error::NotServed { server, .. } => format!("name {} with {}", server.article(), server.flag()),
            Error::ServerGone { .. } => {
                "put `clickhouse` >= 24.8 back on PATH, or use another --data directory".to_owned()
            }
            Error::Platform { server, .. } => {
                format!("put {} on PATH, or name a server with {}", server.wanted(), server.flag())
            }
            Error::NoClient { server, .. } => format!(
                "install {}, or put {} on PATH, or name a server with {}",
                server.client(),
                server.wanted(),
                server.flag()
            ),
            Error::Client { server, .. } => format!(
                "check the network and the disk, or put {} on PATH, or name a server with {}",
                server.wanted(),
                server.flag()
            ),
            Error::Checksum { server, .. } => format!(
                "see where the client's packages come from, or put {} on PATH, or name a server with {}",
                server.wanted(),
                server.flag()
            ),
            Error::Cache { .. } | Error::NoCache => {
                "name a directory that can be written with the environment variable MILLSTREAM_CACHE".to_owned()
            }
            Error::NoSpace { .. } => {
                "free some space, or name a directory on another disk with the environment variable MILLSTREAM_CACHE"
                    .to_owned()
            }
            Error::FetchBusy { .. } => "end the other process, then try again".to_owned(),
            Error::Port { server, .. } => format!("name another port, or use what listens there with {}", server.flag()),
            Error::Start { log, .. } if log.lines.contains("o space left on device") => {
                "free some space on the data directory's disk, or use another --data directory".to_owned()
            }
            Error::KeepUp { last, .. } => return last.hint(),
            Error::HolderGone { .. } => "run the command again".to_owned(),
            Error::DataGone { .. } => {
                "put it back, or begin anew: what was stored there is lost with it".to_owned()
            }
            Error::Leftover { pid, .. } => format!("kill process {pid}, then try again"),
            Error::Spawn { command, .. } => {
                format!("put `{}` on PATH", command.split(' ').next().unwrap_or_default())
            }
            Error::Start { .. } | Error::Supervise { .. } => return None,
        };
        Some(text)
    }
}
