//! Debian's `clickhouse-server` 18.16.1: old, but a real server in a real process, on a free loopback port.
//!
//! It is fetched with apt-get into a directory of the user's cache and never installed as a service. The product needs
//! ClickHouse 24.8 and does not talk to this one: tables, inserts and questions are the suite's own, with types that it knows.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use tests::{SOON, wait_until};

use crate::netns::{one_apt_at_once, run};

const VERSION: &str = "18.16.1";
/// The server and the libraries of Debian 12 that no other package here brings.
const PACKAGES: [&str; 31] = [
    "clickhouse-common",
    "clickhouse-server",
    "libboost-filesystem1.74.0",
    "libboost-program-options1.74.0",
    "libcapnp-0.9.2",
    "libcctz2",
    "libcpuinfo0",
    "libdouble-conversion3",
    "libexpat1",
    "libfarmhash0",
    "libicu72",
    "libjemalloc2",
    "libltdl7",
    "libmariadb3",
    "libmetrohash1",
    "libodbc2",
    "libpcre3",
    "libpococrypto80",
    "libpocodata80",
    "libpocodataodbc80",
    "libpocofoundation80",
    "libpocojson80",
    "libpocomongodb80",
    "libpoconet80",
    "libpoconetssl80",
    "libpocoutil80",
    "libpocoxml80",
    "librdkafka1",
    "libre2-9",
    "libsasl2-2",
    "libssl3",
];
/// How long the server may take to answer.
const ANSWER: Duration = Duration::from_secs(60);

/// The tables and views of pipeline `trial` that the scenarios touch, as far as this server knows their types. Merges of its
/// own would hide raw duplicates before they are counted.
const TABLES: [&str; 5] = [
    "CREATE DATABASE millstream",
    "CREATE TABLE millstream.trial_rows (run String, pass UInt32, batch UInt32, batch_ids UInt32, batch_digest UInt64, schema UInt64, \
     id UInt64, status Enum8('ok' = 1, 'dead' = 2), error String, host String, build String, computed_at UInt64, \
     squared UInt64) ENGINE = ReplacingMergeTree PARTITION BY sipHash64(run) % 16 ORDER BY (run, pass, batch, id) \
     SETTINGS max_bytes_to_merge_at_max_space_in_pool = 1",
    "CREATE TABLE millstream.trial_passes (run String, pass UInt32, batches UInt32, ids UInt64, rows UInt64) \
     ENGINE = ReplacingMergeTree ORDER BY (run, pass)",
    "CREATE VIEW millstream.trial AS SELECT run, id, squared FROM millstream.trial_rows FINAL WHERE status = 'ok' \
     AND (run, pass) IN (SELECT run, max(pass) FROM millstream.trial_passes GROUP BY run)",
    "CREATE VIEW millstream.trial_dead AS SELECT run, pass, batch, id, error FROM millstream.trial_rows FINAL \
     WHERE status = 'dead'",
];

