//! The connection to ClickHouse and its requests, each with a timeout.

mod ask;
mod dead;
mod disks;
mod effect;
mod faults;
mod fit;
mod forget;
mod proof;
mod runs;
mod selected;
mod setup;
mod summary;
mod things;
mod users;
mod views;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use clickhouse::{Client, Compression, RowOwned, RowRead};
use millstream::Spec;
use millstream::names::check_database;
use millstream::schema::Schema;

use crate::clickhouse::sql::{
    self, Column, INSERT_SETTINGS, NEWER_INSERT_SETTINGS, Settings, TIME_LIMIT, Tables, View,
};
use crate::environment::Environment;
use crate::error::{Error, PUSHING, StoreFault, full_cause};
use crate::failpoint;
use crate::model::address::without_password;

pub use dead::DeadLetter;
pub use disks::Disk;
pub use effect::StuckMutation;
pub use faults::ViewFault;
pub(crate) use faults::in_ranges;
pub use fit::Fit;
pub use proof::{Stored, StoredBatch, StoredValues};
pub(crate) use runs::insert_prefix;
pub use setup::{Change, Found, Plan};
pub use things::Thing;
pub use views::{BuildRows, Sight};

/// The time limit of a short query.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// The longest wait for the next part of an answer, when a query reads a whole pass.
const PROOF_WITHIN: Duration = Duration::from_secs(3600);
/// How long the server may take to accept a piece of an INSERT's body.
const SEND_WITHIN: Duration = Duration::from_secs(30);
/// How long an INSERT may run in the server: a hanging one must be over before its batches are redelivered to
/// another sink.
const INSERT_LIMIT: Duration = Duration::from_secs(60);
/// How long an INSERT may run that also fills an operator's materialized views. They may be slow, and an
/// aborted INSERT would keep rows from them that the rows table already has.
const VIEWS_LIMIT: Duration = Duration::from_secs(600);
/// How much longer than its limit in the server an INSERT's answer may take.
const ANSWER_LATER: Duration = Duration::from_secs(30);
/// ClickHouse's error code for a query that is past the stages in which it can be killed.
const CANNOT_KILL: u32 = 380;
/// The time limit of a merge or mutation, which may rewrite a sixteenth of a large table.
const HEAL_WITHIN: Duration = Duration::from_secs(3600);

/// The address of ClickHouse, with what is needed to log in.
#[derive(Debug, Clone)]
pub struct StoreAddress {
    /// `http://host:port` or `https://…`.
    pub url: String,
    /// The user; ClickHouse's own default when empty.
    pub user: String,
    /// The password of the user.
    pub password: String,
    /// The environment of the tables, with their database.
    pub environment: Environment,
    /// The setting that gave this address, for messages.
    pub origin: String,
}

/// A connection to ClickHouse, for one pipeline. Clones share their HTTP connections.
#[derive(Clone)]
pub struct Store {
    client: Client,
    tables: Arc<Tables>,
    address: Arc<StoreAddress>,
    insert_settings: Arc<[(&'static str, &'static str)]>,
    /// Whether an operator's materialized views read the rows table, as of the last check.
    feeds_views: Arc<AtomicBool>,
    /// The last attempt to recreate each view: no second attempt until the table changes again.
    tried: Arc<Mutex<HashMap<View, Vec<Column>>>>,
}

impl Store {
    /// Connects, and asks which of the newer settings the server has.
    ///
    /// # Errors
    /// [`Error::Name`] for an invalid database name; [`Error::Store`] when the server does not answer or
    /// refuses this user.
    pub async fn connect(spec: &Spec, address: StoreAddress) -> Result<Self, Error> {
        check_database(&address.environment.database)?;
        let mut client = Client::default().with_url(&address.url).with_compression(Compression::None);
        if !address.user.is_empty() {
            client = client.with_user(&address.user).with_password(&address.password);
        }
        let mut store = Self {
            client,
            tables: Arc::new(Tables::of(spec, &address.environment)),
            address: Arc::new(address),
            insert_settings: Arc::new([]),
            feeds_views: Arc::default(),
            tried: Arc::default(),
        };
        let newer = store.known_settings("connect", "settings", NEWER_INSERT_SETTINGS).await?;
        store.insert_settings = INSERT_SETTINGS.iter().copied().chain(newer).collect();
        Ok(store)
    }

