//! Flags, environment and `millstream.toml`, in that order, as one checked plan, or every fault at once.

mod file;

use std::path::{Path, PathBuf};
use std::time::Duration;

use millstream::Limits;
use millstream::limits::LEAST_MEMORY;
use millstream::names::check_database;
use millstream_engine::compute::Place;
use millstream_engine::model::rows::MAX_INSERT_ROWS;
use millstream_engine::sink::SinkPlan;
use millstream_engine::work::WorkPlan;
use millstream_engine::{Environment, NatsAddress, StoreAddress, StreamLimits, compute};
use percent_encoding::percent_decode_str;

use crate::args::Options;
use crate::{listen, logs};
use file::File;

const FILE: &str = "millstream.toml";
const USER: &str = "default";
/// Rows are kept for at least this many seconds, or not at all.
const LEAST_ROWS_AGE: u64 = 3600;

/// Everything that is configured, checked.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// NATS, where somebody named it.
    pub nats: Option<NatsAddress>,
    /// ClickHouse, where somebody named it; user and database hold for the local one too.
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

/// Takes the first that is set: the flag, the environment, the file.
fn pick(flag: (&str, Option<&str>), variable: &str, file: Option<From>) -> Option<From> {
    let from_flag = flag.1.map(|value| From { value: value.to_owned(), origin: flag.0.to_owned() });
    let from_environment = || {
        let value = std::env::var(variable).ok().filter(|value| !value.is_empty())?;
        Some(From { value, origin: variable.to_owned() })
    };
    from_flag.or_else(from_environment).or(file)
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
        let config = Self::merge(options, (threads, limits), &path, &mut file, &mut faults);
        faults.extend(file.finish());
        if faults.is_empty() { Ok(config) } else { Err(Faults(faults)) }
    }

    fn merge(
        options: &Options,
        (threads, id_limits): (Option<u64>, Limits),
        path: &Path,
        file: &mut File,
        faults: &mut Vec<String>,
    ) -> Self {
        let mut text = |key: &str| {
            file.text(key).map(|value| From { value, origin: format!("{} in {}", key, path.display()) })
        };
        let (nats_file, creds_file) = (text("nats.url"), text("nats.creds"));
        let [ca_file, cert_file, key_file] = ["nats.ca", "nats.cert", "nats.key"].map(&mut text);
        let (url_file, user_file, password_file) =
            (text("clickhouse.url"), text("clickhouse.user"), text("clickhouse.password"));
        let (database_file, data_file, log_file) = (text("clickhouse.database"), text("data"), text("log"));
        let (listen, namespace_file) = (text("listen"), text("namespace"));

        let nats = pick(("--nats", options.nats.as_deref()), "NATS_URL", nats_file);
        let path_of = |flag, option: &Option<PathBuf>, variable, file| {
            let path = option.as_ref().map(|path| path.display().to_string());
            pick((flag, path.as_deref()), variable, file).map(|picked| PathBuf::from(picked.value))
        };
        let creds = path_of("--nats-creds", &options.nats_creds, "NATS_CREDS", creds_file);
        let ca = path_of("--nats-ca", &options.nats_ca, "NATS_CA", ca_file);
        let certificate = path_of("--nats-cert", &options.nats_cert, "NATS_CERT", cert_file);
        let key = path_of("--nats-key", &options.nats_key, "NATS_KEY", key_file);
        if certificate.is_some() != key.is_some() {
            faults.push(
                "a certificate for NATS and its key are given both, or neither (--nats-cert, --nats-key)"
                    .into(),
            );
        }
        let url = pick(("--clickhouse", options.clickhouse.as_deref()), "CLICKHOUSE_URL", url_file);
        let user =
            pick(("--clickhouse-user", options.clickhouse_user.as_deref()), "CLICKHOUSE_USER", user_file);
        let password = pick(("", None), "CLICKHOUSE_PASSWORD", password_file);
        let database =
            pick(("--database", options.database.as_deref()), "CLICKHOUSE_DATABASE", database_file);
        let data = options.data.as_ref().map(|path| path.display().to_string());
        let data = pick(("--data", data.as_deref()), "MILLSTREAM_DATA", data_file);
        let log = pick(("--log", options.log.as_deref()), "MILLSTREAM_LOG", log_file);

        if let Some(From { value, origin }) = &nats {
            check_url(value, &["nats", "tls"], origin, faults);
        }
        let (mut url, mut user, mut password) = (url, user, password);
        if let Some(From { value, origin }) = &mut url {
            check_url(value, &["http", "https"], origin, faults);
            if let Some((plain, named, secret)) = without_user(value) {
                let twice = [user.as_ref(), password.as_ref().filter(|_| secret.is_some())];
                for other in twice.into_iter().flatten() {
                    faults.push(format!(
                        "{origin}: the address names a user or a password, and {} does too",
                        other.origin
                    ));
                }
                if secret.is_some() && origin == "--clickhouse" {
                    faults.push(format!(
                        "{origin}: a password in a flag is seen by all users of this host: give it in CLICKHOUSE_PASSWORD"
                    ));
                }
                let from = |value| Some(From { value, origin: origin.clone() });
                (user, password) = (from(named), secret.and_then(from).or(password));
                *value = plain;
            }
        }
        for From { value, origin } in [&user, &password].into_iter().flatten() {
            if value.contains(|symbol: char| symbol.is_control()) {
                faults.push(format!(
                    "{origin}: it has a line end or another control character in it, which no server takes"
                ));
            }
        }
        let namespace =
            pick(("--namespace", options.namespace.as_deref()), "MILLSTREAM_NAMESPACE", namespace_file);
        let namespace = namespace.and_then(|From { value, origin }| {
            Environment::parse_namespace(&value).unwrap_or_else(|fault| {
                faults.push(format!("{origin}: {fault}"));
                None
            })
        });
        let database = database.map_or_else(
            || Environment::usual_database(namespace.as_ref()),
            |database| {
                if let Err(fault) = check_database(&database.value) {
                    faults.push(format!("{}: {fault}", database.origin));
                }
                database.value
            },
        );
        let environment = Environment { namespace, database };
        // Always loopback: the key is there so that whoever asks for more is told why.
        if let Some(From { value, origin }) = &listen
            && let Err(fault) = listen::address(value)
        {
            faults.push(format!("{origin}: `{value}`: {}", fault.replace("\nhint: ", "; ")));
        }
        if let Some(From { value, origin }) = &log
            && let Err(fault) = logs::check(value)
        {
            faults.push(format!("{origin}: `{value}` is not a log filter: {fault}"));
        }
        Self {
            nats: nats.map(|From { value: url, origin }| NatsAddress {
                url,
                origin,
                creds,
                ca,
                certificate: certificate.zip(key),
            }),
            clickhouse: url.map(|From { value: url, origin }| StoreAddress {
                url,
                origin,
                // A password alone is that of ClickHouse's usual user.
                user: user.map_or_else(
                    || if password.is_some() { USER.into() } else { String::new() },
                    |user| user.value,
                ),
                password: password.map(|password| password.value).unwrap_or_default(),
                environment: environment.clone(),
            }),
            environment,
            data: data.map_or_else(|| ".millstream".into(), |data| data.value.into()),
            log: log.map_or_else(|| "info".into(), |log| log.value),
            limits: limits(file),
            work: work_plan(threads, id_limits, file, faults),
            sink: sink_plan(file),
        }
    }
}

