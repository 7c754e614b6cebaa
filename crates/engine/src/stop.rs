//! How everything ends: stop taking, finish what is held until a deadline, then give up.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The reason to stop and the tasks that shutdown waits for. Clones are the same.
#[derive(Debug, Clone)]
pub struct Stop {
    taking: CancellationToken,
    working: CancellationToken,
    tasks: TaskTracker,
    all: Arc<All>,
}

/// What a part has in common with its siblings and their parent.
#[derive(Debug)]
struct All {
    has_panicked: AtomicBool,
    taking: CancellationToken,
    working: CancellationToken,
}

impl Default for Stop {
    fn default() -> Self {
        let taking = CancellationToken::new();
        let working = CancellationToken::new();
        let has_panicked = AtomicBool::new(false);
        let all = Arc::new(All { has_panicked, taking: taking.clone(), working: working.clone() });
        Self { taking, working, tasks: TaskTracker::new(), all }
    }
}

impl Stop {
    /// Nothing is stopping yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A part that can be stopped without its siblings, and is stopped with its parent.
    pub fn child(&self) -> Self {
        Self {
            taking: self.taking.child_token(),
            working: self.working.child_token(),
            tasks: TaskTracker::new(),
            all: self.all.clone(),
        }
    }

    /// No more work is taken from now on; what is held goes on.
    pub fn stop_taking(&self) {
        self.taking.cancel();
    }

    /// What is held is given up too.
    pub fn give_up(&self) {
        self.taking.cancel();
        self.working.cancel();
    }

    /// Whether work may still be taken.
    pub fn taking_stopped(&self) -> bool {
        self.taking.is_cancelled()
    }

    /// Resolves when no more work may be taken. Races only against the wait for the next item.
    pub async fn no_more_taking(&self) {
        self.taking.cancelled().await;
    }

    /// Resolves when held work is to be given up.
    pub async fn given_up(&self) {
        self.working.cancelled().await;
    }

    /// Whether held work is to be given up.
    pub fn is_given_up(&self) -> bool {
        self.working.is_cancelled()
    }

    /// Waits, but no longer than until held work is to be given up: `false` then.
    pub async fn pause(&self, wait: Duration) -> bool {
        tokio::time::timeout(wait, self.given_up()).await.is_err()
    }

    /// Waits, but no longer than until no more work may be taken: `false` then.
    pub async fn rest(&self, wait: Duration) -> bool {
        tokio::time::timeout(wait, self.no_more_taking()).await.is_err()
    }

    /// Starts a task that [`Self::finished`] waits for. It ends by itself when work is given up. One that panics ends everything:
    /// what it had in its hands would stay there, and nothing would say so.
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns: through the tracker")]
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let all = self.all.clone();
        drop(self.tasks.spawn(async move {
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                tracing::error!("a task panicked, which is a fault of Millstream; the process ends, and what it held is delivered again");
                all.has_panicked.store(true, Ordering::Relaxed);
                all.taking.cancel();
                all.working.cancel();
            }
        }));
    }

    /// Whether a task of this process has panicked, which is why everything is given up.
    pub fn has_panicked(&self) -> bool {
        self.all.has_panicked.load(Ordering::Relaxed)
    }

    /// Waits for every task, at most `deadline`, then gives up what is left and waits for that.
    pub async fn finished(&self, deadline: Duration) {
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_err() {
            tracing::warn!(seconds = deadline.as_secs(), "work held is given up after the deadline");
            self.give_up();
            self.tasks.wait().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its subjects stayed in the sink's hands: that sink never stored them, and nothing said why.
    #[tokio::test]
    async fn a_task_that_panics_ends_everything() {
        let stop = Stop::new();
        let part = stop.child();
        let sibling = stop.child();
        part.spawn(async { panic!("on purpose") });
        tokio::join!(stop.given_up(), sibling.given_up());
        assert!(stop.has_panicked() && sibling.has_panicked() && sibling.taking_stopped());
        part.finished(Duration::from_secs(60)).await;
    }
}
