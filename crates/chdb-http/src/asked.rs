//! Where a request has its statement, and where its rows.

use std::io;

use crate::body::{Coming, MemoryFile};
use crate::exception::{Exception, code};
use crate::form;
use crate::request::Request;
use crate::statement::{self, Statement};

/// The most that a statement may hold without its rows; ClickHouse's `max_query_size`.
const MAX_STATEMENT: usize = 1 << 18;

/// How the body of a request is stored. Blocks of rows in Native, with their statement in the URL, stay compressed.
pub(crate) fn coming(request: &Request) -> Coming {
    if !request.decompress {
        return Coming::AsItIs;
    }
    match statement::parse(&request.query) {
        Ok(Statement::Insert(insert))
            if request.boundary.is_none()
                && insert.format == "Native"
                && insert.data_at == request.query.len() =>
        {
            Coming::Packed
        }
        _ => Coming::Frames,
    }
}

/// A request with its statement told from its rows.
pub(crate) struct Asked {
    pub(crate) request: Request,
    pub(crate) sql: Vec<u8>,
    pub(crate) statement: Statement,
    pub(crate) rows: MemoryFile,
}

impl Asked {
    /// The statement is in a form, or in the URL, or at the start of the body, or in URL and body, one after the other.
    pub(crate) fn new(mut request: Request, body: MemoryFile) -> Result<Self, Exception> {
        let head = body.head(MAX_STATEMENT).map_err(unreadable)?;
        let whole = body.len() <= MAX_STATEMENT as u64;
        if let Some(boundary) = request.boundary.take() {
            return if whole { Self::of_form(request, &head, &boundary) } else { Err(too_large()) };
        }
        let sql = std::mem::take(&mut request.query);
        if sql.is_empty() {
            Self::of_body(request, head, body, whole)
        } else {
            Self::of_url_and_body(request, sql, &head, body, whole)
        }
    }

    fn of_form(mut request: Request, form: &[u8], boundary: &str) -> Result<Self, Exception> {
        for (name, value) in form::fields(form, boundary)? {
            request.take(&name, value)?;
        }
        let sql = std::mem::take(&mut request.query);
        Self::of(request, sql, MemoryFile::new().map_err(unreadable)?, 0)
    }

    fn of_body(
        request: Request,
        mut head: Vec<u8>,
        body: MemoryFile,
        whole: bool,
    ) -> Result<Self, Exception> {
        let statement = statement::parse(&head)?;
        let rows = match &statement {
            Statement::Insert(insert) => {
                head.truncate(insert.data_at);
                body.tail(b"", insert.data_at as u64).map_err(unreadable)?
            }
            _ if whole => body,
            _ => return Err(too_large()),
        };
        Ok(Self { request, sql: head, statement, rows })
    }

    fn of_url_and_body(
        request: Request,
        mut sql: Vec<u8>,
        head: &[u8],
        body: MemoryFile,
        whole: bool,
    ) -> Result<Self, Exception> {
        if body.len() > 0 {
            sql.push(b'\n');
        }
        if let Statement::Insert(_) = statement::parse(&sql)? {
            return Self::of(request, sql, body, 0);
        }
        if !whole {
            return Err(too_large());
        }
        sql.extend_from_slice(head);
        Self::of(request, sql, body, head.len() as u64)
    }

    /// `sql` may have rows at its end, and `body` goes on from `at`.
    fn of(request: Request, sql: Vec<u8>, body: MemoryFile, at: u64) -> Result<Self, Exception> {
        let statement = statement::parse(&sql)?;
        let rows = match &statement {
            Statement::Insert(insert) if insert.data_at < sql.len() => {
                body.tail(&sql[insert.data_at..], at).map_err(unreadable)?
            }
            _ => body,
        };
        Ok(Self { request, sql, statement, rows })
    }
}

fn unreadable(error: io::Error) -> Exception {
    Exception::io("read the body", &error)
}

fn too_large() -> Exception {
    Exception::new(
        code::SYNTAX_ERROR,
        &format!(
            "Syntax error: Max query size exceeded (the statement is longer than {MAX_STATEMENT} bytes)"
        ),
    )
}
