//! ClickHouse's HTTP interface: from a request to an answer.

use std::io;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::{Method, Response, StatusCode};
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::spawn_blocking;

use crate::answer::{Abandon, Answer, Begun, Outcome, Stream, begin};
use crate::asked::{Asked, coming};
use crate::body::{self, Coming, MemoryFile};
use crate::chdb::{Engine, Output};
use crate::exception::{Exception, code};
use crate::execute::{self, Done, Sink, Work};
use crate::request::Request;
use crate::running::{Entry, Running};
use crate::statement::Statement;

/// Statements that run at once; more wait.
pub(crate) const SLOTS: u32 = 16;
/// KILLs that run at once, so that they do not wait for what they are to kill.
pub(crate) const KILLS: u32 = 4;
const DEFAULT_FORMAT: &str = "TabSeparated";
/// The header that names a result's format.
const FORMAT: &str = "X-ClickHouse-Format";

/// What all requests share.
pub(crate) struct Face {
    pub(crate) engine: Engine,
    pub(crate) running: Arc<Running>,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) kills: Arc<Semaphore>,
    pub(crate) abandoned: mpsc::Sender<String>,
    pub(crate) version: Arc<str>,
}

/// Answers one request.
pub(crate) async fn answer(face: Arc<Face>, request: hyper::Request<Incoming>) -> Response<Answer> {
    let path = request.uri().path();
    match *request.method() {
        Method::GET if path == "/ping" || (path == "/" && request.uri().query().is_none()) => {
            plain(StatusCode::OK, "Ok.\n".to_owned())
        }
        Method::GET | Method::POST if path == "/" => query(face, request).await,
        Method::GET | Method::POST => plain(StatusCode::NOT_FOUND, format!("There is no handle {path}\n")),
        _ => plain(StatusCode::NOT_IMPLEMENTED, "Only GET and POST are understood\n".to_owned()),
    }
}

fn plain(status: StatusCode, text: String) -> Response<Answer> {
    let mut response = Response::new(Answer::whole(text));
    *response.status_mut() = status;
    response
}

async fn query(face: Arc<Face>, request: hyper::Request<Incoming>) -> Response<Answer> {
    let (parts, incoming) = request.into_parts();
    let entered = Request::new(&parts).and_then(|request| {
        let entry = face.running.enter(request.query_id.clone())?;
        Ok((request, entry))
    });
    let (request, entry) = match entered {
        Ok(entered) => entered,
        Err(exception) => {
            // A client that is still sending would not see the answer.
            if let Err(error) = body::receive(incoming, Coming::AsItIs, None).await {
                tracing::debug!(?error, "a refused request's body");
            }
            return failed(&exception, None, &face.version);
        }
    };
    let query_id = entry.query_id().to_owned();
    let mut response = match respond(&face, request, entry, incoming).await {
        Ok(response) => response,
        Err(exception) => failed(&exception, Some(&query_id), &face.version),
    };
    head(&mut response, "X-ClickHouse-Query-Id", &query_id);
    response
}

fn failed(exception: &Exception, query_id: Option<&str>, version: &str) -> Response<Answer> {
    tracing::debug!(query_id, ?exception, "a request failed");
    let mut response = plain(exception.status(), exception.line(version));
    head(&mut response, "X-ClickHouse-Exception-Code", &exception.code.to_string());
    response
}