    /// The settings of this list that the server has.
    async fn known_settings(
        &self,
        doing: &str,
        table: &str,
        wanted: Settings,
    ) -> Result<Vec<(&'static str, &'static str)>, Error> {
        let known: Vec<String> = self.all(doing, &sql::known_settings(table, wanted)).await?;
        let is_known = |name: &str| known.iter().any(|known| known == name);
        Ok(wanted.iter().copied().filter(|(name, _)| is_known(name)).collect())
    }

    /// The statements about this pipeline's tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The server's version.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn version(&self) -> Result<String, Error> {
        self.one("ask for the version", "SELECT version()").await
    }

    /// Inserts rows as workers encoded them: one statement, one block, one part (**one-insert-one-part**). With
    /// `wider` the table has wider types than the rows and the server converts; otherwise it refuses a type
    /// that differs.
    ///
    /// # Errors
    /// A fault for the caller to classify; only [`Self::ask`] shows whether the rows are stored.
    pub async fn insert_rows(
        &self,
        query_id: &str,
        schema: &Schema,
        wider: bool,
        bodies: &[Bytes],
    ) -> Result<(), StoreFault> {
        // The bodies are already compressed, so the client does not compress, and the header is set by hand.
        let mut insert = self
            .client
            .insert_formatted_with(self.tables.insert_rows(schema))
            .with_setting("decompress", "1")
            .with_setting("query_id", query_id)
            .with_setting("input_format_native_allow_types_conversion", if wider { "1" } else { "0" })
            .with_setting(TIME_LIMIT, self.insert_limit().as_secs().to_string())
            .with_timeouts(Some(SEND_WITHIN), Some(self.insert_over()));
        for (name, value) in self.insert_settings.iter() {
            insert = insert.with_setting(*name, *value);
        }
        for body in bodies {
            insert.send(body.clone()).await.map_err(|error| store_fault(error, SEND_WITHIN))?;
            failpoint::pass("sink-in-insert");
        }
        insert.end().await.map_err(|error| store_fault(error, self.insert_over()))
    }

    /// Whether an INSERT of rows fills an operator's materialized views, as of the last check.
    pub fn feeds_views(&self) -> bool {
        self.feeds_views.load(Ordering::Relaxed)
    }

    /// The server's time limit for an INSERT.
    fn insert_limit(&self) -> Duration {
        if self.feeds_views() { VIEWS_LIMIT } else { INSERT_LIMIT }
    }

    /// The time after which an INSERT has certainly ended, by its own limit in the server, even if its answer
    /// was lost.
    pub fn insert_over(&self) -> Duration {
        self.insert_limit() + ANSWER_LATER
    }

    /// Ends an insert whose outcome is unknown, and returns when it has ended.
    ///
    /// # Errors
    /// The fault, when it is not known whether the insert has ended.
    pub async fn kill(&self, query_id: &str) -> Result<(), StoreFault> {
        match within(self.insert_over(), self.client.query_raw(&sql::kill(query_id)).execute()).await {
            // If the insert is past the point where it can be killed, the server says so at once, and this
            // waits for its end.
            Ok(()) | Err(StoreFault::Exception { code: CANNOT_KILL, .. }) => {}
            Err(fault) => return Err(fault),
        }
        loop {
            let running = self.client.query_raw(&sql::running(query_id)).fetch_one::<u64>();
            if within(ANSWER_WITHIN, running).await? == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Executes a statement of [`Tables`] that writes a row.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn write(&self, doing: &str, statement: &str) -> Result<(), Error> {
        self.execute(doing, statement, ANSWER_WITHIN).await
    }

    async fn answer<T: RowOwned + RowRead>(&self, question: &str) -> Result<Vec<T>, StoreFault> {
        within(ANSWER_WITHIN, self.client.query_raw(question).fetch_all::<T>()).await
    }

    async fn execute(&self, doing: &str, statement: &str, limit: Duration) -> Result<(), Error> {
        let query = self.client.query_raw(statement).execute();
        within(limit, query).await.map_err(|fault| self.failed(doing, fault))
    }

    async fn one<T: RowOwned + RowRead>(&self, doing: &str, query: &str) -> Result<T, Error> {
        let query = self.client.query_raw(query).fetch_one::<T>();
        within(ANSWER_WITHIN, query).await.map_err(|fault| self.failed(doing, fault))
    }

    async fn all<T: RowOwned + RowRead>(&self, doing: &str, query: &str) -> Result<Vec<T>, Error> {
        let query = self.client.query_raw(query).fetch_all::<T>();
        within(ANSWER_WITHIN, query).await.map_err(|fault| self.failed(doing, fault))
    }

    fn failed(&self, doing: &str, source: StoreFault) -> Error {
        Error::Store {
            doing: doing.to_owned(),
            server: without_password(&self.address.url),
            origin: self.address.origin.clone(),
            source,
        }
    }
}

async fn within<T>(
    limit: Duration,
    future: impl Future<Output = clickhouse::error::Result<T>>,
) -> Result<T, StoreFault> {
    match tokio::time::timeout(limit, future).await {
        Ok(answer) => answer.map_err(|error| store_fault(error, limit)),
        Err(_) => Err(StoreFault::Silent(limit)),
    }
}

fn store_fault(error: clickhouse::error::Error, limit: Duration) -> StoreFault {
    match error {
        clickhouse::error::Error::BadResponse(text) => exception(&text),
        clickhouse::error::Error::TimedOut => StoreFault::Silent(limit),
        error => StoreFault::Unclear(full_cause(&error)),
    }
}

/// Parses `Code: 60. DB::Exception: …`, because the crate gives exceptions as text.
fn exception(text: &str) -> StoreFault {
    let code = text
        .split_once("Code: ")
        .and_then(|(_, rest)| rest.split(|symbol: char| !symbol.is_ascii_digit()).next()?.parse().ok());
    let text = without_traces(text);
    // The server's version does not help the reader.
    let text = text.trim().split(" (version ").next().unwrap_or_default();
    let mut shown = shortened(text);
    // The view's name stands near the end of the text, and the operator needs it.
    if let Some(at) = text.find(PUSHING).filter(|_| !shown.contains(PUSHING)) {
        shown.extend(format!("…: {}", &text[at..]).chars().take(200));
    }
    match code {
        Some(code) => {
            let text = shown.split_once("Exception: ").map_or(shown.as_str(), |(_, text)| text).to_owned();
            StoreFault::Exception { code, text }
        }
        None => StoreFault::Unclear(shown),
    }
}

/// Characters kept from the start of the server's text, and from its end, which often says what helps.
const KEPT: usize = 500;

/// Removes stack traces, which some servers (the local engine) put in the middle of the text.
fn without_traces(text: &str) -> String {
    let is_useful = |line: &&str| !line.contains(" @ 0x") && !line.trim().is_empty();
    text.lines().filter(is_useful).collect::<Vec<_>>().join("\n")
}

fn shortened(text: &str) -> String {
    let length = text.chars().count();
    if length <= 2 * KEPT {
        return text.to_owned();
    }
    let first: String = text.chars().take(KEPT).collect();
    let last: String = text.chars().skip(length - KEPT).collect();
    format!("{first} … {last}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_recognised_by_their_code() {
        let fault =
            exception("Code: 252. DB::Exception: Too many parts (300). (TOO_MANY_PARTS) (version 26.5)");
        assert!(
            matches!(&fault, StoreFault::Exception { code: 252, text } if text.starts_with("Too many")),
            "{fault}"
        );
        assert!(matches!(exception("502 Bad Gateway"), StoreFault::Unclear(_)));
        // 53 must not be parsed from 530.
        assert!(matches!(exception("Code: 530. DB::Exception: x"), StoreFault::Exception { code: 530, .. }));
    }

    /// The text of a mutation that cannot end has its cause at the end.
    #[test]
    fn the_end_of_a_long_exception_is_kept() {
        let text = format!(
            "Code: 341. DB::Exception: Exception happened during execution of mutation 'mutation_2.txt' with part 'all_1_1_0' \
             reason: '{}'. In case of unretryable error, mutation can be killed with KILL MUTATION query.\n\n{}. (UNFINISHED)",
            "x".repeat(2000),
            "  25. std::thread::start @ 0x00000000013ea9cf\n".repeat(50)
        );
        let fault = exception(&text).to_string();
        assert!(fault.contains("mutation_2.txt") && fault.contains("KILL MUTATION"), "{fault}");
        assert!(fault.len() < 1100, "{fault}");
    }

    #[test]
    fn a_view_that_failed_is_named_however_long_the_text_is() {
        let text = format!(
            "Code: 395. DB::Exception: {}: while pushing to view e.mv. (FUNCTION_THROW_IF_VALUE_IS_NON_ZERO) (version 26.5)",
            "x".repeat(600)
        );
        let fault = exception(&text);
        assert_eq!(fault.view(), Some("e.mv"), "{fault}");
        assert_eq!(exception("Code: 252. DB::Exception: Too many parts").view(), None);
    }
}