fn limits(file: &mut File) -> StreamLimits {
    let usual = StreamLimits::default();
    let ids = file.bytes("streams.ids_bytes", 64 << 20, 1 << 50);
    let rows = file.bytes("streams.rows_bytes", 64 << 20, 1 << 50);
    StreamLimits {
        is_flexible: ids.is_none() && rows.is_none(),
        ids_bytes: ids.unwrap_or(usual.ids_bytes),
        rows_bytes: rows.unwrap_or(usual.rows_bytes),
        ids_age: file.seconds("streams.keep_ids_seconds", 3600, 10 * 365 * 86400).unwrap_or(usual.ids_age),
        rows_age: rows_age(file),
        replicas: file.number("streams.replicas", 1, 5).map_or(usual.replicas, |number| number as usize),
    }
}

/// Shorter than the least, rows could go before ClickHouse is back from an outage.
fn rows_age(file: &mut File) -> Duration {
    let usual = StreamLimits::default().rows_age;
    match file.number("streams.keep_rows_seconds", 0, 10 * 365 * 86400) {
        Some(seconds @ 1..LEAST_ROWS_AGE) => {
            file.refuse(&format!(
                "streams.keep_rows_seconds: {seconds} is neither 0 nor {LEAST_ROWS_AGE} or more"
            ));
            usual
        }
        seconds => seconds.map_or(usual, Duration::from_secs),
    }
}