/// A running server; killed when dropped.
pub struct OldClickHouse {
    dir: PathBuf,
    programs: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl OldClickHouse {
    /// Starts a server with its files in `dir`, and makes the tables.
    pub fn start(dir: &Path) -> Self {
        let programs = fetch();
        let port = free_port();
        fs::create_dir_all(dir).expect("a directory");
        fs::write(dir.join("config.xml"), config(dir, port)).expect("a configuration file");
        fs::write(dir.join("users.xml"), USERS).expect("a configuration file");
        let mut server = Self { dir: dir.to_owned(), programs, port, child: None };
        server.launch();
        for statement in TABLES {
            server.ask(statement);
        }
        server
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What it answers, asked over plain HTTP.
    pub fn ask(&self, query: &str) -> String {
        self.try_ask(query).unwrap_or_else(|error| panic!("{query}: {error}"))
    }

    /// The same as a number.
    pub fn number(&self, query: &str) -> u64 {
        let answer = self.ask(query);
        answer.trim().parse().unwrap_or_else(|_| panic!("{query}: {answer}"))
    }

    /// Starts the process, and waits until it answers.
    fn launch(&mut self) {
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
        let libraries = libraries.map(|dir| self.programs.join(dir).display().to_string()).join(":");
        let output = File::options().create(true).append(true).open(self.log()).expect("a log file");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(self.programs.join("usr/sbin/clickhouse-server"))
            .arg(format!("--config-file={}", self.dir.join("config.xml").display()))
            .env("LD_LIBRARY_PATH", libraries)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output)
            .spawn()
            .expect("clickhouse-server starts");
        self.child = Some(child);
        let version = wait_until("an answer of clickhouse-server", SOON, || {
            let log = || fs::read_to_string(self.log()).unwrap_or_default();
            self.try_ask("SELECT version()").map_err(|error| format!("{error}: {}", log()))
        });
        assert_eq!(version.trim(), VERSION);
    }

    fn log(&self) -> PathBuf {
        self.dir.join("clickhouse-server.log")
    }

    /// The same where it may refuse.
    ///
    /// # Errors
    /// What it says then; why there is no answer.
    pub fn try_ask(&self, query: &str) -> io::Result<String> {
        post(&format!("127.0.0.1:{}", self.port), "/", query.as_bytes())
    }
}

/// What a server, or a proxy before one, answers to a POST request.
///
/// # Errors
/// What it says, where it refuses; why there is no answer.
pub fn post(address: &str, path: &str, body: &[u8]) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len())?;
    stream.write_all(body)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
        _ => Err(io::Error::other(answer)),
    }
}

impl Drop for OldClickHouse {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it can be killed");
            child.wait().expect("it ends");
        }
    }
}

/// A port that is free and that nobody here was given before. Below the range of outgoing connections, one of which
/// could take it while its server is being restarted.
pub fn free_port() -> u16 {
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id() % 12_000;
    loop {
        let step = u32::from(GIVEN.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(20_000 + (first + step) % 12_000).expect("below 32,000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Unpacks the packages into the cache, once: into a directory beside, which is then moved into place whole.
fn fetch() -> PathBuf {
    let _alone = one_apt_at_once();
    let cache = std::env::var_os("HOME").map(PathBuf::from).expect("a home directory").join(".cache");
    let done = cache.join(format!("millstream-faults/clickhouse-server-{VERSION}"));
    if done.is_dir() {
        return done;
    }
    let parent = done.parent().expect("a directory in the cache");
    fs::create_dir_all(parent).expect("a directory in the cache");
    let unpacked = tempfile::tempdir_in(parent).expect("a directory in the cache");
    let download = unpacked.path().display().to_string();
    run("apt-get", &["-qq", "update"]);
    // apt-get puts what it downloads into the working directory.
    let words = ["-C", &download, "apt-get", "-qq", "download"];
    run("env", &words.into_iter().chain(PACKAGES).collect::<Vec<_>>());
    for package in fs::read_dir(unpacked.path()).expect("the packages").flatten() {
        let package = package.path().display().to_string();
        run("dpkg", &["-x", &package, &download]);
        fs::remove_file(package).expect("a package can be removed");
    }
    // Another suite may have been faster.
    if let Err(error) = fs::rename(unpacked.path(), &done) {
        assert!(done.is_dir(), "{}: {error}", done.display());
    }
    done
}

fn config(dir: &Path, port: u16) -> String {
    let dir = dir.display();
    format!(
        "<yandex><logger><level>information</level><console>1</console></logger><http_port>{port}</http_port>\
         <listen_host>127.0.0.1</listen_host><path>{dir}/data/</path><tmp_path>{dir}/tmp/</tmp_path>\
         <users_config>users.xml</users_config><default_profile>default</default_profile>\
         <default_database>default</default_database><mark_cache_size>16777216</mark_cache_size></yandex>\n"
    )
}

const USERS: &str = "<yandex><profiles><default>\
     <allow_experimental_low_cardinality_type>1</allow_experimental_low_cardinality_type></default></profiles>\
     <users><default><password></password><networks><ip>127.0.0.1</ip></networks><profile>default</profile>\
     <quota>default</quota></default></users><quotas><default/></quotas></yandex>\n";
