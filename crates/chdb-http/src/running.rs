//! The requests that are under way, by query id.
//!
//! An id is taken from the moment a request's head is read until the engine is done with its statement, even if its client is
//! gone by then. So an id that is free again is the proof that its statement is over.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::Notify;

use crate::exception::{Exception, code};
use crate::tokens::quoted;

/// The requests that are under way.
#[derive(Default)]
pub(crate) struct Running {
    requests: Mutex<HashMap<String, Arc<State>>>,
    made: AtomicU64,
}

#[derive(Default)]
struct State {
    killed: AtomicBool,
    notify: Notify,
    statement: Mutex<String>,
    reader: Mutex<Option<pipe::Receiver>>,
}

/// The reading end of a request's result. A kill closes it: the engine's thread may be stuck in writing to a client that
/// does not read.
pub(crate) struct Reader(Arc<State>);

/// One request's hold on its id; ends when dropped.
pub(crate) struct Entry {
    running: Arc<Running>,
    state: Arc<State>,
    query_id: String,
}

/// A request as a KILL's answer shows it.
pub(crate) struct Victim {
    pub(crate) query_id: String,
    statement: String,
    state: Arc<State>,
}

impl Running {
    /// Takes `query_id`, or one that no other request has.
    pub(crate) fn enter(self: &Arc<Self>, query_id: Option<String>) -> Result<Entry, Exception> {
        let query_id = query_id.unwrap_or_else(|| self.fresh());
        let state = Arc::new(State::default());
        let mut requests = lock(&self.requests);
        if requests.contains_key(&query_id) {
            return Err(Exception::new(
                code::QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING,
                &format!("Query with id = {query_id} is already running."),
            ));
        }
        requests.insert(query_id.clone(), Arc::clone(&state));
        drop(requests);
        Ok(Entry { running: Arc::clone(self), state, query_id })
    }

    fn fresh(&self) -> String {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let count = self.made.fetch_add(1, Ordering::Relaxed);
        format!("{:x}-{:x}-{count:x}", std::process::id(), since.as_nanos())
    }

    /// The request with this id, if it is under way.
    pub(crate) fn victim(&self, query_id: &str) -> Option<Victim> {
        let requests = lock(&self.requests);
        let state = requests.get(query_id)?;
        let statement = lock(&state.statement).clone();
        Some(Victim { query_id: query_id.to_owned(), statement, state: Arc::clone(state) })
    }

    pub(crate) fn query_ids(&self) -> Vec<String> {
        lock(&self.requests).keys().cloned().collect()
    }

    fn has(&self, victim: &Victim) -> bool {
        lock(&self.requests).get(&victim.query_id).is_some_and(|state| Arc::ptr_eq(state, &victim.state))
    }
}

impl Entry {
    pub(crate) fn query_id(&self) -> &str {
        &self.query_id
    }

    /// What a KILL's answer shows of it.
    pub(crate) fn runs(&self, statement: &[u8]) {
        *lock(&self.state.statement) = String::from_utf8_lossy(statement).into_owned();
    }

    /// For a result that is longer than can be held.
    pub(crate) fn reader(&self) -> Reader {
        Reader(Arc::clone(&self.state))
    }

    pub(crate) fn check(&self) -> Result<(), Exception> {
        self.state.check()
    }

    /// Ends when the request is killed.
    pub(crate) async fn killed(&self) -> Exception {
        loop {
            // Before the look: a kill in between is not missed.
            let notified = self.state.notify.notified();
            if let Err(exception) = self.check() {
                return exception;
            }
            notified.await;
        }
    }
}

impl State {
    fn check(&self) -> Result<(), Exception> {
        if self.killed.load(Ordering::SeqCst) {
            return Err(Exception::new(code::QUERY_WAS_CANCELLED, "Query was cancelled"));
        }
        Ok(())
    }
}

impl Reader {
    /// From now on a kill closes `pipe`.
    pub(crate) fn holds(&self, pipe: pipe::Receiver) {
        let mut reader = lock(&self.0.reader);
        // A kill closes under the same lock, after it has set its mark.
        *reader = self.0.check().is_ok().then_some(pipe);
    }

    /// As the pipe's own; an error once it is closed.
    pub(crate) fn poll_read(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), Exception>> {
        let mut reader = lock(&self.0.reader);
        let Some(pipe) = reader.as_mut() else { return Poll::Ready(self.0.check()) };
        let read = ready!(Pin::new(pipe).poll_read(context, buffer));
        Poll::Ready(read.map_err(|error| Exception::io("read the result", &error)))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        lock(&self.0.reader).take();
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.running.requests).remove(&self.query_id);
    }
}

impl Victim {
    /// Keeps the request from reaching the engine. What is in the engine already, the engine must kill.
    pub(crate) fn kill(&self) {
        self.state.killed.store(true, Ordering::SeqCst);
        lock(&self.state.reader).take();
        self.state.notify.notify_waiters();
    }

    pub(crate) fn is_over(&self, running: &Running) -> bool {
        !running.has(self)
    }

    /// `('finished', 'id', 'default', 'SELECT …')`.
    pub(crate) fn row(&self) -> Vec<u8> {
        let fields = ["finished", &self.query_id, "default", &self.statement];
        let quoted: Vec<Vec<u8>> = fields.iter().map(|field| quoted(field.as_bytes(), b'\'')).collect();
        [b"(", &quoted.join(&b", "[..])[..], b")"].concat()
    }
}

/// A thread that panicked with the lock has not left half a change behind: every change is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_until_its_request_is_over() {
        let running = Arc::new(Running::default());
        let first = running.enter(Some("x".into())).expect("free");
        let refused = running.enter(Some("x".into())).err().map(|exception| exception.code);
        assert_eq!(refused, Some(code::QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING));
        assert!(running.victim("y").is_none());
        let victim = running.victim("x").expect("under way");
        drop(first);
        assert!(victim.is_over(&running));
        let _second = running.enter(Some("x".into())).expect("free again");
        assert!(victim.is_over(&running), "another request with the same id is not the victim");
    }

    #[tokio::test]
    async fn a_kill_reaches_who_waits_and_who_looks() {
        let running = Arc::new(Running::default());
        let entry = running.enter(None).expect("a fresh id");
        assert!(entry.check().is_ok());
        entry.runs(b"SELECT 'a'");
        let victim = running.victim(entry.query_id()).expect("under way");
        let (killed, ()) = tokio::join!(entry.killed(), async { victim.kill() });
        assert_eq!(killed.code, code::QUERY_WAS_CANCELLED);
        assert!(entry.check().is_err());
        let row = String::from_utf8(victim.row()).expect("text");
        assert!(
            row.starts_with("('finished', '") && row.ends_with(r"', 'default', 'SELECT \'a\'')"),
            "{row}"
        );
    }
}
