//! Stages of the engine that run beside a test, in its process, and their connections.

use millstream::{Pipeline, check};
use millstream_engine::{Broker, Environment, Error, NatsAddress, Stop, Store, StoreAddress};
use tokio::task::JoinSet;

/// Connects to NATS for the pipeline of this name.
///
/// # Panics
/// When NATS does not answer.
pub async fn broker(url: &str, pipeline: &str) -> Broker {
    let address = NatsAddress { url: url.to_owned(), origin: "test".into(), ..NatsAddress::default() };
    Broker::connect(&address, pipeline, Environment::plain("millstream"), "test").await.expect("NATS")
}

/// Connects to ClickHouse for a pipeline.
///
/// # Panics
/// When the pipeline has a fault, or ClickHouse does not answer.
pub async fn store<P: Pipeline>(url: &str) -> Store {
    let address = StoreAddress {
        url: url.to_owned(),
        user: String::new(),
        password: String::new(),
        environment: Environment::plain("millstream"),
        origin: "test".into(),
    };
    Store::connect(&check::<P>().expect("sound"), address).await.expect("ClickHouse")
}

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