/// A value that cannot be a header, such as a query id with a line break, is left out.
fn head(response: &mut Response<Answer>, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

async fn respond(
    face: &Arc<Face>,
    request: Request,
    entry: Entry,
    incoming: Incoming,
) -> Result<Response<Answer>, Exception> {
    let received = tokio::select! {
        received = body::receive(incoming, coming(&request), request.encoding) => received?,
        exception = entry.killed() => return Err(exception),
    };
    let asked = tokio::task::block_in_place(|| Asked::new(request, received))?;
    let Asked { request, sql, statement, rows } = asked;
    entry.runs(&sql);
    let slots = if matches!(statement, Statement::Kill(_)) { &face.kills } else { &face.slots };
    let permit = tokio::select! {
        permit = Arc::clone(slots).acquire_owned() => permit.map_err(|_| shutting_down())?,
        exception = entry.killed() => return Err(exception),
    };
    let call = Call { face: Arc::clone(face), permit, request, sql, entry };
    match statement {
        Statement::Insert(insert) => call.write(Work::Insert(insert, rows)).await,
        Statement::Other => call.write(Work::Other).await,
        Statement::Reads(reads) => {
            let format = reads.format.clone();
            call.read(format, |sink| Work::Read(reads, sink)).await
        }
        Statement::DropSync => call.write(Work::DropSync).await,
        Statement::Kill(kill) => {
            let format = kill.format.clone();
            call.read(format, |sink| Work::Kill(kill, sink)).await
        }
    }
}

fn shutting_down() -> Exception {
    Exception::new(code::QUERY_WAS_CANCELLED, "Query was cancelled: the server is shutting down")
}

/// A statement that has its slot.
struct Call {
    face: Arc<Face>,
    permit: OwnedSemaphorePermit,
    request: Request,
    sql: Vec<u8>,
    entry: Entry,
}

impl Call {
    /// Runs on to its end, even if the client leaves.
    fn start(self, work: Work) -> Outcome {
        spawn_blocking(move || {
            let Self { face, permit, request, sql, entry } = self;
            let outcome = execute::run(&face.engine, &face.running, &request, &sql, work, entry);
            drop(permit);
            outcome
        })
    }

    async fn write(self, work: Work) -> Result<Response<Answer>, Exception> {
        let format = self.format(None);
        let mut done = finished(self.start(work)).await?;
        let data = std::mem::take(&mut done.output.data);
        let has_result = !data.is_empty();
        let mut response = Response::new(Answer::whole(data));
        // By this header clients tell a result of no rows from none.
        if has_result {
            head(&mut response, FORMAT, &format);
        }
        summary(&mut response, &done);
        Ok(response)
    }

    async fn read(
        self,
        format: Option<String>,
        work: impl FnOnce(Sink) -> Work,
    ) -> Result<Response<Answer>, Exception> {
        let format = self.format(format);
        let mut response =
            if self.request.wait_end { self.read_whole(work).await? } else { self.read_on(work).await? };
        head(&mut response, FORMAT, &format);
        Ok(response)
    }

    /// Answers once the statement is over.
    async fn read_whole(self, work: impl FnOnce(Sink) -> Work) -> Result<Response<Answer>, Exception> {
        let mut abandon = self.abandon();
        let file = Arc::new(MemoryFile::new().map_err(no_room)?);
        let done = finished(self.start(work(Sink::File(Arc::clone(&file))))).await;
        abandon.disarm();
        let mut response = Response::new(Answer::File { file, at: 0 });
        summary(&mut response, &done?);
        Ok(response)
    }

    /// Answers once the statement is over or its result is too long to be held back.
    async fn read_on(self, work: impl FnOnce(Sink) -> Work) -> Result<Response<Answer>, Exception> {
        let mut abandon = self.abandon();
        let version = Arc::clone(&self.face.version);
        let reader = self.entry.reader();
        let (sender, mut receiver) = pipe::pipe().map_err(no_room)?;
        let outcome = self.start(work(Sink::Pipe(sender)));
        match begin(&mut receiver).await.map_err(|error| Exception::io("read the result", &error))? {
            Begun::More(held) => {
                reader.holds(receiver);
                let stream = Stream::new(held, reader, outcome, abandon, version);
                let tag = stream.tag().to_owned();
                let mut response = Response::new(Answer::Stream(Box::new(stream)));
                head(&mut response, "X-ClickHouse-Exception-Tag", &tag);
                Ok(response)
            }
            Begun::Over(data) => {
                let done = finished(outcome).await;
                abandon.disarm();
                let mut response = Response::new(Answer::whole(data));
                summary(&mut response, &done?);
                Ok(response)
            }
        }
    }

    fn abandon(&self) -> Abandon {
        Abandon::new(self.entry.query_id().to_owned(), self.face.abandoned.clone())
    }

    fn format(&self, format: Option<String>) -> String {
        format.or_else(|| self.request.default_format.clone()).unwrap_or_else(|| DEFAULT_FORMAT.to_owned())
    }
}

async fn finished(outcome: Outcome) -> Result<Done, Exception> {
    outcome.await.unwrap_or_else(|panic| Err(Exception::io("run the query", &io::Error::other(panic))))
}

fn no_room(error: io::Error) -> Exception {
    Exception::io("make room for the result", &error)
}

fn summary(response: &mut Response<Answer>, done: &Done) {
    let Output { result_rows, result_bytes, read_rows, read_bytes, written_rows, written_bytes, .. } =
        done.output;
    let elapsed = done.took.as_nanos();
    let text = format!(
        r#"{{"read_rows":"{read_rows}","read_bytes":"{read_bytes}","written_rows":"{written_rows}","written_bytes":"{written_bytes}","total_rows_to_read":"0","result_rows":"{result_rows}","result_bytes":"{result_bytes}","elapsed_ns":"{elapsed}"}}"#
    );
    head(response, "X-ClickHouse-Summary", &text);
}
