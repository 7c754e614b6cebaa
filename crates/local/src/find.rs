//! Finding the two servers: on PATH if new enough, else a pinned copy in the user's cache.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::error::Error;
use crate::event::{Event, Progress};
use crate::fetch;

/// Atomic batches, counters and the safer file store came with 2.12.
const OLDEST_NATS: Version = Version(2, 12);
/// The oldest ClickHouse whose settings and functions are all used by the sink.
const OLDEST_CLICKHOUSE: Version = Version(24, 8);
const ASK_VERSION: Duration = Duration::from_secs(20);

/// What serves ClickHouse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClickHouse {
    /// A `clickhouse` binary.
    Server(PathBuf),
    /// The engine as a library, `libchdb.so`.
    Library(PathBuf),
}

/// Finds a nats-server; fetches the pinned one once if PATH has none that is new enough.
///
/// # Errors
/// When none is on PATH and the pinned one cannot be fetched.
pub async fn find_nats_server(progress: &Progress) -> Result<PathBuf, Error> {
    match on_path("nats-server", &[&["--version"]], OLDEST_NATS, progress).await {
        Some(program) => Ok(program),
        None => fetch::nats_server(progress).await,
    }
}

/// Finds a ClickHouse; fetches the pinned engine once if PATH has no binary that is new enough.
///
/// # Errors
/// When none is on PATH and the pinned one cannot be fetched.
pub async fn find_clickhouse(progress: &Progress) -> Result<ClickHouse, Error> {
    match clickhouse_on_path(progress).await {
        Some(program) => Ok(ClickHouse::Server(program)),
        None => clickhouse_library(progress).await,
    }
}

pub(crate) async fn clickhouse_on_path(progress: &Progress) -> Option<PathBuf> {
    on_path("clickhouse", &[&["server", "--version"], &["--version"]], OLDEST_CLICKHOUSE, progress).await
}

pub(crate) async fn clickhouse_library(progress: &Progress) -> Result<ClickHouse, Error> {
    Ok(ClickHouse::Library(fetch::clickhouse_library(progress).await?))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

/// The first binary of that name on PATH that is new enough.
async fn on_path(name: &str, asks: &[&[&str]], oldest: Version, progress: &Progress) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    // A relative entry would depend on the working directory, and so would a data directory's server.
    for program in env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)) {
        if !is_executable(&program) {
            continue;
        }
        let why = match version_of(&program, asks).await {
            Some(version) if version >= oldest => return Some(program),
            Some(Version(major, minor)) => {
                format!("is version {major}.{minor}; {}.{} or newer is needed", oldest.0, oldest.1)
            }
            None => "does not say its version".to_owned(),
        };
        tracing::info!(program = %program.display(), why, "passed over");
        progress(Event::PassedOver { program, why });
    }
    None
}

fn is_executable(program: &Path) -> bool {
    program.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

async fn version_of(program: &Path, asks: &[&[&str]]) -> Option<Version> {
    for ask in asks {
        let output = Command::new(program).args(*ask).stdin(Stdio::null()).kill_on_drop(true).output();
        if let Ok(Ok(output)) = timeout(ASK_VERSION, output).await
            && let Some(version) = parse_version(&String::from_utf8_lossy(&output.stdout))
        {
            return Some(version);
        }
    }
    None
}

/// The first `major.minor` in a version line, such as `nats-server: v2.15.1`.
fn parse_version(text: &str) -> Option<Version> {
    text.split_whitespace().find_map(|word| {
        let mut parts = word.trim_start_matches('v').split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?;
        let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
        Some(Version(major, minor[..digits].parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_binaries_print() {
        let table = [
            ("nats-server: v2.15.1\n", Some(Version(2, 15))),
            ("nats-server: v2.12.0-RC.3\n", Some(Version(2, 12))),
            ("nats-server: v2.14-dev\n", Some(Version(2, 14))),
            ("ClickHouse server version 24.8.4.13 (official build).\n", Some(Version(24, 8))),
            ("ClickHouse local version 26.5.1.1 (official build).", Some(Version(26, 5))),
            ("ClickHouse server version 18.16.1.\n", Some(Version(18, 16))),
            ("Use one of the following commands:\n", None),
            ("", None),
        ];
        for (text, version) in table {
            assert_eq!(parse_version(text), version, "{text:?}");
        }
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(Version(2, 9) < OLDEST_NATS);
        assert!(Version(3, 0) > OLDEST_NATS);
        assert!(Version(18, 16) < OLDEST_CLICKHOUSE);
    }
}
