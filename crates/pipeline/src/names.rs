//! The only place that spells subjects, streams, consumers and keys, and the grammar of the names in them.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The longest run name.
pub const MAX_RUN_NAME: usize = 64;
const MAX_PIPELINE_NAME: usize = 32;
const MAX_DATABASE_NAME: usize = 64;
/// The most characters of an invalid name in a message.
const QUOTED: usize = 80;

/// The name of a run: 1 to 64 of `A-Z a-z 0-9 _ -`, beginning with a letter or digit.
///
/// It becomes a token of subjects, a part of consumer names and a value in ClickHouse, so it is checked once,
/// here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunName(String);

impl Serialize for RunName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Checks names from other processes too, so that an invalid one is refused.
impl<'de> Deserialize<'de> for RunName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// One computation of a run: the run's name, and the number of the pass, from 1.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PassId {
    /// The name of the run.
    pub run: RunName,
    /// The number of the pass; a replay begins the next.
    pub pass: u32,
}

impl RunName {
    /// A pass of the run.
    pub fn pass(&self, pass: u32) -> PassId {
        PassId { run: self.clone(), pass }
    }
}

impl fmt::Display for PassId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { run, pass } = self;
        write!(f, "pass {pass} of run `{run}`")
    }
}

/// Why a name is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameFault {
    /// The text is not a run name.
    #[error("run name `{0}` is not 1 to {MAX_RUN_NAME} of A-Z a-z 0-9 _ - beginning with a letter or digit")]
    Run(String),
    /// The text is not a pipeline name.
    #[error("pipeline name `{0}` is not 1 to {MAX_PIPELINE_NAME} of a-z 0-9 _ beginning with a letter")]
    Pipeline(String),
    /// The text is not a namespace.
    #[error("namespace `{0}` is not 1 to {MAX_PIPELINE_NAME} of a-z 0-9 _ beginning with a letter")]
    Namespace(String),
    /// The text is not a database name that Millstream uses.
    #[error(
        "`{0}` is not a database name: 1 to {MAX_DATABASE_NAME} of A-Z a-z 0-9 _ - beginning with a letter, a digit or _"
    )]
    Database(String),
}

impl FromStr for RunName {
    type Err = NameFault;

    fn from_str(text: &str) -> Result<Self, NameFault> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        let begins = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if begins && text.len() <= MAX_RUN_NAME && text.bytes().all(legal) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameFault::Run(text.chars().take(QUOTED).collect()))
        }
    }
}

impl RunName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RunName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks the name of a database. ClickHouse allows more, but not everything on the way to it does: `?` is
/// special to the client, `/` in paths, and an operator cannot see invisible characters.
///
/// # Errors
/// [`NameFault::Database`] for a name outside the grammar.
pub fn check_database(name: &str) -> Result<(), NameFault> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    let length = (1..=MAX_DATABASE_NAME).contains(&name.len());
    if length && !name.starts_with('-') && name.bytes().all(legal) {
        Ok(())
    } else {
        Err(NameFault::Database(name.chars().take(QUOTED).collect()))
    }
}

/// Separates environments of one pipeline on the same servers, such as staging and production: 1 to 32 of `a-z
/// 0-9 _`, beginning with a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace(String);

impl FromStr for Namespace {
    type Err = NameFault;

    fn from_str(text: &str) -> Result<Self, NameFault> {
        if is_plain(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameFault::Namespace(text.chars().take(QUOTED).collect()))
        }
    }
}

impl Namespace {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether the text may be the name of a pipeline or a namespace.
fn is_plain(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    begins && name.len() <= MAX_PIPELINE_NAME && name.bytes().all(legal)
}

/// The NATS names of a pipeline: streams, subjects, consumers, keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    pipeline: String,
    namespace: Option<Namespace>,
    /// The prefix of every NATS name. Its two parts contain no `-`, so no two pairs share a prefix.
    prefix: String,
}

