//! A stage of the engine that runs beside a test, in its process.

use millstream_engine::{Error, Stop};
use tokio::task::JoinSet;

/// A stage under way; it ends with this value.
pub struct Service {
    stop: Stop,
    tasks: JoinSet<Result<(), Error>>,
}

impl Service {
    /// Starts what `part` makes of the stop that it is given.
    pub fn start<F>(part: impl FnOnce(Stop) -> F) -> Self
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let stop = Stop::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(part(stop.clone()));
        Self { stop, tasks }
    }

    /// Drains it.
    ///
    /// # Panics
    /// When it has panicked or failed.
    pub async fn end(mut self) {
        self.stop.stop_taking();
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no panic").expect("no failure");
        }
    }
}

/// A test that fails leaves no stage at work.
impl Drop for Service {
    fn drop(&mut self) {
        self.stop.give_up();
    }
}
