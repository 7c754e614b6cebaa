//! NATS: the connection, publishing, reading and purging messages. Every wait for an answer has a timeout.

mod again;
mod consumers;
mod kept;
mod login;
mod messages;
mod setup;
mod tls;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{Context, context};
use async_nats::{Client, ConnectOptions, Event};
use bytes::Bytes;
use millstream::names::Names;
use percent_encoding::percent_decode_str;
use tokio::sync::Mutex;

use crate::environment::Environment;
use crate::error::{Code, Error, Source, broker, full_cause};
use crate::model::address::without_password;
use crate::model::host::host_name;
use crate::nats::answer::{ANSWER_WITHIN, within};
use crate::nats::bucket::Records;
use crate::retry::Backoff;
use crate::stop::Stop;

pub use again::RowsMessage;
pub use consumers::Standing;
pub use kept::{Kept, Reserved};
use login::Login;
pub use messages::Stray;
pub use setup::StreamLimits;

/// A dead peer is noticed by pings alone: after two that stay unanswered.
const PING: Duration = Duration::from_secs(5);

/// Where NATS is.
#[derive(Debug, Clone, Default)]
pub struct NatsAddress {
    /// `nats://host:port`, several with commas between; with a token or a user and a password before an `@`.
    pub url: String,
    /// A credentials file, or one with an nkey's seed.
    pub creds: Option<PathBuf>,
    /// Certificates of the authority that the server's is of, where the system does not know it.
    pub ca: Option<PathBuf>,
    /// The certificate and the key that this process shows to the server.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// Where the address came from, for messages: `--nats`, `NATS_URL`, the local stack.
    pub origin: String,
}

/// The server's words where a stream is full.
const FULL: &str = "maximum bytes";
/// The server's words where a subject holds a message that it neither reads nor removes.
const DAMAGED: &str = "maximum messages per subject";
/// What is said where the server says nothing.
const SILENT: &str = "no answer";
/// What helps where a stream is full.
const STREAM_FULL: &str = "the stream is full: rows wait for sinks to catch up; ids stay for replay, so give their \
                           stream more bytes ([streams] ids_bytes, `nats stream edit`) or remove old runs from it";

/// How a publish that nobody may do twice came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// This writer's bytes are stored.
    First,
    /// The subject already held a message.
    Already,
}

/// A connection to NATS, for one pipeline.
#[derive(Debug, Clone)]
pub struct Broker {
    names: Names,
    environment: Environment,
    /// When a stream that is full was last refused more bytes.
    refused_growth: Arc<Mutex<Option<Instant>>>,
    client: Client,
    jetstream: Context,
    /// Who speaks: the command and its host.
    role: String,
}

impl Broker {
    /// Connects. Afterwards the client reconnects by itself, for as long as it takes.
    ///
    /// # Errors
    /// [`Error::Name`] for a pipeline whose name is none; [`Error::MixedLogins`],
    /// [`Error::Credentials`] and [`Error::Certificates`] for what cannot be shown; [`Error::Connect`] when no server answers now.
    pub async fn connect(
        address: &NatsAddress,
        pipeline: &str,
        environment: Environment,
        role: &str,
    ) -> Result<Self, Error> {
        let names = Names::new(pipeline, environment.namespace.clone())?;
        let login = Login::of(address)?;
        let shown = login.check().await?;
        let options = match login {
            Login::Open => ConnectOptions::new(),
            login => ConnectOptions::with_auth_callback(move |nonce| {
                let login = login.clone();
                async move { login.auth(&nonce).await }
            }),
        };
        let mut options = options
            .name(format!("millstream {} {role}", names.pipeline()))
            .ping_interval(PING)
            .connection_timeout(Duration::from_secs(5))
            .request_timeout(Some(ANSWER_WITHIN))
            .max_reconnects(None)
            .event_callback(|event| async move { log_event(&event) });
        options = tls::with_certificates(options, address).await?;
        let servers = address.url.split(',').map(str::trim);
        let servers: Vec<String> = servers.map(str::to_owned).collect();
        let client = options.connect(servers).await.map_err(|source| Error::Connect {
            server: without_password(&address.url),
            origin: address.origin.clone(),
            shown,
            source,
        })?;
        let jetstream = context::ContextBuilder::new()
            .timeout(ANSWER_WITHIN)
            .ack_timeout(ANSWER_WITHIN)
            .build(client.clone());
        let refused_growth = Arc::default();
        Ok(Self {
            names,
            environment,
            refused_growth,
            client,
            jetstream,
            role: format!("{role} on {}", host_name()),
        })
    }

    /// The pipeline's names.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The stream that the bucket of records is kept in.
    pub(crate) fn bucket_stream(&self) -> String {
        format!("KV_{}", self.names.bucket())
    }

