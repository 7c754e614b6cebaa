//! ClickHouse: the connection, and what is asked of it, with every timeout.

mod dead;
mod effect;
mod faults;
mod fit;
mod forget;
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

use crate::broker::without_password;
use crate::environment::Environment;
use crate::error::{Error, PUSHING, StoreFault, full_cause};
use crate::failpoint;
use crate::records::Published;
use crate::tables::{self, Column, Count, INSERT_SETTINGS, RowsRead, TIME_LIMIT, Tables, View};

pub use dead::DeadLetter;
pub use effect::StuckMutation;
pub use faults::ViewFault;
pub(crate) use faults::in_ranges;
pub use fit::Fit;
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
/// Parts asked about in one question. It names two ids of each, and a server reads no more than 256 KiB of text.
const PARTS_ASKED: usize = 10;
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

/// A proof's view of a pass: what ClickHouse holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Batches of which there is a row.
    pub batches: u64,
    /// Distinct `(batch, id)`.
    pub ids: u64,
    /// Wrapping sum of `sipHash64(id)` over them.
    pub digest: u64,
    /// How many of them are dead letters.
    pub dead: u64,
    /// Rows that are there a second time.
    pub raw_duplicates: u64,
    /// Whether rows landed, or were merged, while they were counted: the figures are of two moments then.
    pub is_moving: bool,
    /// What was found of values; `None` when they were not looked at.
    pub values: Option<StoredValues>,
}

/// Values as they are stored, against what workers computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredValues {
    /// Batches that hold other values than those computed.
    pub at_fault: u64,
    /// Batches whose values cannot be proven: the schema of their rows is not known, or the table has lost its columns.
    pub unproven: u64,
}

/// One batch as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBatch {
    /// Its number.
    pub batch: u32,
    /// Distinct ids stored.
    pub ids: u64,
    /// Ids that it should have.
    pub expected: u64,
    /// Wrapping sum of `sipHash64(id)` over the distinct ids stored.
    pub digest: u64,
    /// Whether it holds other values than those computed, as far as that was looked at.
    pub values_at_fault: bool,
}

/// Ids of a batch that travel together: all of them, or those of one part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Portion {
    /// The batch.
    pub batch: u32,
    /// Ids that its message says it has in all: what `batch_ids` is in its rows.
    pub of: u32,
    /// The first and the last id, as text, of a part.
    pub ids: Option<(String, String)>,
}

impl Portion {
    /// A whole batch.
    pub fn all(batch: u32, of: u32) -> Self {
        Self { batch, of, ids: None }
    }

    /// The ids of a batch from one to another.
    pub fn between(batch: u32, of: u32, first: &str, last: &str) -> Self {
        Self { batch, of, ids: Some((first.to_owned(), last.to_owned())) }
    }
}

/// What one question of a proof answers.
struct Proven {
    batches: u64,
    ids: u64,
    digest: u64,
    dead: u64,
    values: StoredValues,
}

impl Proven {
    /// Whether it is what was published, value by value.
    fn is_all_of(&self, published: &Published) -> bool {
        self.batches == u64::from(published.batches)
            && self.ids == published.ids
            && self.digest == published.digest
            && self.values == StoredValues { at_fault: 0, unproven: 0 }
    }
}

/// What is found of a portion.
struct Counted<'a> {
    of: &'a Portion,
    count: u64,
    /// Whether no two of them are the same id.
    each_is_another: bool,
}

