//! Servers that outlived a killed owner and its guards: found by their command line, and stopped.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::Error;
use crate::event::Server;

/// A server that closes a large store needs time; a guard that is just now stopping one gives up after 15 s.
const TERM_WITHIN: Duration = Duration::from_secs(20);
const KILL_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Stops every process whose command line has `words` in a row. The words name a data directory by its absolute path,
/// and its lock is held by us, so such a process is a leftover.
///
/// Blocks for up to 25 seconds.
pub(crate) fn stop(server: Server, words: &[OsString]) -> Result<(), Error> {
    for (signal, within) in [(Signal::SIGTERM, TERM_WITHIN), (Signal::SIGKILL, KILL_WITHIN)] {
        let found = find(words);
        if found.is_empty() {
            return Ok(());
        }
        for pid in found {
            tracing::warn!(%server, %pid, %signal, "stopping a leftover server on the same data directory");
            match kill(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(_) => return Err(Error::Leftover { server, pid: pid.as_raw() }),
            }
        }
        let limit = Instant::now() + within;
        while !find(words).is_empty() && Instant::now() < limit {
            std::thread::sleep(LOOK_EVERY);
        }
    }
    match find(words).first() {
        Some(pid) => Err(Error::Leftover { server, pid: pid.as_raw() }),
        None => Ok(()),
    }
}

/// Processes with these words in a row; none where there is no `/proc`.
fn find(words: &[OsString]) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id() as i32 && has_words(*pid, words))
        .map(Pid::from_raw)
        .collect()
}

fn has_words(pid: i32, words: &[OsString]) -> bool {
    // Empty for a zombie, gone for one that has just ended.
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let args: Vec<OsString> =
        line.split(|byte| *byte == 0).map(|arg| OsString::from_vec(arg.to_vec())).collect();
    args.windows(words.len())
        .any(|window| window.iter().zip(words).all(|(a, b)| a.as_bytes() == b.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_leftover_is_found_by_its_words_and_stopped() {
        let marker = OsString::from(format!("leftover-{}", std::process::id()));
        // It waits without a process of its own, which would have the same words until it is another program.
        let mut waiting = Command::new("sh");
        waiting.args(["-c", "read line", "--config"]).arg(&marker).stdin(Stdio::piped());
        let mut child = waiting.spawn().expect("sh");
        let words = ["--config".into(), marker];
        let limit = Instant::now() + Duration::from_secs(5);
        while find(&words).is_empty() && Instant::now() < limit {
            std::thread::sleep(LOOK_EVERY);
        }
        assert_eq!(find(&words), [Pid::from_raw(child.id() as i32)]);
        stop(Server::Nats, &words).expect("stopped");
        assert!(!child.wait().expect("waited").success());
        assert!(find(&words).is_empty());
    }
}
