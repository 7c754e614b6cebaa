use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::data::Holder;

/// One of the two servers of the local stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Server {
    /// nats-server with JetStream.
    Nats,
    /// ClickHouse: a server, or the engine in a child process.
    ClickHouse,
}

impl Server {
    /// The flag with which a user names one's own server.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Server::Nats => "--nats",
            Server::ClickHouse => "--clickhouse",
        }
    }

    pub(crate) fn article(self) -> &'static str {
        match self {
            Server::Nats => "a nats-server",
            Server::ClickHouse => "a ClickHouse",
        }
    }

    pub(crate) fn wanted(self) -> &'static str {
        match self {
            Server::Nats => "nats-server >= 2.12",
            Server::ClickHouse => "clickhouse >= 24.8",
        }
    }

    pub(crate) fn client(self) -> &'static str {
        match self {
            Server::Nats => "Python with pip",
            Server::ClickHouse => "npm",
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Server::Nats => "nats-server",
            Server::ClickHouse => "ClickHouse",
        })
    }
}

/// Something that a user who waits for the local stack may want to see.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A binary on PATH was not used.
    PassedOver {
        /// The binary.
        program: PathBuf,
        /// Why not, for example `is version 18.16.1, 24.8 or newer is needed`.
        why: String,
    },
    /// Another process holds the data directory, or fetches the same pinned copy, and is being waited for.
    Waiting {
        /// What for.
        what: String,
    },
    /// A pinned copy is being fetched. Repeated a few times a second.
    Fetching {
        /// What.
        server: Server,
        /// Bytes seen so far; stays 0 while a client keeps them out of sight.
        bytes: u64,
        /// Bytes that will come.
        total: u64,
        /// Since the start.
        elapsed: Duration,
    },
    /// A pinned copy is in the cache now.
    Fetched {
        /// What.
        server: Server,
        /// Since the start.
        elapsed: Duration,
    },
    /// A server answers for the first time.
    Started {
        /// Which.
        server: Server,
        /// Its address.
        url: String,
    },
    /// A server ended without being asked to, or had to be stopped because it was stuck; it will be started again.
    Died {
        /// Which.
        server: Server,
        /// How.
        why: String,
    },
    /// A server that had died answers again, at the same address.
    Restarted {
        /// Which.
        server: Server,
    },
    /// A server that had died could not be started; it will be tried again.
    NotRestarted {
        /// Which.
        server: Server,
        /// Why.
        why: String,
    },
    /// A server refuses work, as nats-server does after a write error, and a restart would not help yet.
    Stuck {
        /// Which.
        server: Server,
        /// What it says.
        why: String,
    },
    /// The servers of another process on the same data directory are used.
    Attached {
        /// Who holds the data directory.
        holder: Holder,
    },
}

/// Where events go. Called from several tasks; must not block.
pub type Progress = Arc<dyn Fn(Event) + Send + Sync>;
