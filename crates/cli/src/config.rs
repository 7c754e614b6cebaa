//! Flags, environment and `millstream.toml`, in that order, as one checked plan, or every fault at once.
//!
//! `keys` lists every key with what it takes, `file` reads the file, `servers` the addresses and logins.

mod file;
mod keys;
mod servers;

use std::path::{Path, PathBuf};

use millstream::Limits;
use millstream::names::check_database;
use millstream_engine::compute::Place;
use millstream_engine::sink::SinkPlan;
use millstream_engine::work::WorkPlan;
use millstream_engine::{Environment, NatsAddress, StoreAddress, StreamLimits, compute};

use crate::args::Options;
use crate::{listen, logs};
use file::File;
use keys::{Key, Numbers, Text};

const FILE: &str = "millstream.toml";

/// Everything that is configured, checked.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// NATS, where it is named.
    pub nats: Option<NatsAddress>,
    /// ClickHouse, where it is named; user and database hold for the local one too.
    pub clickhouse: Option<StoreAddress>,
    pub environment: Environment,
    pub data: PathBuf,
    pub log: String,
    pub limits: StreamLimits,
    pub work: WorkPlan,
    pub sink: SinkPlan,
}

/// Everything that is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {}:\n  {}", counted(.0.len()), .0.join("\n  "))]
pub(crate) struct Faults(Vec<String>);

fn counted(faults: usize) -> String {
    if faults == 1 { "a fault".to_owned() } else { format!("{faults} faults") }
}

/// A value with the place it came from.
#[derive(Debug, Clone)]
struct From {
    value: String,
    origin: String,
}

/// Where values come from that no flag sets, and where faults go.
struct Reader<'a> {
    file: &'a mut File,
    faults: &'a mut Vec<String>,
}

impl Config {
    /// Reads everything.
    ///
    /// # Errors
    /// [`Faults`], all of them.
    pub fn read(options: &Options, threads: Option<u64>, limits: Limits) -> Result<Self, Faults> {
        let path = options.config.clone().unwrap_or_else(|| FILE.into());
        let mut faults = Vec::new();
        let mut file = File::read(&path, options.config.is_some(), &mut faults);
        let config =
            Self::merge(options, threads, limits, &mut Reader { file: &mut file, faults: &mut faults });
        faults.extend(file.finish());
        if faults.is_empty() { Ok(config) } else { Err(Faults(faults)) }
    }

    fn merge(options: &Options, threads: Option<u64>, limits: Limits, reader: &mut Reader<'_>) -> Self {
        let environment = reader.environment(options);
        reader.check_listen();
        Self {
            nats: reader.nats(options),
            clickhouse: reader.clickhouse(options, &environment),
            environment,
            data: reader.path(&keys::DATA, options.data.as_deref()).unwrap_or_else(|| ".millstream".into()),
            log: reader.log(options),
            limits: reader.stream_limits(),
            work: reader.work_plan(threads, limits),
            sink: reader.sink_plan(),
        }
    }
}

