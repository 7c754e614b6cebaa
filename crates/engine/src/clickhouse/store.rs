//! ClickHouse: the connection, and what is asked of it, with every timeout.

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

/// How long a short question may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// How long a question that reads a whole pass may take to say the next thing.
const PROOF_WITHIN: Duration = Duration::from_secs(3600);
/// How long a piece of an INSERT's body may take to be accepted.
const SEND_WITHIN: Duration = Duration::from_secs(30);
/// How long an INSERT may run in the server, so that one which hangs is over before its batches are delivered to another
/// sink.
const INSERT_LIMIT: Duration = Duration::from_secs(60);
/// The same where materialized views of the operator's are filled by it. They may be slow, and would lose the rows if it
/// was ended half-way: the rows themselves are there by then.
const VIEWS_LIMIT: Duration = Duration::from_secs(600);
/// How much longer than that its answer may take.
const ANSWER_LATER: Duration = Duration::from_secs(30);
/// ClickHouse's code for a query that is past the stages in which it can be killed.
const CANNOT_KILL: u32 = 380;
/// A merge of a sixteenth of a large table.
const HEAL_WITHIN: Duration = Duration::from_secs(3600);

/// Where ClickHouse is.
#[derive(Debug, Clone)]
pub struct StoreAddress {
    /// `http://host:port` or `https://…`.
    pub url: String,
    /// The user; ClickHouse's own default when empty.
    pub user: String,
    /// Their password.
    pub password: String,
    /// The environment that the tables are of, with their database.
    pub environment: Environment,
    /// Where the address came from, for messages.
    pub origin: String,
}

/// A connection to ClickHouse, for one pipeline. Clones share their HTTP connections.
#[derive(Clone)]
pub struct Store {
    client: Client,
    tables: Arc<Tables>,
    address: Arc<StoreAddress>,
    insert_settings: Arc<[(&'static str, &'static str)]>,
    /// Whether materialized views of the operator's read the rows table, as far as was looked.
    feeds_views: Arc<AtomicBool>,
    /// What this process has tried to make of each view: once is enough until the table changes again.
    tried: Arc<Mutex<HashMap<View, Vec<Column>>>>,
}

impl Store {
    /// Connects, and learns which of the newer settings the server has.
    ///
    /// # Errors
    /// [`Error::Name`] for a database whose name is none; [`Error::Store`] when the server does not answer, or not to
    /// this user.
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

    /// Those of some settings that the server has.
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

    /// Inserts rows as workers encoded them: one statement, one block, one part (**one-insert-one-part**). With `wider`, the
    /// table has wider types than the rows, and the server converts; else a type that differs is refused.
    ///
    /// # Errors
    /// The fault, to be classed by the caller; only [`Self::ask`] tells whether the rows are there.
    pub async fn insert_rows(
        &self,
        query_id: &str,
        schema: &Schema,
        wider: bool,
        bodies: &[Bytes],
    ) -> Result<(), StoreFault> {
        // The bodies are compressed already, so compression is off in the client and announced by hand.
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

    /// Whether an INSERT of rows fills materialized views of the operator's, as far as was looked.
    pub fn feeds_views(&self) -> bool {
        self.feeds_views.load(Ordering::Relaxed)
    }

    /// How long an INSERT may run in the server.
    fn insert_limit(&self) -> Duration {
        if self.feeds_views() { VIEWS_LIMIT } else { INSERT_LIMIT }
    }

    /// After this an INSERT is over, by its own limit in the server, whatever became of its answer.
    pub fn insert_over(&self) -> Duration {
        self.insert_limit() + ANSWER_LATER
    }

    /// Ends an insert whose outcome is unknown, and returns when it is over.
    ///
    /// # Errors
    /// The fault when that cannot be known yet.
    pub async fn kill(&self, query_id: &str) -> Result<(), StoreFault> {
        match within(self.insert_over(), self.client.query_raw(&sql::kill(query_id)).execute()).await {
            // A server that cannot kill it any more answers at once: then it is waited for.
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

/// `Code: 60. DB::Exception: …`: the crate gives exceptions as text.
fn exception(text: &str) -> StoreFault {
    let code = text
        .split_once("Code: ")
        .and_then(|(_, rest)| rest.split(|symbol: char| !symbol.is_ascii_digit()).next()?.parse().ok());
    let text = without_traces(text);
    // Which server it is says nothing of what is wrong.
    let text = text.trim().split(" (version ").next().unwrap_or_default();
    let mut shown = shortened(text);
    // It stands near the end of the text, and is what the operator has to know.
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

/// Symbols of the server's text that are kept of its beginning, and of its end, which often says what helps.
const KEPT: usize = 500;

/// A server that tells its stack, as the local engine does, tells it in the midst of what helps.
fn without_traces(text: &str) -> String {
    let is_told = |line: &&str| !line.contains(" @ 0x") && !line.trim().is_empty();
    text.lines().filter(is_told).collect::<Vec<_>>().join("\n")
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
    fn exceptions_are_told_by_their_code() {
        let fault =
            exception("Code: 252. DB::Exception: Too many parts (300). (TOO_MANY_PARTS) (version 26.5)");
        assert!(
            matches!(&fault, StoreFault::Exception { code: 252, text } if text.starts_with("Too many")),
            "{fault}"
        );
        assert!(matches!(exception("502 Bad Gateway"), StoreFault::Unclear(_)));
        // 53 must not be read out of 530.
        assert!(matches!(exception("Code: 530. DB::Exception: x"), StoreFault::Exception { code: 530, .. }));
    }

    /// A mutation that cannot end: the words that help stand at the end of the text.
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