impl Store {
    /// Connects, and learns which settings the server has.
    ///
    /// # Errors
    /// [`Error::Name`] for a database whose name is none; [`Error::Store`] when the server does not answer, or not to
    /// this user.
    pub async fn connect(spec: &Spec, address: StoreAddress) -> Result<Self, Error> {
        check_database(&address.environment.database)?;
        let mut client = Client::default()
            .with_url(&address.url)
            .with_compression(Compression::None)
            // Plain RowBinary: every SELECT of ours spells its types, and old servers know nothing else.
            .with_validation(false);
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
        let names = INSERT_SETTINGS.iter().map(|(name, _)| *name);
        let known: Vec<String> = store.all("connect", &tables::known_settings("settings", names)).await?;
        let is_known = |name: &str| known.iter().any(|known| known == name);
        store.insert_settings = INSERT_SETTINGS.into_iter().filter(|(name, _)| is_known(name)).collect();
        Ok(store)
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
        match within(self.insert_over(), self.client.query_raw(&tables::kill(query_id)).execute()).await {
            // A server that cannot kill it any more answers at once: then it is waited for.
            Ok(()) | Err(StoreFault::Exception { code: CANNOT_KILL, .. }) => {}
            Err(fault) => return Err(fault),
        }
        loop {
            let running = self.client.query_raw(&tables::running(query_id)).fetch_one::<u64>();
            if within(ANSWER_WITHIN, running).await? == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// How many distinct ids of each portion are stored, in their order: the only thing that an ack may follow
    /// (**ask-before-ack**).
    ///
    /// # Errors
    /// The fault; nothing is known then.
    pub async fn ask(
        &self,
        run: &str,
        pass: u32,
        portions: impl Iterator<Item = &Portion>,
    ) -> Result<Vec<u64>, StoreFault> {
        let portions: Vec<&Portion> = portions.collect();
        let counted = self.count(run, pass, &portions, Count::Rows).await?;
        let (mut ids, rows): (Vec<_>, Vec<_>) = counted.into_iter().partition(|found| found.each_is_another);
        let doubtful: Vec<&Portion> = rows.into_iter().map(|found| found.of).collect();
        ids.extend(self.count(run, pass, &doubtful, Count::Ids).await?);
        let stored: HashMap<&Portion, u64> = ids.into_iter().map(|found| (found.of, found.count)).collect();
        Ok(portions.into_iter().map(|portion| stored.get(portion).copied().unwrap_or(0)).collect())
    }

    /// Counts each of these portions; those of which there is nothing are left out.
    async fn count<'a>(
        &self,
        run: &str,
        pass: u32,
        portions: &[&'a Portion],
        by: Count,
    ) -> Result<Vec<Counted<'a>>, StoreFault> {
        let (batches, parts): (Vec<&Portion>, Vec<&Portion>) =
            portions.iter().partition(|portion| portion.ids.is_none());
        let mut counted = Vec::new();
        if !batches.is_empty() {
            let known: HashMap<(u32, u32), &Portion> =
                batches.iter().map(|portion| ((portion.batch, portion.of), *portion)).collect();
            let batches: Vec<u32> = batches.iter().map(|portion| portion.batch).collect();
            let question = self.tables.ask(run, pass, &batches, by);
            for (batch, of, count, each) in self.answer::<(u32, u32, u64, u8)>(&question).await? {
                let of = known.get(&(batch, of));
                counted.extend(of.map(|of| Counted { of, count, each_is_another: each == 1 }));
            }
        }
        for parts in parts.chunks(PARTS_ASKED) {
            let question = self.tables.ask_parts(run, pass, parts, by);
            for (place, count, each) in self.answer::<(u32, u64, u8)>(&question).await? {
                let of = parts.get(place as usize);
                counted.extend(of.map(|of| Counted { of, count, each_is_another: each == 1 }));
            }
        }
        Ok(counted)
    }

    /// Rows of a pass, raw duplicates counted. Cheap, however many there are.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn raw_rows(&self, run: &str, pass: u32) -> Result<u64, Error> {
        self.one("count rows", &self.tables.raw_count(run, pass)).await
    }