impl Reader<'_> {
    /// Takes the first that is set: the flag, the environment, the file.
    fn text(&mut self, key: &Key<Text>, flag: Option<&str>) -> Option<From> {
        let in_file = self.file.text(key);
        let from = |value: String, origin: &str| From { value, origin: origin.to_owned() };
        let by_flag = || Some(from(flag?.to_owned(), key.flag?));
        let by_variable = || {
            let value = std::env::var(key.variable?).ok().filter(|value| !value.is_empty())?;
            Some(from(value, key.variable?))
        };
        let by_file = || Some(from(in_file?, &format!("{} in {}", key.name, self.file.path().display())));
        by_flag().or_else(by_variable).or_else(by_file)
    }

    fn path(&mut self, key: &Key<Text>, flag: Option<&Path>) -> Option<PathBuf> {
        let flag = flag.map(|path| path.display().to_string());
        self.text(key, flag.as_deref()).map(|picked| picked.value.into())
    }

    /// A number of the flag, which clap has read, or else of the file; both are checked.
    fn number(&mut self, key: &Key<Numbers>, flag: Option<u64>) -> Option<u64> {
        let in_file = self.file.number(key);
        if let (Some(number), Some(name)) = (flag, key.flag)
            && !key.takes.hold(number)
        {
            self.faults.push(format!("{name}: {number} is outside {}", key.takes));
        }
        flag.or(in_file)
    }

    fn environment(&mut self, options: &Options) -> Environment {
        let namespace = self.text(&keys::NAMESPACE, options.namespace.as_deref());
        let namespace = namespace.and_then(|From { value, origin }| {
            Environment::parse_namespace(&value).unwrap_or_else(|fault| {
                self.faults.push(format!("{origin}: {fault}"));
                None
            })
        });
        let database = self.text(&keys::CLICKHOUSE_DATABASE, options.database.as_deref());
        if let Some(From { value, origin }) = &database
            && let Err(fault) = check_database(value)
        {
            self.faults.push(format!("{origin}: {fault}"));
        }
        let usual = || Environment::usual_database(namespace.as_ref());
        let database = database.map_or_else(usual, |database| database.value);
        Environment { namespace, database }
    }

    /// Always loopback: the key is there so that an operator who asks for more is told why.
    fn check_listen(&mut self) {
        if let Some(From { value, origin }) = self.text(&keys::LISTEN, None)
            && let Err(fault) = listen::address(&value)
        {
            self.faults.push(format!("{origin}: `{value}`: {}", fault.replace("\nhint: ", "; ")));
        }
    }

    fn log(&mut self, options: &Options) -> String {
        let log = self.text(&keys::LOG, options.log.as_deref());
        if let Some(From { value, origin }) = &log
            && let Err(fault) = logs::check(value)
        {
            self.faults.push(format!("{origin}: `{value}` is not a log filter: {fault}"));
        }
        log.map_or_else(|| "info".into(), |log| log.value)
    }

    fn stream_limits(&mut self) -> StreamLimits {
        let usual = StreamLimits::default();
        let file = &mut self.file;
        let ids = file.size(&keys::IDS_BYTES);
        let rows = file.size(&keys::ROWS_BYTES);
        StreamLimits {
            is_flexible: ids.is_none() && rows.is_none(),
            ids_bytes: ids.unwrap_or(usual.ids_bytes),
            rows_bytes: rows.unwrap_or(usual.rows_bytes),
            ids_age: file.duration(&keys::KEEP_IDS).unwrap_or(usual.ids_age),
            rows_age: file.duration(&keys::KEEP_ROWS).unwrap_or(usual.rows_age),
            replicas: file.number(&keys::REPLICAS).map_or(usual.replicas, |number| number as usize),
        }
    }

    fn work_plan(&mut self, threads: Option<u64>, usual: Limits) -> WorkPlan {
        let threads = self.number(&keys::THREADS, threads).map(|threads| threads as usize);
        let file = &mut self.file;
        WorkPlan {
            threads: threads.unwrap_or_else(compute::usable_cores),
            drain: file.duration(&keys::DRAIN).unwrap_or(keys::WORK_DRAIN),
            // The program of this very process, even where its file was replaced by a newer one since.
            place: Place::PoolProcess("/proc/self/exe".into()),
            limits: Limits {
                attempts: file.number(&keys::ATTEMPTS).map_or(usual.attempts, |number| number as u32),
                retry_for: file.duration(&keys::RETRY_FOR).unwrap_or(usual.retry_for),
                soft: file.duration(&keys::SOFT_LIMIT).or(usual.soft),
                hard: file.duration(&keys::HARD_LIMIT).or(usual.hard),
                memory: file.size(&keys::MEMORY_LIMIT).or(usual.memory),
                start_within: file.duration(&keys::START_WITHIN).unwrap_or(usual.start_within),
                rows_wait: file.duration(&keys::ROWS_WAIT).unwrap_or(usual.rows_wait),
                isolate: file.truth(&keys::ISOLATE).unwrap_or(usual.isolate),
                ..usual
            },
        }
    }

    fn sink_plan(&mut self) -> SinkPlan {
        let usual = SinkPlan::default();
        let file = &mut self.file;
        SinkPlan {
            group_rows: file.number(&keys::GROUP_ROWS).unwrap_or(usual.group_rows),
            group_age: file.duration(&keys::GROUP_AGE).unwrap_or(usual.group_age),
            held_bytes: file.size(&keys::HELD_BYTES).map_or(usual.held_bytes, |bytes| bytes as usize),
            inserts: file.number(&keys::INSERTS).map_or(usual.inserts, |number| number as usize),
            drain: file.duration(&keys::SINK_DRAIN).unwrap_or(usual.drain),
            ..usual
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    fn with_file(text: &str, options: Options, threads: Option<u64>) -> Result<Config, Faults> {
        let mut file = tempfile::NamedTempFile::new().expect("temp file");
        file.write_all(text.as_bytes()).expect("written");
        Config::read(&Options { config: Some(file.path().to_owned()), ..options }, threads, Limits::DEFAULT)
    }

    #[test]
    fn flags_come_before_the_file() {
        let text =
            "[nats]\nurl = 'nats://file:1'\n[clickhouse]\nurl = 'http://file:2'\n[work]\nthreads = 3\n";
        let options = Options { nats: Some("nats://flag:1".into()), ..Options::default() };
        let config = with_file(text, options, Some(5)).expect("sound");
        let nats = config.nats.expect("named");
        assert_eq!((nats.url.as_str(), nats.origin.as_str()), ("nats://flag:1", "--nats"));
        let clickhouse = config.clickhouse.expect("named");
        assert_eq!(clickhouse.url, "http://file:2");
        assert!(clickhouse.origin.starts_with("clickhouse.url in "), "{}", clickhouse.origin);
        assert_eq!(config.work.threads, 5);
    }

    #[test]
    fn a_clickhouse_address_may_name_its_user() {
        let named = |url: &str| {
            let text = format!("[clickhouse]\nurl = '{url}'\n");
            with_file(&text, Options::default(), None).map(|config| config.clickhouse.expect("named"))
        };
        let address = named("https://me:p%40ss%2F@host:8443").expect("sound");
        assert_eq!(
            (address.url.as_str(), address.user.as_str(), address.password.as_str()),
            ("https://host:8443", "me", "p@ss/")
        );
        assert_eq!(named("http://host:1/?a=b").expect("sound").url, "http://host:1/?a=b");
        for (url, part) in
            [("http://me:p/ss@host", "written %2F"), ("http://me:p%0a@host", "a line end or another control")]
        {
            let fault = named(url).expect_err("unsound").to_string();
            assert!(fault.contains(part) && !fault.contains("p/ss"), "{fault}");
        }
        for url in ["tcp://me:secret@h:9000", "me:secret@h:4222"] {
            let fault = named(url).expect_err("no address").to_string();
            assert!(fault.contains("`…@h:") && !fault.contains("secret"), "{fault}");
        }
        let flag = Options { clickhouse: Some("http://me:secret@h".into()), ..Options::default() };
        let fault = with_file("", flag, None).expect_err("seen by ps").to_string();
        assert!(fault.contains("CLICKHOUSE_PASSWORD") && !fault.contains("secret"), "{fault}");
    }

    #[test]
    fn every_fault_is_told_at_once() {
        let text = "nats = 'x'\n[work]\nthreads = 0\nthread = 4\n[sink]\ngroup_rows = 'many'\n\
                    [streams]\nrows_bytes = '12 parsecs'\n[clickhouse]\nurl = 'localhost:8123'\n";
        let error = with_file(text, Options::default(), Some(0)).expect_err("six faults").to_string();
        for part in [
            "--threads: 0 is outside 1 to 4096",
            "work.threads: 0 is outside 1 to 4096",
            "work.thread: no such key",
            "sink.group_rows: \"many\" is not a whole number",
            "streams.rows_bytes: `12 parsecs` is not a size",
            "`localhost:8123` is not an address like http://host:port or https://host:port",
        ] {
            assert!(error.contains(part), "`{part}` is not in\n{error}");
        }
    }

    #[test]
    fn durations_and_sizes_are_texts_with_units() {
        let text = "[work]\ndrain = '1m30s'\nmemory_limit = '2GiB'\n[sink]\ngroup_age = '250ms'\n";
        let config = with_file(text, Options::default(), None).expect("sound");
        assert_eq!(config.work.drain, Duration::from_secs(90));
        assert_eq!(config.work.limits.memory, Some(2 << 30));
        assert_eq!(config.sink.group_age, Duration::from_millis(250));
        let text = "[work]\ndrain = 30\nretry_for = '10 parsecs'\nsoft_limit = '-1s'\nhard_limit = '1e9y'\n\
                    start_within = 1.5\nrows_wait = '99999999999999999999s'\nmemory_limit = 1073741824\n\
                    [sink]\ngroup_age = '61s'\nheld_bytes = '99999999999999999999PB'\n";
        let error = with_file(text, Options::default(), None).expect_err("nine faults").to_string();
        for part in [
            "the configuration has 9 faults",
            "work.drain: `30` has no unit: write \"30s\", or a duration such as \"250ms\", \"10m\" or \"1h30m\"",
            "work.retry_for: `10 parsecs` is not a duration",
            "work.soft_limit: `-1s` is not a duration",
            "work.hard_limit: `1e9y` is not a duration",
            "work.start_within: `1.5` is not a duration",
            "work.rows_wait: `99999999999999999999s` is not a duration",
            "work.memory_limit: `1073741824` has no unit: write \"1073741824B\", or a size such as \"32MiB\"",
            "sink.group_age: `61s` is outside 1ms to 1m",
            "sink.held_bytes: `99999999999999999999PB` is outside 16 MiB to 4 GiB",
        ] {
            assert!(error.contains(part), "`{part}` is not in\n{error}");
        }
    }

    #[test]
    fn rows_are_kept_not_at_all_or_through_an_outage() {
        let kept =
            |time: &str| with_file(&format!("[streams]\nkeep_rows = '{time}'\n"), Options::default(), None);
        assert_eq!(kept("0s").expect("sound").limits.rows_age, Duration::ZERO);
        assert_eq!(kept("2h").expect("sound").limits.rows_age, Duration::from_secs(7200));
        let error = kept("1m").expect_err("too short").to_string();
        assert!(error.contains("streams.keep_rows: `1m` is outside 1h to 3650d, and 0s"), "{error}");
    }

    #[test]
    fn the_example_of_the_readme_is_sound() {
        let readme = include_str!("../../../README.md");
        let (_, rest) = readme.split_once("```toml\n").expect("README.md has an example");
        let (example, _) = rest.split_once("```").expect("which has an end");
        let config = with_file(example, Options::default(), None).expect("sound");
        assert_eq!(config.limits.ids_age, StreamLimits::default().ids_age);
        assert_eq!(config.work.limits.hard, Some(Duration::from_secs(600)));
    }

    #[test]
    fn a_file_that_is_no_toml_says_where() {
        let error =
            with_file("[work\nthreads = 1", Options::default(), None).expect_err("no toml").to_string();
        assert!(error.contains("line 1"), "{error}");
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let options = Options { config: Some("/no/such.toml".into()), ..Options::default() };
        let error = Config::read(&options, None, Limits::DEFAULT).expect_err("missing").to_string();
        assert!(error.contains("/no/such.toml"), "{error}");
    }
}