impl Names {
    /// Checks the pipeline's name. Within a namespace, every NATS name begins with the namespace.
    ///
    /// # Errors
    /// [`NameFault::Pipeline`] for a name outside the grammar.
    pub fn new(pipeline: &str, namespace: Option<Namespace>) -> Result<Self, NameFault> {
        if !is_plain(pipeline) {
            return Err(NameFault::Pipeline(pipeline.chars().take(QUOTED).collect()));
        }
        let prefix = match &namespace {
            Some(namespace) => format!("{}-{pipeline}", namespace.as_str()),
            None => pipeline.to_owned(),
        };
        Ok(Self { pipeline: pipeline.to_owned(), namespace, prefix })
    }

    /// The pipeline's own name, which is also the prefix of its tables.
    pub fn pipeline(&self) -> &str {
        &self.pipeline
    }

    /// The environment's name, if it has one.
    pub fn namespace(&self) -> Option<&Namespace> {
        self.namespace.as_ref()
    }

    /// The stream of id batches.
    pub fn ids_stream(&self) -> String {
        format!("{}_ids", self.prefix)
    }

    /// The filter for every subject of the ids stream.
    pub fn all_ids(&self) -> String {
        format!("{}.ids.>", self.prefix)
    }

    /// The subjects of all batches of a run.
    pub fn run_ids(&self, run: &RunName) -> String {
        format!("{}.ids.{run}.*", self.prefix)
    }

    /// The subjects of all batches of a run, and of its partial replays.
    pub fn all_of_ids(&self, run: &RunName) -> String {
        format!("{}.ids.{run}.>", self.prefix)
    }

    /// The subject of one batch of a run.
    pub fn ids_subject(&self, run: &RunName, batch: u32) -> String {
        format!("{}.ids.{run}.{batch}", self.prefix)
    }

    /// The subjects of all batches of a partial replay.
    pub fn replay_ids(&self, pass: &PassId) -> String {
        let PassId { run, pass } = pass;
        format!("{}.ids.{run}.{pass}.*", self.prefix)
    }

    /// The subject of one batch of a partial replay, with only the selected ids.
    pub fn replay_subject(&self, pass: &PassId, batch: u32) -> String {
        let PassId { run, pass } = pass;
        format!("{}.ids.{run}.{pass}.{batch}", self.prefix)
    }

    /// The stream of computed rows.
    pub fn rows_stream(&self) -> String {
        format!("{}_rows", self.prefix)
    }

    /// The filter for every subject of the rows stream.
    pub fn all_rows(&self) -> String {
        format!("{}.rows.>", self.prefix)
    }

    /// The subjects of all computed batches of every pass of a run.
    pub fn all_of_rows(&self, run: &RunName) -> String {
        format!("{}.rows.{run}.>", self.prefix)
    }

    /// The subjects of all computed batches of a pass, with their split messages.
    pub fn pass_rows(&self, pass: &PassId) -> String {
        let PassId { run, pass } = pass;
        format!("{}.rows.{run}.{pass}.>", self.prefix)
    }

    /// The subject of one computed batch of a pass.
    pub fn rows_subject(&self, pass: &PassId, batch: u32) -> String {
        let PassId { run, pass } = pass;
        format!("{}.rows.{run}.{pass}.{batch}", self.prefix)
    }

    /// The subjects of a computed batch's split messages.
    pub fn batch_parts(&self, pass: &PassId, batch: u32) -> String {
        let PassId { run, pass } = pass;
        format!("{}.rows.{run}.{pass}.{batch}.*", self.prefix)
    }

    /// The subject of one split message: the rows of the ids at these positions in the batch. The positions are
    /// in the subject, so that messages that were split differently never share one.
    pub fn part_subject(&self, pass: &PassId, batch: u32, places: &Range<u32>) -> String {
        let PassId { run, pass } = pass;
        format!("{}.rows.{run}.{pass}.{batch}.{}-{}", self.prefix, places.start, places.end)
    }

