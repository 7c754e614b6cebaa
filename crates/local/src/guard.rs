//! `__local-guard -- command args…`: a process between the owner of a local stack and a server that would outlive it.
//!
//! The owner holds the write end of the guard's stdin. However the owner ends, that end closes, and the guard stops
//! the server; the same on SIGTERM. It exits as the server did.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// How long the server may take to end. Less than the owner's patience with the guard.
const STOP_WITHIN: Duration = Duration::from_secs(15);
const USAGE: u8 = 2;
const FAILED: u8 = 1;
/// As shells do: 128 and the signal's number.
const BY_SIGNAL: i32 = 128;

pub(crate) fn run(mut words: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(dashes), Some(program)) = (words.next(), words.next()) else {
        complain("usage: __local-guard -- COMMAND ARGS…");
        return ExitCode::from(USAGE);
    };
    if dashes != "--" {
        complain("usage: __local-guard -- COMMAND ARGS…");
        return ExitCode::from(USAGE);
    }
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null());
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| runtime.block_on(guard(command)));
    match done {
        Ok(status) => ExitCode::from(code_of(status)),
        Err(error) => {
            complain(&format!("guard: {error}"));
            ExitCode::from(FAILED)
        }
    }
}

async fn guard(mut command: Command) -> io::Result<ExitStatus> {
    // Before the server starts: a failure here must not leave one behind.
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut owner = pipe::Receiver::from_owned_fd(io::stdin().as_fd().try_clone_to_owned()?)?;
    let mut child = command.spawn()?;
    let mut ignored = [0; 64];
    loop {
        tokio::select! {
            status = child.wait() => return status,
            _ = term.recv() => return stop(child).await,
            _ = int.recv() => return stop(child).await,
            read = owner.read(&mut ignored) => if !matches!(read, Ok(1..)) {
                return stop(child).await;
            },
        }
    }
}

async fn stop(mut child: Child) -> io::Result<ExitStatus> {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    }
    match timeout(STOP_WITHIN, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.start_kill()?;
            child.wait().await
        }
    }
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(BY_SIGNAL + status.signal()?)).unwrap_or(i32::from(FAILED));
    u8::try_from(code).unwrap_or(FAILED)
}

/// How a guarded server ended, in words.
pub(crate) fn describe(status: ExitStatus) -> String {
    match status.code() {
        Some(code) if code > BY_SIGNAL => match Signal::try_from(code - BY_SIGNAL) {
            Ok(signal) => format!("killed by {signal}"),
            Err(_) => status.to_string(),
        },
        Some(code) => format!("exited with {code}"),
        None => status.to_string(),
    }
}

/// Says something on stderr, which is the server's log.
pub(crate) fn complain(text: &str) {
    // No process is left to log a failure.
    drop(writeln!(io::stderr(), "{text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guard_exits_as_its_server_did() {
        assert_eq!(code_of(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(code_of(ExitStatus::from_raw(9)), 137);
        assert_eq!(describe(ExitStatus::from_raw(137 << 8)), "killed by SIGKILL");
        assert_eq!(describe(ExitStatus::from_raw(1 << 8)), "exited with 1");
    }
}
