//! An isolated process, from the worker's side: which ids it was sent, and which id printed what.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use millstream::Id;
use millstream::child::{Answer, FORGET, frame};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;

use super::computed::BatchKey;
use super::output::Said;
use super::pool_process::shown;
use super::process::{News, Process, print};

/// A process that lags behind answers within this time, unless it has begun an id that it should have forgotten.
const CATCH_UP: Duration = Duration::from_secs(1);

/// A child process that has started.
pub(super) struct ChildLink {
    pub process: Process,
    to: OwnedWriteHalf,
    /// Memory of the process before its first id, in bytes.
    pub base: u64,
    /// Ids that the worker sent to the process.
    sent: u64,
    /// Ids that the process has computed.
    pub computed: u64,
    /// The panic message of the id in flight.
    pub panicked: Option<String>,
    printing: Printing,
    /// Whether the worker sent a FORGET frame that the process has not acknowledged.
    is_behind: bool,
}

impl ChildLink {
    pub fn new(process: Process, to: OwnedWriteHalf) -> Self {
        let base = process.resident();
        let printing = Printing::default();
        Self { process, to, base, sent: 0, computed: 0, panicked: None, printing, is_behind: false }
    }

    /// Sends ids of a batch to the process.
    pub async fn send<I: Id>(&mut self, key: &BatchKey, ids: &[I]) -> io::Result<()> {
        let mut frames = Vec::new();
        ids.iter().for_each(|id| frame(b'C', &id.to_bytes(), &mut frames));
        self.printing.sent(key, ids);
        self.sent += ids.len() as u64;
        self.to.write_all(&frames).await
    }

    /// Tells the process to forget the last `ids` of its ids, unless it has begun them.
    pub async fn forget(&mut self, ids: usize) {
        if ids == 0 {
            return;
        }
        self.is_behind = true;
        self.printing.forget(ids);
        let mut frames = Vec::new();
        // The process keeps all earlier ids, begun or not.
        let kept = self.sent - ids as u64;
        frame(FORGET, &kept.to_le_bytes(), &mut frames);
        // The worker notices a dead process when it reads.
        let _died = self.to.write_all(&frames).await;
    }

    /// Waits until the process has nothing in progress; `false` if that takes too long. The process may have begun an
    /// id just before the FORGET frame arrived: that answer has no use.
    pub async fn catch_up(&mut self) -> bool {
        if !self.is_behind {
            return true;
        }
        self.process.listen_again();
        let forgotten = async {
            loop {
                match self.process.next().await {
                    News::Frame(kind, body) => match Answer::read(kind, &body) {
                        Ok(Answer::Forgotten) => return true,
                        Ok(_) => {}
                        Err(_) => return false,
                    },
                    News::Printed(said) => self.printing.tell(said),
                    News::Look => {}
                    News::Gone | News::Silent | News::Broken(_) => return false,
                }
            }
        };
        self.is_behind = !tokio::time::timeout(CATCH_UP, forgotten).await.unwrap_or(false);
        !self.is_behind
    }

    /// Logs the lines that the process printed.
    pub fn tell(&mut self, said: Vec<Said>) {
        self.printing.tell(said);
    }
}

/// Assigns printed lines to ids: the process marks where each id begins.
#[derive(Default)]
struct Printing {
    /// Run, batch and id that the process has begun.
    now: Option<[String; 3]>,
    /// Run, batch and id of each id that the process received and has not begun.
    next: VecDeque<[String; 3]>,
}

impl Printing {
    /// Notes ids that the worker sends.
    fn sent<I: Id>(&mut self, key: &BatchKey, ids: &[I]) {
        let about = |id| [key.pass.run.as_str().to_owned(), key.batch.to_string(), shown(id)];
        self.next.extend(ids.iter().map(about));
    }

    /// Drops the last `ids` ids, which are not begun.
    fn forget(&mut self, ids: usize) {
        self.next.truncate(self.next.len().saturating_sub(ids));
    }

    /// Logs the lines that the process printed.
    fn tell(&mut self, said: Vec<Said>) {
        for said in said {
            match said {
                Said::Next => self.now = self.next.pop_front(),
                Said::Line(_) => {
                    let about = self.now.as_ref().map(|[run, batch, id]| (&**run, &**batch, &**id));
                    print(vec![said], about);
                }
            }
        }
    }
}
