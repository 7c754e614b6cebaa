//! nats-server: its configuration, and what it says about itself.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::data::Dir;
use crate::disk;
use crate::error::Error;
use crate::event::Server;
use crate::net;
use crate::program::{Program, Ready};

const CONFIG: &str = "nats-server.conf";
/// The server warns above this.
const MAX_PAYLOAD: &str = "8MB";
/// Every stream is on disk; memory is for the rayon pool.
const MAX_MEMORY_STORE: u64 = 64 << 20;
/// Streams with a byte limit can still be made when the disk is nearly full; writing says when it is.
const LEAST_FILE_STORE: u64 = 256 << 20;
/// With less than this free a restart would only fail again.
pub(crate) const FREE_FOR_RESTART: u64 = 16 << 20;

/// Writes the configuration; answers how to start.
pub(crate) fn program(dir: &Dir, binary: PathBuf, port: u16, http: u16) -> Result<Program, Error> {
    let name = server_name(dir.path());
    let text = config(&Config {
        name: &name,
        port,
        http,
        store: &dir.nats(),
        log: &dir.log(Server::Nats),
        max_file_store: max_file_store(&dir.nats()),
    });
    dir.write(CONFIG, text.as_bytes())?;
    let words = words(dir);
    Ok(Program {
        server: Server::Nats,
        url: format!("nats://127.0.0.1:{port}"),
        port,
        args: [OsString::from("__local-guard"), "--".into(), binary.into_os_string()]
            .into_iter()
            .chain(words.iter().cloned())
            .collect(),
        env: Vec::new(),
        words,
        log: dir.log(Server::Nats),
        ready: Ready::Nats { name, http },
    })
}

/// The arguments by which this data directory's server is known.
pub(crate) fn words(dir: &Dir) -> Vec<OsString> {
    vec!["--config".into(), dir.path().join(CONFIG).into_os_string()]
}

/// Tells this data directory's server from whatever else may answer at its port.
fn server_name(data: &Path) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    data.hash(&mut hasher);
    format!("millstream-{:016x}", hasher.finish())
}

struct Config<'a> {
    name: &'a str,
    port: u16,
    http: u16,
    store: &'a Path,
    log: &'a Path,
    max_file_store: u64,
}

fn config(c: &Config<'_>) -> String {
    format!(
        "# Written at every start of the local stack; changes are lost.\n\
         server_name: {name}\n\
         listen: \"127.0.0.1:{port}\"\n\
         http: \"127.0.0.1:{http}\"\n\
         max_payload: {MAX_PAYLOAD}\n\
         logfile: {log}\n\
         logfile_size_limit: 4MB\n\
         logfile_max_num: 2\n\
         jetstream {{\n\
         \x20 store_dir: {store}\n\
         \x20 sync_interval: always\n\
         \x20 max_file_store: {file}\n\
         \x20 max_memory_store: {MAX_MEMORY_STORE}\n\
         }}\n",
        name = quoted(c.name),
        port = c.port,
        http = c.http,
        log = quoted(&c.log.to_string_lossy()),
        store = quoted(&c.store.to_string_lossy()),
        file = c.max_file_store,
    )
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Three quarters of what is free, for ClickHouse shares the volume; and in any case what is used already.
fn max_file_store(store: &Path) -> u64 {
    let free = disk::free(store).unwrap_or_default();
    (disk::used(store) + free / 4 * 3).max(LEAST_FILE_STORE)
}

/// Whether this data directory's server is up and its streams are recovered.
pub(crate) async fn is_ready(port: u16, http: u16, name: &str) -> bool {
    let Ok(greeting) = net::nats_greeting(port).await else { return false };
    greeting["server_name"] == name
        && greeting["jetstream"] == true
        && matches!(net::get(http, "/healthz").await, Ok((200, _)))
}

/// What a probe of a running server found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Fine,
    /// A stream is frozen after a write error. The server does not thaw it when there is space again; a restart does.
    Frozen {
        why: String,
        restart: bool,
    },
}

pub(crate) async fn health(http: u16, store: &Path) -> Health {
    match net::get(http, "/healthz").await {
        Ok((503, body)) => judge(&body, disk::free(store).unwrap_or_default()),
        // Down, slow or still recovering: not what this probe is for.
        _ => Health::Fine,
    }
}

fn judge(body: &str, free: u64) -> Health {
    let parsed: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    match parsed["error"].as_str() {
        Some(error) if error.contains("write error") => {
            Health::Frozen { why: error.to_owned(), restart: free >= FREE_FOR_RESTART }
        }
        _ => Health::Fine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_listens_on_loopback_and_syncs_every_write() {
        let text = config(&Config {
            name: "millstream-1",
            port: 4222,
            http: 8222,
            store: Path::new("/a \"b\"/nats"),
            log: Path::new("/a/logs/nats-server.log"),
            max_file_store: 1000,
        });
        let expected = r#"# Written at every start of the local stack; changes are lost.
server_name: "millstream-1"
listen: "127.0.0.1:4222"
http: "127.0.0.1:8222"
max_payload: 8MB
logfile: "/a/logs/nats-server.log"
logfile_size_limit: 4MB
logfile_max_num: 2
jetstream {
  store_dir: "/a \"b\"/nats"
  sync_interval: always
  max_file_store: 1000
  max_memory_store: 67108864
}
"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn a_frozen_stream_asks_for_a_restart_once_there_is_space() {
        // As nats-server 2.15.1 says it.
        let body = r#"{"status":"unavailable","error":"JetStream stream '$G \u003e S' write error: write /x/2.blk: no space left on device"}"#;
        assert!(matches!(judge(body, 1 << 30), Health::Frozen { restart: true, .. }));
        assert!(matches!(judge(body, 1 << 20), Health::Frozen { restart: false, .. }));
        let recovering = r#"{"status":"unavailable","error":"JetStream stream '$G > S' is not current"}"#;
        assert_eq!(judge(recovering, 1 << 30), Health::Fine);
        assert_eq!(judge("", 1 << 30), Health::Fine);
    }
}
