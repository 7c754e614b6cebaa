//! A child that computes one id at a time: what it is sent, and which of its ids printed what.

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

/// A child that is behind answers within this, unless it has begun an id that it should have forgotten.
const CATCH_UP: Duration = Duration::from_secs(1);

/// A child process that has started.
pub(super) struct ChildLink {
    pub process: Process,
    to: OwnedWriteHalf,
    /// Memory that it had before its first id.
    pub base: u64,
    /// Ids that it was sent.
    sent: u64,
    /// Ids that it has computed.
    pub computed: u64,
    /// What the id in flight panicked with.
    pub panicked: Option<String>,
    printing: Printing,
    /// Whether it was told to forget ids, and has not said that it did.
    is_behind: bool,
}

impl ChildLink {
    pub fn new(process: Process, to: OwnedWriteHalf) -> Self {
        let base = process.resident();
        let printing = Printing::default();
        Self { process, to, base, sent: 0, computed: 0, panicked: None, printing, is_behind: false }
    }

    /// Sends ids of a batch.
    pub async fn send<I: Id>(&mut self, key: &BatchKey, ids: &[I]) -> io::Result<()> {
        let mut frames = Vec::new();
        ids.iter().for_each(|id| frame(b'C', &id.to_bytes(), &mut frames));
        self.printing.sent(key, ids);
        self.sent += ids.len() as u64;
        self.to.write_all(&frames).await
    }

    /// Has it forget the last of the ids that it was sent, as far as they are not begun.
    pub async fn forget(&mut self, ids: usize) {
        if ids == 0 {
            return;
        }
        self.is_behind = true;
        self.printing.forget(ids);
        let mut frames = Vec::new();
        // The others are kept, whether it has begun them or not.
        let kept = self.sent - ids as u64;
        frame(FORGET, &kept.to_le_bytes(), &mut frames);
        // One that has died is seen to have.
        let _died = self.to.write_all(&frames).await;
    }

    /// Waits until it has nothing in hand; whether that was soon. It may have begun an id just before it heard that
    /// another computes it: that answer has no use.
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

    /// Logs what it printed.
    pub fn tell(&mut self, said: Vec<Said>) {
        self.printing.tell(said);
    }
}

/// Whose lines come from a child: it says where it begins an id.
#[derive(Default)]
struct Printing {
    /// Run, batch and id of what it has begun.
    now: Option<[String; 3]>,
    /// The same of what it was sent and has not begun.
    next: VecDeque<[String; 3]>,
}

impl Printing {
    /// Ids are sent to the child.
    fn sent<I: Id>(&mut self, key: &BatchKey, ids: &[I]) {
        let about = |id| [key.pass.run.as_str().to_owned(), key.batch.to_string(), shown(id)];
        self.next.extend(ids.iter().map(about));
    }

    /// The last of them are not begun.
    fn forget(&mut self, ids: usize) {
        self.next.truncate(self.next.len().saturating_sub(ids));
    }

    /// Logs what it printed.
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