fn work_plan(threads: Option<u64>, usual: Limits, file: &mut File, faults: &mut Vec<String>) -> WorkPlan {
    const MOST: u64 = 4096;
    const LONGEST: u64 = 30 * 86400;
    if let Some(threads) = threads.filter(|threads| !(1..=MOST).contains(threads)) {
        faults.push(format!("--threads: {threads} is outside 1..={MOST}"));
    }
    let threads = threads.or(file.number("work.threads", 1, MOST)).map(|threads| threads as usize);
    WorkPlan {
        threads: threads.unwrap_or_else(compute::usable_cores),
        drain: file.seconds("work.drain_seconds", 1, 3600).unwrap_or(Duration::from_secs(30)),
        // The program of this very process, even where its file was replaced by a newer one since.
        place: Place::PoolProcess("/proc/self/exe".into()),
        limits: Limits {
            attempts: file.number("work.attempts", 1, 1000).map_or(usual.attempts, |number| number as u32),
            retry_for: file.seconds("work.retry_seconds", 0, LONGEST).unwrap_or(usual.retry_for),
            soft: file.seconds("work.soft_seconds", 1, LONGEST).or(usual.soft),
            hard: file.seconds("work.hard_seconds", 1, LONGEST).or(usual.hard),
            memory: file.bytes("work.memory", LEAST_MEMORY, 1 << 50).or(usual.memory),
            start_within: file.seconds("work.start_seconds", 1, LONGEST).unwrap_or(usual.start_within),
            rows_wait: file.seconds("work.rows_wait_seconds", 1, LONGEST).unwrap_or(usual.rows_wait),
            isolate: file.truth("work.isolate").unwrap_or(usual.isolate),
            ..usual
        },
    }
}

fn sink_plan(file: &mut File) -> SinkPlan {
    let usual = SinkPlan::default();
    SinkPlan {
        group_rows: file.number("sink.group_rows", 1, MAX_INSERT_ROWS).unwrap_or(usual.group_rows),
        group_age: file.number("sink.group_ms", 1, 60_000).map_or(usual.group_age, Duration::from_millis),
        held_bytes: file
            .bytes("sink.held_bytes", 16 << 20, 4 << 30)
            .map_or(usual.held_bytes, |bytes| bytes as usize),
        inserts: file.number("sink.inserts", 1, 64).map_or(usual.inserts, |number| number as usize),
        drain: file.seconds("sink.drain_seconds", 1, 3600).unwrap_or(usual.drain),
        ..usual
    }
}

/// An address without the user and password in it, and those two.
fn without_user(url: &str) -> Option<(String, String, Option<String>)> {
    let (scheme, rest) = url.split_once("://")?;
    let host_ends = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (login, _) = rest[..host_ends].rsplit_once('@')?;
    let decoded = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let (user, password) = match login.split_once(':') {
        Some((user, password)) => (user, Some(decoded(password))),
        None => (login, None),
    };
    Some((format!("{scheme}://{}", &rest[login.len() + 1..]), decoded(user), password))
}

/// Checks one address, or several of NATS with commas between. What stands before an `@` is not shown.
fn check_url(urls: &str, schemes: &[&str], origin: &str, faults: &mut Vec<String>) {
    let is_list = schemes.contains(&"nats");
    for url in urls.split(|symbol| is_list && symbol == ',').map(str::trim) {
        let rest =
            url.split_once("://").filter(|(scheme, host)| schemes.contains(scheme) && !host.is_empty());
        let Some((_, rest)) = rest else {
            let forms: Vec<String> = schemes.iter().map(|scheme| format!("{scheme}://host:port")).collect();
            let shown = url.rsplit_once('@').map_or(url.to_owned(), |(_, host)| format!("…@{host}"));
            faults.push(format!("{origin}: `{shown}` is not an address like {}", forms.join(" or ")));
            continue;
        };
        // Behind such a sign a reader of addresses takes the password for a path, and the user for the host.
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        if rest[end..].contains('@') && !rest[..end].contains('@') {
            faults.push(format!(
                "{origin}: in a user or password of an address, / ? # @ and , are written %2F %3F %23 %40 and %2C"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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
            "--threads: 0 is outside 1..=4096",
            "work.threads: 0 is outside 1..=4096",
            "work.thread: no such key",
            "sink.group_rows: \"many\" is not a whole number",
            "streams.rows_bytes: \"12 parsecs\" is not a size",
            "`localhost:8123` is not an address like http://host:port or https://host:port",
        ] {
            assert!(error.contains(part), "`{part}` is not in\n{error}");
        }
    }

    #[test]
    fn rows_are_kept_not_at_all_or_through_an_outage() {
        let kept = |seconds: u64| {
            with_file(&format!("[streams]\nkeep_rows_seconds = {seconds}\n"), Options::default(), None)
        };
        assert_eq!(kept(0).expect("sound").limits.rows_age, Duration::ZERO);
        assert_eq!(kept(7200).expect("sound").limits.rows_age, Duration::from_secs(7200));
        let error = kept(60).expect_err("too short").to_string();
        assert!(error.contains("streams.keep_rows_seconds: 60 is neither 0 nor 3600 or more"), "{error}");
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
