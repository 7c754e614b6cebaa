//! What the engine would be asked on behalf of a request, without an engine: the way in for the fuzz targets of
//! `tests/fuzz`.
//!
//! What a client's bytes pass through before the engine's own parser sees them is private, and lies behind hyper and a
//! library of 600 MB. This runs the same functions in the same order on bytes in memory: no socket, no engine, no file
//! but the unnamed one that holds every body. hyper's own parser comes before it and is not part of it.

use hyper::http::request::Parts;

use crate::asked::{Asked, coming};
use crate::body::Receiving;
use crate::exception::Exception;
use crate::execute::into_file;
use crate::insert;
use crate::request::Request;
use crate::statement::{self, Statement};

/// The file that results are written to and rows are read from.
pub const FILE: &str = "/proc/self/fd/7";
/// The query id of a request that names none.
pub const QUERY_ID: &str = "made-up";

/// The table of every INSERT, as the engine would describe it.
const TABLE: &[u8] = br#"{"name":"id","type":"UInt64","default_type":"","default_expression":""}
{"name":"it's `odd`","type":"Enum8('a\\'b' = 1)","default_type":"DEFAULT","default_expression":"'a\\'b'"}
"#;

/// What the engine would be asked.
#[derive(Debug, PartialEq, Eq)]
pub struct Dissected {
    /// Statements that make the session the request's.
    pub session: Vec<Vec<u8>>,
    /// The request's own, as the engine would get it.
    pub statement: Vec<u8>,
    /// Which kind it was taken for.
    pub kind: Kind,
    /// The rows of an INSERT; for others, what is left of the body.
    pub rows: Vec<u8>,
    /// How the rows are compressed, by the engine's word for it.
    pub compression: Option<&'static str>,
    /// Query parameters, name and value.
    pub params: Vec<(String, String)>,
}

/// What a statement was taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It has a result.
    Reads,
    /// Its rows are in the body.
    Insert,
    /// It kills a query by its id.
    Kill,
    /// Anything else.
    Other,
}

/// Takes a request apart, its body in the pieces in which it came; the code of ClickHouse's exception where it is
/// refused. `None` for a head that hyper would not let pass.
pub fn dissect(
    method: &str,
    uri: &str,
    headers: &[(&str, &[u8])],
    pieces: &[&[u8]],
) -> Option<Result<Dissected, u32>> {
    let head =
        headers.iter().fold(hyper::Request::builder().method(method).uri(uri), |head, (name, value)| {
            head.header(*name, *value)
        });
    let (head, ()) = head.body(()).ok()?.into_parts();
    Some(ask(&head, pieces).map_err(|exception| exception.code))
}

fn ask(head: &Parts, pieces: &[&[u8]]) -> Result<Dissected, Exception> {
    let request = Request::new(head)?;
    let mut receiving = Receiving::new(coming(&request), request.encoding)?;
    pieces.iter().try_for_each(|piece| receiving.push(piece))?;
    let Asked { request, sql, statement, rows } = Asked::new(request, receiving.finish()?)?;
    let (kind, statement) = match statement {
        Statement::Reads(reads) => {
            (Kind::Reads, into_file(&statement::with_real_query_ids(&sql), &reads, FILE))
        }
        Statement::Insert(insert) => {
            (Kind::Insert, insert::from_file(TABLE, &insert, FILE, rows.compression())?)
        }
        Statement::Kill(kill) => (Kind::Kill, statement::kill_marked(&kill.query_id)),
        Statement::DropSync => (Kind::Other, statement::drop_without_sync(&sql)),
        Statement::Other => (Kind::Other, sql),
    };
    let query_id = request.query_id.as_deref().unwrap_or(QUERY_ID);
    let length = usize::try_from(rows.len()).unwrap_or(usize::MAX);
    let compression = rows.compression();
    let rows = rows.head(length).map_err(|error| Exception::io("read the rows", &error))?;
    Ok(Dissected {
        session: request.session(query_id),
        statement,
        kind,
        rows,
        compression,
        params: request.params,
    })
}