    /// The durable consumer from which all workers pull the batches of a pass.
    pub fn work_consumer(&self, pass: &PassId) -> String {
        let PassId { run, pass } = pass;
        format!("work-{run}-{pass}")
    }

    /// The durable consumer that all sinks share.
    pub fn sink_consumer(&self) -> String {
        "sink".to_owned()
    }

    /// The consumer that delivers all rows of a pass again.
    pub fn rebuild_consumer(&self, pass: &PassId) -> String {
        let PassId { run, pass } = pass;
        format!("rebuild-{run}-{pass}")
    }

    /// The key-value bucket of run and pass records.
    pub fn bucket(&self) -> String {
        format!("{}_runs", self.prefix)
    }

    /// The key of a run's record.
    pub fn run_key(&self, run: &RunName) -> String {
        format!("run.{run}")
    }

    /// The key of a pass's record.
    pub fn pass_key(&self, pass: &PassId) -> String {
        let PassId { run, pass } = pass;
        format!("pass.{run}.{pass}")
    }

    /// The keys of all passes of a run.
    pub fn pass_keys(&self, run: &RunName) -> String {
        format!("pass.{run}.*")
    }

    /// The key of a process's heartbeat record. Characters of the host's name that a key may not hold are left
    /// out. `instance` separates processes on hosts with the same name, as containers may be, where each is
    /// process 1.
    pub fn host_key(&self, role: &str, host: &str, pid: u32, instance: u32) -> String {
        let host: String =
            host.chars().filter(|symbol| symbol.is_ascii_alphanumeric() || *symbol == '-').collect();
        format!("host.{role}.{host}-{pid}-{instance:08x}")
    }

    /// The subject on which the seal of a pass is announced.
    pub fn sealed_subject(&self, pass: &PassId) -> String {
        let PassId { run, pass } = pass;
        format!("{}.sealed.{run}.{pass}", self.prefix)
    }

    /// Whether rows of this batch, or a split message of it, belong under `subject`.
    pub fn is_rows_subject(&self, subject: &str, pass: &PassId, batch: u32) -> bool {
        let rest = subject.strip_prefix(&self.rows_subject(pass, batch));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }

    /// Whether a subject belongs to the rows stream.
    pub fn is_of_rows(&self, subject: &str) -> bool {
        subject.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with(".rows."))
    }

    /// The stream of quarantined messages, which are not valid batches.
    pub fn aside_stream(&self) -> String {
        format!("{}_aside", self.prefix)
    }

    /// The filter for every subject of the quarantine stream.
    pub fn all_aside(&self) -> String {
        format!("{}.aside.>", self.prefix)
    }

    /// The subject for the quarantined message of `subject`: `P.ids.a.7` becomes `P.aside.ids.a.7`.
    pub fn aside_subject(&self, subject: &str) -> String {
        let prefix = format!("{}.", self.prefix);
        format!("{}.aside.{}", self.prefix, subject.strip_prefix(&prefix).unwrap_or(subject))
    }
}