    /// What is stored of a pass, counted from the rows themselves in bounded memory; with `values`, their values are
    /// compared with what workers computed.
    ///
    /// Where there are as many raw rows as ids were `published`, each of them once, the rows are counted as they lie, without
    /// merging them first: if every message's digest is that of its rows, and the whole that of the run, no row is there twice.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn stored(
        &self,
        run: &str,
        pass: u32,
        values: bool,
        published: Option<&Published>,
    ) -> Result<Stored, Error> {
        let mut digested =
            if values { Some(self.digested(run, pass, &self.look().await?).await?) } else { None };
        let before = self.raw_rows(run, pass).await?;
        let question =
            |digested: &Option<Vec<_>>, rows| self.tables.proof(run, pass, digested.as_deref(), rows);
        let mut found = None;
        if let Some(published) = published.filter(|published| values && published.ids == before) {
            let raw = self.prove(&question(&digested, RowsRead::All)).await?;
            found = Some(raw).filter(|raw| raw.is_all_of(published));
        }
        let found = match found {
            Some(found) => found,
            None => {
                // Rows of a second build may have landed since it was asked which there are.
                if values {
                    digested = Some(self.digested(run, pass, &self.look().await?).await?);
                }
                self.prove(&question(&digested, RowsRead::Once)).await?
            }
        };
        let after = self.raw_rows(run, pass).await?;
        let Proven { batches, ids, digest, dead, values: found_values } = found;
        let (raw_duplicates, is_moving) = (duplicates(before, ids, after), before != after);
        let values = values.then_some(found_values);
        Ok(Stored { batches, ids, digest, dead, raw_duplicates, is_moving, values })
    }

    async fn prove(&self, question: &str) -> Result<Proven, Error> {
        let proof = self.client.query_raw(question).fetch_one::<(u64, u64, u64, u64, u64, u64)>();
        let (batches, ids, digest, dead, at_fault, unproven) =
            within(PROOF_WITHIN, proof).await.map_err(|fault| self.failed("prove a pass", fault))?;
        Ok(Proven { batches, ids, digest, dead, values: StoredValues { at_fault, unproven } })
    }

    /// How many ids a pass has more than once, in different batches.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn repeated_ids(&self, run: &str, pass: u32) -> Result<u64, Error> {
        let query = self.client.query_raw(&self.tables.repeated(run, pass)).fetch_one::<u64>();
        within(PROOF_WITHIN, query).await.map_err(|fault| self.failed("count repeated ids", fault))
    }

    /// Calls `each` for every batch of a pass, in order; with `values`, their values are looked at.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn each_batch(
        &self,
        run: &str,
        pass: u32,
        values: bool,
        mut each: impl FnMut(StoredBatch),
    ) -> Result<(), Error> {
        let doing = "list the batches of a pass";
        let failed = |fault| self.failed(doing, fault);
        let digested = if values { Some(self.digested(run, pass, &self.look().await?).await?) } else { None };
        let question = self.tables.batches(run, pass, digested.as_deref());
        let cursor = self.client.query_raw(&question).fetch::<(u32, u64, u32, u64, u8)>();
        let mut cursor = cursor.map_err(|error| failed(store_fault(error, PROOF_WITHIN)))?;
        while let Some((batch, ids, expected, digest, fault)) =
            within(PROOF_WITHIN, cursor.next()).await.map_err(failed)?
        {
            let expected = u64::from(expected);
            each(StoredBatch { batch, ids, expected, digest, values_at_fault: fault != 0 });
        }
        Ok(())
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

/// Rows that are there a second time, of the raw rows counted before and after the distinct ids were. What landed in between
/// is no duplicate: at 10^9 ids 46 million were reported that did not exist.
fn duplicates(before: u64, ids: u64, after: u64) -> u64 {
    before.min(after).saturating_sub(ids)
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
    fn rows_that_land_while_they_are_counted_are_no_duplicates() {
        // 10 ids, of which rows land: 6 before, 8 while ids are read, 10 after.
        assert_eq!(duplicates(6, 8, 10), 0);
        assert_eq!(duplicates(12, 10, 12), 2);
        // Merged away meanwhile.
        assert_eq!(duplicates(12, 10, 10), 0);
    }

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
