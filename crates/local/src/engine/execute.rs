//! The part of a request that blocks: a session of its own, the statement, the end of the session.
//!
//! Runs on a thread that may wait, never on a tokio worker.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::unix::pipe;

use super::body::MemoryFile;
use super::chdb::{Connection, Engine, Output};
use super::errors::{Exception, code};
use super::insert;
use super::request::Request;
use super::running::{Entry, Running, Victim};
use super::statement::{self, Insert, Kill, KillMode, Reads};

/// How often a KILL … SYNC looks whether its victims are gone.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Where a result goes.
pub(super) enum Sink {
    Pipe(pipe::Sender),
    File(Arc<MemoryFile>),
}

impl Sink {
    fn path(&self) -> String {
        match self {
            Self::Pipe(pipe) => format!("/proc/self/fd/{}", pipe.as_raw_fd()),
            Self::File(file) => file.path(),
        }
    }
}

/// What to do.
pub(super) enum Work {
    Read(Reads, Sink),
    Insert(Insert, MemoryFile),
    /// The victims' fate goes where a result goes.
    Kill(Kill, Sink),
    KillWhere,
    DropSync,
    Other,
}

/// What was done, and how long it took.
pub(super) struct Done {
    pub(super) output: Output,
    pub(super) took: Duration,
}

/// Runs `work` for `request` in a session of its own. When this returns, the session is over, `entry`'s id is free, and
/// whoever reads the sink sees its end.
pub(super) fn run(
    engine: &Engine,
    running: &Running,
    request: &Request,
    sql: &[u8],
    work: Work,
    entry: Entry,
) -> Result<Done, Exception> {
    let start = Instant::now();
    let result = session(engine, request, entry.query_id()).and_then(|mut connection| {
        entry.check()?;
        let format = request.default_format.as_deref().unwrap_or("TabSeparated");
        let mut query = Query { connection: &mut connection, request, format };
        match work {
            Work::Read(reads, sink) => query.read(&statement::with_real_query_ids(sql), &reads, &sink),
            Work::Insert(insert, rows) => query.insert(&insert, &rows),
            Work::Kill(kill, sink) => query.kill(running, &kill, &entry, &sink),
            Work::KillWhere => query.run(&statement::kill_by_real_query_ids(sql)),
            Work::DropSync => query.run(&statement::drop_without_sync(sql)),
            Work::Other => query.run(sql),
        }
    });
    // The session is over before the id is free.
    drop(entry);
    result.map(|output| Done { output, took: start.elapsed() })
}

/// Ends what a client that is gone was reading.
pub(super) fn abandon(engine: &Engine, running: &Running, query_id: &str) {
    let victims = running.victims(&[query_id.to_owned()], "");
    for victim in &victims {
        victim.kill();
    }
    if let (false, Some(mut connection)) = (victims.is_empty(), engine.connect())
        && let Err(error) = connection.query(&statement::kill_marked(query_id), "Null", &[])
    {
        tracing::warn!(query_id, error, "cannot kill a query whose client is gone");
    }
}

fn session(engine: &Engine, request: &Request, query_id: &str) -> Result<Connection, Exception> {
    let mut connection = engine
        .connect()
        .ok_or_else(|| Exception::new(code::UNKNOWN_EXCEPTION, "the engine refuses to open a session"))?;
    for statement in request.session(query_id) {
        connection.query(&statement, "Null", &[]).map_err(|text| Exception::from_engine(&text))?;
    }
    Ok(connection)
}

/// A session and how its request wants to be answered.
struct Query<'a> {
    connection: &'a mut Connection,
    request: &'a Request,
    format: &'a str,
}

impl Query<'_> {
    fn run(&mut self, sql: &[u8]) -> Result<Output, Exception> {
        self.connection
            .query(sql, self.format, &self.request.params)
            .map_err(|text| Exception::from_engine(&text))
    }

    /// The engine's client formats the result, block by block, as it arrives, and writes it to the sink.
    fn read(&mut self, sql: &[u8], reads: &Reads, sink: &Sink) -> Result<Output, Exception> {
        let path = sink.path();
        self.run(&into_file(sql, reads, &path)).map_err(|exception| exception.without(&outfile(&path)))
    }

    fn insert(&mut self, insert: &Insert, rows: &MemoryFile) -> Result<Output, Exception> {
        match insert::rewrite(self.connection, insert, rows, &self.request.params)? {
            Some(sql) => {
                let place = format!("(in file/uri {}): ", rows.path());
                self.run(&sql).map_err(|exception| exception.without(&place))
            }
            None => Ok(Output::default()),
        }
    }

    fn kill(
        &mut self,
        running: &Running,
        kill: &Kill,
        entry: &Entry,
        sink: &Sink,
    ) -> Result<Output, Exception> {
        let victims = running.victims(&kill.ids, entry.query_id());
        let status = match kill.mode {
            KillMode::Test => "",
            KillMode::Async => "waiting",
            KillMode::Sync => "finished",
        };
        if kill.mode != KillMode::Test {
            self.kill_all(running, &victims, kill.mode, entry)?;
        }
        let mut answer = fates(&victims, status);
        let after = match &kill.format {
            Some(format) => format!(" FORMAT {format}"),
            None => String::new(),
        };
        answer.extend_from_slice(after.as_bytes());
        self.read(&answer, &Reads { after: after.len(), format: kill.format.clone() }, sink)
    }

    /// A victim may be on its way into the engine, where a kill does not find it yet: hence again and again.
    fn kill_all(
        &mut self,
        running: &Running,
        victims: &[Victim],
        mode: KillMode,
        entry: &Entry,
    ) -> Result<(), Exception> {
        victims.iter().for_each(Victim::kill);
        loop {
            let left: Vec<&Victim> = victims.iter().filter(|victim| !victim.is_over(running)).collect();
            for victim in &left {
                self.run(&statement::kill_marked(&victim.query_id))?;
            }
            if left.is_empty() || mode != KillMode::Sync {
                return Ok(());
            }
            entry.check()?;
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The same statement with its result written to a file.
pub(super) fn into_file(sql: &[u8], reads: &Reads, path: &str) -> Vec<u8> {
    let (before, after) = sql.split_at(sql.len() - reads.after);
    [before, outfile(path).as_bytes(), after].concat()
}

/// The clause that sends a result to a file.
fn outfile(path: &str) -> String {
    format!(" INTO OUTFILE '{path}' APPEND ")
}

/// A query whose result is that of a KILL.
fn fates(victims: &[Victim], status: &str) -> Vec<u8> {
    let mut sql =
        b"SELECT * FROM values('kill_status String, query_id String, user String, query String', ".to_vec();
    if victims.is_empty() {
        sql.extend_from_slice(b"('', '', '', '')) WHERE 0");
        return sql;
    }
    let rows: Vec<Vec<u8>> = victims.iter().map(|victim| victim.row(status)).collect();
    sql.extend(rows.join(&b", "[..]));
    sql.push(b')');
    sql
}
