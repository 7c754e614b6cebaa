//! Shutdown: stop taking work, finish held work until a deadline, then give up.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The stop signal, and the tasks that shutdown waits for. Clones share them.
#[derive(Debug, Clone)]
pub struct Stop {
    taking: CancellationToken,
    working: CancellationToken,
    tasks: TaskTracker,
    all: Arc<All>,
}

/// The state that a part shares with its siblings and their parent.
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
    /// A stop that has not been signalled.
    pub fn new() -> Self {
        Self::default()
    }

    /// A part that can be stopped without its siblings, and stops with its parent.
    pub fn child(&self) -> Self {
        Self {
            taking: self.taking.child_token(),
            working: self.working.child_token(),
            tasks: TaskTracker::new(),
            all: self.all.clone(),
        }
    }

    /// From now on no more work is taken; held work continues.
    pub fn stop_taking(&self) {
        self.taking.cancel();
    }

    /// Gives up held work too.
    pub fn give_up(&self) {
        self.taking.cancel();
        self.working.cancel();
    }

    /// Whether taking work has stopped.
    pub fn taking_stopped(&self) -> bool {
        self.taking.is_cancelled()
    }

    /// Resolves when taking stops. Race it only against the wait for the next item.
    pub async fn no_more_taking(&self) {
        self.taking.cancelled().await;
    }

    /// Resolves when held work is given up.
    pub async fn given_up(&self) {
        self.working.cancelled().await;
    }

    /// Whether held work is given up.
    pub fn is_given_up(&self) -> bool {
        self.working.is_cancelled()
    }

    /// Waits; returns early, with `false`, when held work is given up.
    pub async fn pause(&self, wait: Duration) -> bool {
        tokio::time::timeout(wait, self.given_up()).await.is_err()
    }

    /// Waits; returns early, with `false`, when taking stops.
    pub async fn rest(&self, wait: Duration) -> bool {
        tokio::time::timeout(wait, self.no_more_taking()).await.is_err()
    }

    /// Starts a task that [`Self::finished`] waits for. It ends by itself when held work is given up. A panic
    /// in it ends the whole process, because the work that the task held would otherwise be stuck silently.
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns: through the tracker")]
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let all = self.all.clone();
        drop(self.tasks.spawn(async move {
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                tracing::error!("a task panicked, which is a fault of Millstream; the process ends, and the batches that it held are redelivered");
                all.has_panicked.store(true, Ordering::Relaxed);
                all.taking.cancel();
                all.working.cancel();
            }
        }));
    }

    /// Whether a task of this process has panicked, so that all work is given up.
    pub fn has_panicked(&self) -> bool {
        self.all.has_panicked.load(Ordering::Relaxed)
    }

    /// Waits for every task until `deadline`, then gives up held work and waits for the rest.
    pub async fn finished(&self, deadline: Duration) {
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                seconds = deadline.as_secs(),
                "the drain deadline has passed: held work is given up"
            );
            self.give_up();
            self.tasks.wait().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: a task panicked, the sink held its batches for ever, and no log line said why.
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
