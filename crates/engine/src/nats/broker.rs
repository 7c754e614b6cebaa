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
use crate::telemetry::labels::{Stream, Unconfirmed};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{HEADER, TraceContext};

pub use again::RowsMessage;
pub use consumers::Standing;
pub use kept::{Kept, Reserved};
use login::Login;
pub use messages::Stray;
pub use setup::StreamLimits;

/// Interval of the client's pings, which alone detect a dead connection: two unanswered pings close it.
const PING: Duration = Duration::from_secs(5);

/// The address of NATS, with what is needed to log in.
#[derive(Debug, Clone, Default)]
pub struct NatsAddress {
    /// `nats://host:port`, several separated by commas; a token, or a user and a password, may stand before an
    /// `@`.
    pub url: String,
    /// A credentials file, or a file with an nkey's seed.
    pub creds: Option<PathBuf>,
    /// Certificates of the authority that signed the server's certificate, if the system does not know it.
    pub ca: Option<PathBuf>,
    /// The client certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The setting that gave this address, for messages: `--nats`, `NATS_URL`, the local stack.
    pub origin: String,
}

/// The text of the server's error when a stream is full.
const FULL: &str = "maximum bytes";
/// The server's words where a subject holds a message that it neither reads nor removes.
const DAMAGED: &str = "maximum messages per subject";
/// The hint for a full stream.
const STREAM_FULL: &str = "the stream is full: rows wait for sinks to catch up; ids stay for replay, so give their \
                           stream more bytes ([streams] ids_bytes, `nats stream edit`) or remove old runs from it";

/// The outcome of a publish under first-writer-wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// The bytes of this writer are stored.
    First,
    /// The subject already held a message.
    Already,
}

/// What a publish needs beside its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Writing<'a> {
    /// The trace context that goes into the message's header.
    pub trace: Option<TraceContext>,
    /// The metrics that count this publish.
    pub metrics: &'a Metrics,
    /// The stop that ends the attempts.
    pub stop: &'a Stop,
}

/// A connection to NATS, for one pipeline.
#[derive(Debug, Clone)]
pub struct Broker {
    names: Names,
    environment: Environment,
    /// The time of the server's last refusal to let a full stream grow.
    refused_growth: Arc<Mutex<Option<Instant>>>,
    client: Client,
    jetstream: Context,
    /// The command and the host of this process, for NATS's logs.
    role: String,
}

impl Broker {
    /// Connects. Afterwards the client reconnects by itself, without a limit.
    ///
    /// # Errors
    /// [`Error::Name`] for an invalid pipeline name; [`Error::MixedLogins`], [`Error::Credentials`] and
    /// [`Error::Certificates`] for a login that cannot be used; [`Error::Connect`] when no server answers now.
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

    /// The stream behind the bucket of records.
    pub(crate) fn bucket_stream(&self) -> String {
        format!("KV_{}", self.names.bucket())
    }

    /// The largest message that the server accepts, in bytes.
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