/// The batch number in a subject of the ids stream.
pub fn batch_of(subject: &str) -> Option<u32> {
    subject.rsplit('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts with a meaning in SQL, a subject, a path or a terminal.
    const HOSTILE: [&str; 12] = [
        "a' OR 1 = 1 --",
        "a`; DROP TABLE b",
        "a\\",
        "a\0",
        "a\nb",
        "a.>",
        "*",
        "../a",
        "a{b:Identifier}",
        "a\u{1b}[2J",
        "\u{202e}a",
        "\u{ff41}",
    ];

    #[test]
    fn run_names_have_one_grammar() {
        for name in ["a", "A-1_b", "0", &"x".repeat(64)] {
            assert_eq!(name.parse::<RunName>().map(|run| run.to_string()), Ok(name.to_owned()));
        }
        for name in ["", "-a", "_a", "a.b", "a b", "a*", "ü", "a'", &"x".repeat(65)] {
            assert!(name.parse::<RunName>().is_err(), "{name}");
        }
    }

    #[test]
    fn pipeline_names_fit_sql_and_subjects() {
        for name in ["collatz", "a", "a_1"] {
            assert!(Names::new(name, None).is_ok(), "{name}");
        }
        for name in ["", "1a", "A", "a-b", "a.b", &"a".repeat(33)] {
            assert!(Names::new(name, None).is_err(), "{name}");
        }
    }

    #[test]
    fn namespaces_keep_pipelines_apart() {
        for name in ["staging", "a_1"] {
            assert!(name.parse::<Namespace>().is_ok(), "{name}");
        }
        for name in HOSTILE.into_iter().chain(["", "1a", "a-b", "a.b", "Staging", &"a".repeat(33)]) {
            assert!(name.parse::<Namespace>().is_err(), "{name}");
        }
        let run: RunName = "green".parse().expect("legal");
        let names = Names::new("tea", Some("staging".parse().expect("legal"))).expect("legal");
        assert_eq!(names.pipeline(), "tea");
        assert_eq!(names.ids_stream(), "staging-tea_ids");
        assert_eq!(names.rows_subject(&run.pass(2), 7), "staging-tea.rows.green.2.7");
        assert_eq!(names.bucket(), "staging-tea_runs");
        assert_eq!(names.aside_subject("staging-tea.ids.green.7"), "staging-tea.aside.ids.green.7");
    }

    #[test]
    fn database_names_have_one_grammar() {
        for name in ["millstream", "_a", "0-9", &"x".repeat(64)] {
            assert_eq!(check_database(name), Ok(()), "{name}");
        }
        for name in HOSTILE.into_iter().chain(["", "-a", "a.b", "a/b", "a?", &"x".repeat(65)]) {
            assert!(check_database(name).is_err(), "{name}");
        }
    }

    #[test]
    fn hostile_names_are_none_and_quoted_in_part() {
        let long = "\u{1b}".repeat(10_000);
        for name in HOSTILE.into_iter().chain([&long[..]]) {
            let run = name.parse::<RunName>();
            let pipeline = Names::new(name, None);
            let (Err(run), Err(pipeline)) = (run, pipeline) else { panic!("{name}") };
            assert!(run.to_string().chars().count() < 200 && pipeline.to_string().chars().count() < 200);
        }
    }

    #[test]
    fn subjects_are_what_the_streams_listen_to() {
        let names = Names::new("tea", None).expect("legal");
        let run: RunName = "green".parse().expect("legal");
        let pass = run.pass(2);
        assert_eq!(names.ids_subject(&run, 7), "tea.ids.green.7");
        assert_eq!(names.run_ids(&run), "tea.ids.green.*");
        assert_eq!(batch_of(&names.ids_subject(&run, 7)), Some(7));
        assert_eq!(batch_of(&names.replay_subject(&pass, 7)), Some(7));
        assert_eq!(batch_of(&names.run_ids(&run)), None);
        assert_eq!(names.rows_subject(&pass, 7), "tea.rows.green.2.7");
        assert_eq!(names.pass_rows(&pass), "tea.rows.green.2.>");
        assert_eq!(names.batch_parts(&pass, 7), "tea.rows.green.2.7.*");
        assert_eq!(names.part_subject(&pass, 7, &(0..30)), "tea.rows.green.2.7.0-30");
        assert_eq!(names.work_consumer(&pass), "work-green-2");
        for (subject, is_its) in
            [("tea.rows.green.2.7", true), ("tea.rows.green.2.7.0-30", true), ("tea.rows.green.2.70", false)]
        {
            assert_eq!(names.is_rows_subject(subject, &pass, 7), is_its, "{subject}");
        }
        assert_eq!(names.aside_subject("tea.ids.green.7"), "tea.aside.ids.green.7");
    }
}
