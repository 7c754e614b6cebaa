//! The time limit of a request to NATS.

use std::time::Duration;

use crate::error::Error;

/// How long to wait for an answer of NATS before the request is retried or fails.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

pub(crate) async fn within<F: IntoFuture>(doing: &str, future: F) -> Result<F::Output, Error> {
    tokio::time::timeout(ANSWER_WITHIN, future.into_future())
        .await
        .map_err(|_| Error::BrokerSilent { doing: doing.to_owned(), after: ANSWER_WITHIN })
}