    /// Stores a message under a subject that holds none, and retries without a limit: **first-writer-wins**.
    ///
    /// A PubAck and error 10071 both mean that the message is stored. After anything else (no answer, a full
    /// stream, a server that is starting) the same bytes are sent again. An unanswered publish leaks an entry
    /// in the client (nats.rs issue 1617); the timeout and the backoff limit that to a few a minute.
    ///
    /// # Errors
    /// [`Error::TooLarge`], which no retry can fix; [`Error::Stopped`] when held work is given up.
    pub async fn write_once(
        &self,
        subject: &str,
        bytes: Bytes,
        writing: Writing<'_>,
    ) -> Result<Written, Error> {
        let Writing { metrics, stop, .. } = writing;
        let stream = if self.names.is_of_rows(subject) { Stream::Rows } else { Stream::Ids };
        let (begun, size) = (Instant::now(), bytes.len());
        let written = |written| {
            metrics.wrote(stream, written == Written::First, size, begun.elapsed());
            Ok(written)
        };
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(10));
        loop {
            if stop.is_given_up() {
                return Err(Error::Stopped);
            }
            let message = once(bytes.clone(), writing.trace);
            let attempt = async { self.jetstream.send_publish(subject.to_owned(), message).await?.await };
            let (error, reason) = match tokio::time::timeout(ANSWER_WITHIN * 2, attempt).await {
                Ok(Ok(_)) => return written(Written::First),
                Ok(Err(error)) => match error.kind() {
                    PublishErrorKind::WrongLastSequence => return written(Written::Already),
                    PublishErrorKind::MaxPayloadExceeded => {
                        let subject = subject.to_owned();
                        let limit = self.max_payload();
                        return Err(Error::TooLarge { subject, bytes: size, limit });
                    }
                    PublishErrorKind::TimedOut => ("no answer".to_owned(), Unconfirmed::NoAnswer),
                    _ => refused(full_cause(&error)),
                },
                Err(_) => ("no answer".to_owned(), Unconfirmed::NoAnswer),
            };
            metrics.not_confirmed(stream, reason);
            if reason == Unconfirmed::Full && self.grow(subject, size).await {
                continue;
            }
            let wait = backoff.wait();
            let (code, hint) = help(reason, &error);
            tracing::warn!(subject, %error, hint, code = code.map(tracing::field::display), retry_ms = wait.as_millis() as u64, "publish not confirmed, trying again");
            if !stop.pause(wait).await {
                return Err(Error::Stopped);
            }
        }
    }

    /// Publishes on a plain subject, for the subscribers that listen now.
    ///
    /// # Errors
    /// When NATS refuses or does not answer.
    pub async fn announce(&self, subject: String, bytes: Bytes) -> Result<(), Error> {
        let doing = format!("announce on `{subject}`");
        within(&doing, self.client.publish(subject, bytes)).await?.map_err(broker(&doing))?;
        within(&doing, self.client.flush()).await?.map_err(broker(doing))
    }

    /// Waits until the server has received what is queued, above all acks.
    pub async fn flush(&self) {
        // A round trip, because `flush` alone only means that the bytes are in the socket.
        let round_trip = async {
            self.client.flush().await.map_err(Source::from)?;
            self.jetstream.query_account().await.map_err(Source::from)
        };
        if !matches!(tokio::time::timeout(ANSWER_WITHIN, round_trip).await, Ok(Ok(_))) {
            tracing::warn!("the last acks may be lost: their batches will be redelivered");
        }
    }
}

/// A message that the server stores only if its subject holds none.
fn once(payload: Bytes, trace: Option<TraceContext>) -> PublishMessage {
    let message = PublishMessage::build().payload(payload).expected_last_subject_sequence(0);
    match trace {
        Some(trace) => message.header(HEADER, trace.to_string()),
        None => message,
    }
}

/// A refusal of the server, with its reason.
fn refused(error: String) -> (String, Unconfirmed) {
    let reason = if error.contains(FULL) { Unconfirmed::Full } else { Unconfirmed::Refused };
    (error, reason)
}

/// The code and the hint for a publish that is not confirmed.
fn help(reason: Unconfirmed, error: &str) -> (Option<Code>, &'static str) {
    match reason {
        Unconfirmed::NoAnswer => (
            Some(Code::NatsSilent),
            "if NATS is up: see whether its disk is full, as it does not thaw by itself",
        ),
        Unconfirmed::Full => (Some(Code::StreamFull), STREAM_FULL),
        Unconfirmed::Refused if error.contains(DAMAGED) => (Some(Code::MessageDamaged), ""),
        Unconfirmed::Refused if error.contains("no stream found") => (None, "`setup` makes the streams"),
        Unconfirmed::Refused => (None, ""),
    }
}

fn log_event(event: &Event) {
    match event {
        Event::Connected => tracing::debug!("connected to NATS"),
        Event::Disconnected => tracing::warn!(code = %Code::NatsAway, "disconnected from NATS, reconnecting"),
        Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) => {
            tracing::warn!(%event, "the NATS client reports an error");
        }
        _ => tracing::debug!(%event, "NATS"),
    }
}

/// A part of an address with its percent escapes (`%40`) decoded.
fn percent_decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publish_that_is_not_confirmed_has_its_cause() {
        assert_eq!(help(Unconfirmed::NoAnswer, "no answer").0, Some(Code::NatsSilent));
        for (error, code) in [
            ("maximum bytes exceeded", Some(Code::StreamFull)),
            ("maximum messages per subject exceeded", Some(Code::MessageDamaged)),
            ("no responders", None),
        ] {
            let (error, reason) = refused(error.to_owned());
            assert_eq!(help(reason, &error).0, code, "{error}");
        }
    }

    #[test]
    fn users_of_addresses_are_decoded() {
        for (text, decoded) in
            [("a%40b%3a", "a@b:"), ("100%", "100%"), ("%zz", "%zz"), ("m%C3%BCller", "müller")]
        {
            assert_eq!(percent_decoded(text), decoded);
        }
    }
}