    /// The largest message that the server takes, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client.server_info().max_payload
    }

    /// The server's version.
    pub fn server_version(&self) -> String {
        self.client.server_info().version
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The bucket of run and pass records.
    ///
    /// # Errors
    /// When it does not exist: [`Self::setup`] makes it.
    pub async fn records(&self) -> Result<Records, Error> {
        let doing = format!("open bucket `{}`", self.names.bucket());
        let bucket = within(&doing, self.jetstream.get_key_value(self.names.bucket()))
            .await?
            .map_err(broker(doing))?;
        Ok(Records::new(self.jetstream.clone(), bucket, self.names.clone()))
    }

    /// Stores a message under a subject that holds none, for as long as that takes: **first-writer-wins**.
    ///
    /// A PubAck and error 10071 both mean that it is done. Anything else (no answer, a full stream, a server that is
    /// starting) is tried again with the same bytes. An unanswered publish leaks an entry in the client (nats.rs issue
    /// 1617), which timeout and backoff bound to a few a minute.
    ///
    /// # Errors
    /// [`Error::TooLarge`], which no retry can heal; [`Error::Stopped`] when work is given up.
    pub async fn write_once(&self, subject: &str, bytes: Bytes, stop: &Stop) -> Result<Written, Error> {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(10));
        loop {
            if stop.is_given_up() {
                return Err(Error::Stopped);
            }
            let message = PublishMessage::build().payload(bytes.clone()).expected_last_subject_sequence(0);
            let attempt = async { self.jetstream.send_publish(subject.to_owned(), message).await?.await };
            let error = match tokio::time::timeout(ANSWER_WITHIN * 2, attempt).await {
                Ok(Ok(_)) => return Ok(Written::First),
                Ok(Err(error)) => match error.kind() {
                    PublishErrorKind::WrongLastSequence => return Ok(Written::Already),
                    PublishErrorKind::MaxPayloadExceeded => {
                        let (subject, limit) = (subject.to_owned(), self.max_payload());
                        return Err(Error::TooLarge { subject, bytes: bytes.len(), limit });
                    }
                    _ => full_cause(&error),
                },
                Err(_) => SILENT.to_owned(),
            };
            if error.contains(FULL) && self.grow(subject, bytes.len()).await {
                continue;
            }
            let wait = backoff.wait();
            let (code, hint) = unconfirmed(&error);
            tracing::warn!(subject, %error, hint, code = code.map(tracing::field::display), retry_ms = wait.as_millis() as u64, "publish not confirmed, trying again");
            if !stop.pause(wait).await {
                return Err(Error::Stopped);
            }
        }
    }

    /// Publishes on a plain subject, for whoever listens now.
    ///
    /// # Errors
    /// The broker's.
    pub async fn announce(&self, subject: String, bytes: Bytes) -> Result<(), Error> {
        let doing = format!("announce on `{subject}`");
        within(&doing, self.client.publish(subject, bytes)).await?.map_err(broker(&doing))?;
        within(&doing, self.client.flush()).await?.map_err(broker(doing))
    }

    /// Waits until what was queued, acks above all, is on its way, and the server has seen it.
    pub async fn flush(&self) {
        // A round trip: `flush` alone says that the bytes are in the socket.
        let round_trip = async {
            self.client.flush().await.map_err(Source::from)?;
            self.jetstream.query_account().await.map_err(Source::from)
        };
        if !matches!(tokio::time::timeout(ANSWER_WITHIN, round_trip).await, Ok(Ok(_))) {
            tracing::warn!("the last acks may be lost: those batches will be delivered again");
        }
    }
}

/// What a publish that is not confirmed comes of, by the server's words, and what helps.
fn unconfirmed(error: &str) -> (Option<Code>, &'static str) {
    match error {
        SILENT => (
            Some(Code::NatsSilent),
            "see whether the disk of nats-server is full: it does not thaw by itself",
        ),
        _ if error.contains(FULL) => (Some(Code::StreamFull), STREAM_FULL),
        _ if error.contains(DAMAGED) => (Some(Code::MessageDamaged), ""),
        _ if error.contains("no stream found") => (None, "`setup` makes the streams"),
        _ => (None, ""),
    }
}

fn log_event(event: &Event) {
    match event {
        Event::Connected => tracing::debug!("connected to NATS"),
        Event::Disconnected => tracing::warn!(code = %Code::NatsAway, "disconnected from NATS, reconnecting"),
        Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) => {
            tracing::warn!(%event, "NATS reports a fault");
        }
        _ => tracing::debug!(%event, "NATS"),
    }
}

/// A part of an address as it was before `%40` and the like were put in.
fn percent_decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_addresses_are_decoded() {
        for (text, decoded) in
            [("a%40b%3a", "a@b:"), ("100%", "100%"), ("%zz", "%zz"), ("m%C3%BCller", "müller")]
        {
            assert_eq!(percent_decoded(text), decoded);
        }
    }
}
