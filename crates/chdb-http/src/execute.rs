//! The part of a request that blocks: a session of its own, the statement, the end of the session.
//!
//! Runs on a thread that may wait, never on a tokio worker.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::unix::pipe;

use crate::body::MemoryFile;
use crate::chdb::{Connection, Engine, Output};
use crate::exception::{Exception, code};
use crate::insert;
use crate::request::Request;
use crate::running::{Entry, Running, Victim};
use crate::statement::{self, Insert, Kill, Reads};

/// How often a KILL looks whether its victim is gone.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Where a result goes.
pub(crate) enum Sink {
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
pub(crate) enum Work {
    Read(Reads, Sink),
    Insert(Insert, MemoryFile),
    /// The victim's fate goes where a result goes.
    Kill(Kill, Sink),
    DropSync,
    Other,
}

/// What was done, and how long it took.
pub(crate) struct Done {
    pub(crate) output: Output,
    pub(crate) took: Duration,
}

/// Runs `work` for `request` in a session of its own. When this returns, the session is over, `entry`'s id is free, and
/// the reader of the sink sees its end.
pub(crate) fn run(
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
            Work::DropSync => query.run(&statement::drop_without_sync(sql)),
            Work::Other => query.run(sql),
        }
    });
    // The session is over before the id is free.
    drop(entry);
    result.map(|output| Done { output, took: start.elapsed() })
}

/// Ends what a client that is gone was reading.
pub(crate) fn abandon(engine: &Engine, running: &Running, query_id: &str) {
    let Some(victim) = running.victim(query_id) else { return };
    victim.kill();
    if let Some(mut connection) = engine.connect()
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
        let victim = running.victim(&kill.query_id).filter(|_| kill.query_id != entry.query_id());
        if let Some(victim) = &victim {
            self.kill_until_it_is_over(running, victim, entry)?;
        }
        let after = kill.format.as_ref().map_or_else(String::new, |format| format!(" FORMAT {format}"));
        let mut answer = fate(victim.as_ref());
        answer.extend_from_slice(after.as_bytes());
        self.read(&answer, &Reads { after: after.len(), format: kill.format.clone() }, sink)
    }

    /// The victim may be on its way into the engine, where a kill does not find it yet: hence again and again.
    fn kill_until_it_is_over(
        &mut self,
        running: &Running,
        victim: &Victim,
        entry: &Entry,
    ) -> Result<(), Exception> {
        victim.kill();
        while !victim.is_over(running) {
            self.run(&statement::kill_marked(&victim.query_id))?;
            entry.check()?;
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

/// The same statement with its result written to a file.
pub(crate) fn into_file(sql: &[u8], reads: &Reads, path: &str) -> Vec<u8> {
    let (before, after) = sql.split_at(sql.len() - reads.after);
    [before, outfile(path).as_bytes(), after].concat()
}

/// The clause that sends a result to a file.
fn outfile(path: &str) -> String {
    format!(" INTO OUTFILE '{path}' APPEND ")
}

/// A query whose result is that of a KILL.
fn fate(victim: Option<&Victim>) -> Vec<u8> {
    let columns = "SELECT * FROM values('kill_status String, query_id String, user String, query String', ";
    let row = victim
        .map_or_else(|| b"('', '', '', '')) WHERE 0".to_vec(), |victim| [&victim.row()[..], b")"].concat());
    [columns.as_bytes(), &row].concat()
}
