//! ClickHouse: the engine in a child of ours, or a `clickhouse` binary with a configuration of our own.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::data::Dir;
use crate::error::Error;
use crate::event::Server;
use crate::find::ClickHouse;
use crate::program::{Program, Ready};

const CONFIG: &str = "clickhouse.xml";

/// Writes what the server needs; answers how to start it.
pub(crate) fn program(dir: &Dir, found: ClickHouse, port: u16) -> Result<Program, Error> {
    let (args, env, words, ready) = match found {
        ClickHouse::Library(library) => engine(dir, library, port),
        ClickHouse::Server(binary) => server(dir, binary, port)?,
    };
    Ok(Program {
        server: Server::ClickHouse,
        url: format!("http://127.0.0.1:{port}"),
        port,
        args,
        env,
        words,
        log: dir.log(Server::ClickHouse),
        ready,
    })
}

/// The arguments by which this data directory's engine is known.
pub(crate) fn engine_words(dir: &Dir) -> Vec<OsString> {
    vec!["--path".into(), dir.clickhouse().into_os_string()]
}

/// The arguments by which this data directory's `clickhouse server` is known.
pub(crate) fn server_words(dir: &Dir) -> Vec<OsString> {
    let mut option = OsString::from("--config-file=");
    option.push(dir.path().join(CONFIG));
    vec!["server".into(), option]
}

type Parts = (Vec<OsString>, Vec<(&'static str, &'static str)>, Vec<OsString>, Ready);

fn engine(dir: &Dir, library: PathBuf, port: u16) -> Parts {
    let words = engine_words(dir);
    let args = [OsString::from("__local-engine"), "--lib".into(), library.into_os_string()]
        .into_iter()
        .chain(words.iter().cloned())
        .chain(["--port".into(), port.to_string().into()])
        .collect();
    (args, Vec::new(), words, Ready::Engine)
}

fn server(dir: &Dir, binary: PathBuf, port: u16) -> Result<Parts, Error> {
    for sub in ["tmp", "user_files", "format_schemas"] {
        let path = dir.clickhouse().join(sub);
        fs::create_dir_all(&path).map_err(|source| Error::Data { path, source })?;
    }
    let text = config(&dir.clickhouse(), &dir.log(Server::ClickHouse), port);
    dir.write(CONFIG, text.as_bytes())?;
    let words = server_words(dir);
    let args = [OsString::from("__local-guard"), "--".into(), binary.into_os_string()]
        .into_iter()
        .chain(words.iter().cloned())
        .collect();
    // The watchdog would be a second process with another name between the guard and the server.
    Ok((args, vec![("CLICKHOUSE_WATCHDOG_ENABLE", "0")], words, Ready::Http))
}

/// A server with users, profiles and quotas in the same file, and none of the system logs, which are tables that grow.
fn config(path: &Path, log: &Path, port: u16) -> String {
    let path = escaped(&path.to_string_lossy());
    let log = escaped(&log.to_string_lossy());
    format!(
        r#"<!-- Written at every start of the local stack; changes are lost. -->
<clickhouse>
    <logger>
        <level>information</level>
        <log>{log}</log>
        <size>4M</size>
        <count>1</count>
    </logger>
    <listen_host>127.0.0.1</listen_host>
    <http_port>{port}</http_port>
    <path>{path}/</path>
    <tmp_path>{path}/tmp/</tmp_path>
    <user_files_path>{path}/user_files/</user_files_path>
    <format_schema_path>{path}/format_schemas/</format_schema_path>
    <mark_cache_size>134217728</mark_cache_size>
    <uncompressed_cache_size>0</uncompressed_cache_size>
    <max_server_memory_usage_to_ram_ratio>0.5</max_server_memory_usage_to_ram_ratio>
    <mlock_executable>false</mlock_executable>
    <shutdown_wait_unfinished>5</shutdown_wait_unfinished>
    <send_crash_reports><enabled>false</enabled></send_crash_reports>
    <profiles><default/></profiles>
    <quotas><default/></quotas>
    <users>
        <default>
            <password></password>
            <networks><ip>127.0.0.1</ip></networks>
            <profile>default</profile>
            <quota>default</quota>
            <access_management>1</access_management>
        </default>
    </users>
</clickhouse>
"#
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_listens_on_loopback_with_paths_escaped() {
        let text = config(Path::new("/a&b/clickhouse"), Path::new("/a&b/logs/clickhouse.log"), 8123);
        for line in [
            "<listen_host>127.0.0.1</listen_host>",
            "<http_port>8123</http_port>",
            "<path>/a&amp;b/clickhouse/</path>",
            "<log>/a&amp;b/logs/clickhouse.log</log>",
            "<networks><ip>127.0.0.1</ip></networks>",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
        assert!(!text.contains("tcp_port"));
    }
}
