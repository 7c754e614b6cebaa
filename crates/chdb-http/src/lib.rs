//! ClickHouse's HTTP interface over `libchdb.so`, the ClickHouse engine as a library.
//!
//! [`run`] is a whole process: it locks the data's directory, loads and boots the engine, and serves on loopback until it is
//! told to stop. Then it takes no more requests, lets those that run end, and closes the engine. It knows nothing of the
//! program that starts it.
//!
//! **It owns** the engine (one per process), its data's directory, the listening socket, and all `unsafe` code of this
//! workspace (`chdb.rs`).
//!
//! A request, in the order of the files:
//!
//! | module | what it does |
//! |---|---|
//! | `server` | takes connections; stops in order |
//! | `http` | routes, waits for a slot, answers |
//! | `request`, `form`, `body`, `frames`, `encoding` | takes the URL and the form apart; reads the body whole, out of its frames or coding |
//! | `running` | holds its query id while it is under way |
//! | `asked` | tells the statement from the rows, wherever the client put them |
//! | `tokens`, `statement` | tells a SELECT, an INSERT with rows, a KILL, anything else |
//! | `execute`, `insert` | a session of its own: database, settings, parameters, the statement |
//! | `directory`, `chdb` | the data's lock; the engine's C interface |
//! | `answer`, `exception` | the result as it comes, or the exception with ClickHouse's code |
//! | `dissect` | the same up to the engine, without one, for the fuzz targets |
//!
//! **It serves** what four clients send, as their requests were recorded (`tests/tests/local_engine/clients.rs`):
//!
//! | client | what it sends |
//! |---|---|
//! | `clickhouse` (Rust) 0.15 | statements as bodies; with parameters, a form; rows in compressed frames (`decompress=1`), the statement in the URL |
//! | `clickhouse-connect` 1.12 (Python) | a session's id, `wait_end_of_query`; Native rows behind their statement, compressed by `Content-Encoding`; a form for long parameters |
//! | `@clickhouse/client` 1.23 (Node) | statements as bodies, rows with the statement in the URL, compressed by `Content-Encoding`; parameters in the URL or in a form; `/ping` |
//! | curl, as ClickHouse's manual shows it | statements in the URL of a GET, in a body, or in both; user, database and format by URL or by header |
//!
//! **It promises** beyond what a server does: an INSERT with rows is read whole before it runs, so a cut body inserts
//! nothing, and up to 1,048,449 rows are one block, hence atomic, for one partition.
//!
//! **It lacks**, and refuses where a client could otherwise take it for done:
//! - Users and passwords are accepted and ignored. There are no sessions between requests: what only a later request
//!   could notice (SET, USE, temporary tables) is refused with code 48.
//! - The engine makes query ids of its own. `KILL QUERY WHERE query_id = '…'` is answered here, from the requests under
//!   way, and waits until the query is over; every other KILL QUERY is refused with code 48. In `FROM system.processes`,
//!   `query_id` is the client's, by way of the setting `log_comment`, which clients therefore cannot use; `query` shows
//!   statements as the engine got them.
//! - Answers are never compressed: `Accept-Encoding` leaves that to the server, and `compress=1` is refused with code 48.
//! - INSERT INTO FUNCTION with rows, INSERT from `input()`, a column list with `*` or EXCEPT, and external tables are
//!   refused with code 48 or 36. `async_insert` has no effect.
//! - The engine never removes the data of a dropped table; the next start does. So DROP … SYNC does not wait.
//! - System logs (`system.query_log` …), replication and clusters do not exist.

mod answer;
mod asked;
mod body;
mod chdb;
mod directory;
#[doc(hidden)]
pub mod dissect;
mod encoding;
mod error;
mod exception;
mod execute;
mod form;
mod frames;
mod http;
mod insert;
mod request;
mod running;
mod server;
mod statement;
mod tokens;

use std::path::PathBuf;

pub use chdb::OpenError;
pub use error::Error;
pub use server::run;

/// What to serve, and where.
#[derive(Debug)]
pub struct Args {
    /// `libchdb.so`.
    pub lib: PathBuf,
    /// The directory of ClickHouse's data; made if it is missing.
    pub path: PathBuf,
    /// The port on 127.0.0.1; 0 to pick one.
    pub port: u16,
}
