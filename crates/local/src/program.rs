//! One child process of the stack: started, waited for until it answers, stopped.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::data;
use crate::error::{Error, Tail};
use crate::event::Server;
use crate::fetch::off_thread;
use crate::{guard, leftover, nats, net};

/// A large store is recovered, or a large library read from a cold disk, before the first answer.
const READY_WITHIN: Duration = Duration::from_secs(180);
const LOOK_EVERY: Duration = Duration::from_millis(30);
/// A foreign server at our port would answer a probe before ours has found the port taken and given up.
const SETTLE: Duration = Duration::from_millis(300);
const STOP_WITHIN: Duration = Duration::from_secs(20);
const KILL_WITHIN: Duration = Duration::from_secs(5);
const TAIL_BYTES: usize = 8 * 1024;

/// How to start one server, and how to see that it is there.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) server: Server,
    pub(crate) url: String,
    pub(crate) port: u16,
    /// After the path of our own binary.
    pub(crate) args: Vec<OsString>,
    pub(crate) env: Vec<(&'static str, &'static str)>,
    /// Two of the server's own arguments, in a row, that name the data directory: how a leftover is known.
    pub(crate) words: Vec<OsString>,
    pub(crate) log: PathBuf,
    pub(crate) ready: Ready,
}

/// What tells that a server is up.
#[derive(Debug, Clone)]
pub(crate) enum Ready {
    Nats {
        name: String,
        http: u16,
    },
    /// A line on stdout, then `/ping`.
    Engine,
    /// `/ping`.
    Http,
}

/// A started server. Dropping it closes the pipe that keeps it alive.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) server: Server,
    child: Child,
    _alive: Option<ChildStdin>,
    stdout: Option<BufReader<ChildStdout>>,
    words: Vec<OsString>,
}

impl Program {
    /// Starts the server and waits until it answers.
    pub(crate) async fn start(&self, exe: &Path) -> Result<Running, Error> {
        let server = self.server;
        let words = self.words.clone();
        off_thread(move || leftover::stop(server, &words)).await??;
        if let Some(port) = self.ports().find(|port| !net::is_free(*port)) {
            return Err(Error::Port { server: self.server, port });
        }
        let said_before = std::fs::metadata(&self.log).map_or(0, |meta| meta.len());
        let mut running = self.spawn(exe)?;
        let outcome = timeout(READY_WITHIN, async {
            tokio::select! {
                status = running.child.wait() => Err(describe(status)),
                () = wait_ready(&self.ready, self.port, running.stdout.as_mut()) => Ok(()),
            }
        });
        let how = match outcome.await {
            Ok(Ok(())) => return Ok(running),
            // Free when we looked, and not any more when the server did.
            Ok(Err(how)) => match self.taken(said_before) {
                Some(port) => return Err(Error::Port { server: self.server, port }),
                None => how,
            },
            Err(_) => {
                running.stop().await;
                format!("no answer at port {} within {} s", self.port, READY_WITHIN.as_secs())
            }
        };
        Err(Error::Start { server: self.server, how, log: self.tail() })
    }

    fn ports(&self) -> impl Iterator<Item = u16> {
        let monitor = match self.ready {
            Ready::Nats { http, .. } => Some(http),
            Ready::Engine | Ready::Http => None,
        };
        [self.port].into_iter().chain(monitor)
    }

    /// The port that is taken, as the log says after its first so many bytes: all three servers name the address and say
    /// the text of `EADDRINUSE`.
    fn taken(&self, said_before: u64) -> Option<u16> {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let from = usize::try_from(said_before).unwrap_or(usize::MAX);
        // A shorter log was begun anew.
        let said = String::from_utf8_lossy(log.get(from..).unwrap_or(&log));
        self.ports().find(|port| is_said_taken(&said, *port))
    }

    /// The end of the server's log.
    pub(crate) fn tail(&self) -> Tail {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let last = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        Tail::new(format!("`{}`", self.log.display()), &String::from_utf8_lossy(last))
    }

    fn spawn(&self, exe: &Path) -> Result<Running, Error> {
        let log = data::open_log(&self.log)?;
        let again = log.try_clone().map_err(|source| Error::Data { path: self.log.clone(), source })?;
        let is_engine = matches!(self.ready, Ready::Engine);
        let mut command = std::process::Command::new(exe);
        command.args(&self.args).envs(self.env.iter().copied()).stdin(Stdio::piped()).stderr(log);
        command.stdout(if is_engine { Stdio::piped() } else { again.into() });
        // A group of its own: Ctrl-C on the terminal is for the owner, who stops its servers in order.
        command.process_group(0);
        if let Some(name) = std::env::args_os().next() {
            command.arg0(name);
        }
        let mut child = Command::from(command)
            .spawn()
            .map_err(|source| Error::Spawn { command: exe.display().to_string(), source })?;
        let alive = child.stdin.take();
        let stdout = child.stdout.take().map(BufReader::new);
        Ok(Running { server: self.server, child, _alive: alive, stdout, words: self.words.clone() })
    }
}

async fn wait_ready(ready: &Ready, port: u16, stdout: Option<&mut BufReader<ChildStdout>>) {
    match ready {
        Ready::Nats { name, http } => {
            while !nats::is_ready(port, *http, name).await {
                sleep(LOOK_EVERY).await;
            }
        }
        Ready::Engine => {
            if let Some(stdout) = stdout {
                wait_line(stdout).await;
            }
            wait_ping(port).await;
        }
        Ready::Http => {
            wait_ping(port).await;
            sleep(SETTLE).await;
        }
    }
}

/// Waits for the line that says the port; for ever if the output ends without it, which is the child's end.
async fn wait_line(stdout: &mut BufReader<ChildStdout>) {
    let mut line = String::new();
    loop {
        line.clear();
        match stdout.read_line(&mut line).await {
            Ok(1..) if line.contains("\"port\"") => return,
            Ok(1..) => {}
            Ok(0) | Err(_) => std::future::pending().await,
        }
    }
}

async fn wait_ping(port: u16) {
    while !matches!(net::get(port, "/ping").await, Ok((200, _))) {
        sleep(LOOK_EVERY).await;
    }
}

impl Running {
    /// Waits until the server ends, and says how. Cancel safe.
    pub(crate) async fn ended(&mut self) -> String {
        tokio::select! {
            status = self.child.wait() => describe(status),
            never = drain(self.stdout.as_mut()) => match never {},
        }
    }

    /// Ends the server: SIGTERM, twenty seconds, SIGKILL.
    pub(crate) async fn stop(&mut self) {
        let Some(pid) = self.pid() else { return };
        if let Err(errno) = kill(pid, Signal::SIGTERM) {
            tracing::warn!(server = %self.server, %pid, %errno, "cannot signal");
        }
        let begun = Instant::now();
        if timeout(STOP_WITHIN, self.ended()).await.is_err() {
            tracing::warn!(server = %self.server, seconds = begun.elapsed().as_secs(), "does not end, killing it");
            // The group: the guard and its server.
            if let Err(errno) = killpg(pid, Signal::SIGKILL) {
                tracing::warn!(server = %self.server, %pid, %errno, "cannot kill");
            }
            if timeout(KILL_WITHIN, self.ended()).await.is_err() {
                tracing::warn!(server = %self.server, %pid, "killed but not gone");
            }
        }
        // Nothing is left unless the guard was killed from outside.
        let server = self.server;
        let words = self.words.clone();
        match off_thread(move || leftover::stop(server, &words)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) | Err(error) => tracing::warn!("failed to {error}"),
        }
    }

    fn pid(&self) -> Option<Pid> {
        self.child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw)
    }
}

fn is_said_taken(said: &str, port: u16) -> bool {
    let address = format!("127.0.0.1:{port}");
    let names_it = |line: &str| {
        line.split(&address).skip(1).any(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
    };
    let says_why = |line: &str| line.to_ascii_lowercase().contains("address already in use");
    let lines: Vec<&str> = said.lines().collect();
    let mut here = lines.iter().enumerate().filter(|(_, line)| names_it(line));
    // The engine, which is ours, puts a cause on a line of its own.
    here.any(|(at, line)| says_why(line) || lines.get(at + 1).is_some_and(|next| says_why(next)))
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), guard::describe)
}

/// Reads away what a server still says on stdout, so that it never waits for a reader. Never resolves.
async fn drain(from: Option<&mut (impl AsyncRead + Unpin)>) -> Infallible {
    if let Some(from) = from {
        let mut ignored = [0; 1024];
        while matches!(from.read(&mut ignored).await, Ok(1..)) {}
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_found_its_port_taken_is_understood() {
        let nats = "[FTL] Can't start monitoring: can't listen to the monitor port: listen tcp 127.0.0.1:21570: bind: address already in use\n";
        let engine = "error: failed to listen on 127.0.0.1:2157\n  Address already in use (os error 98)\nhint: another process…\n";
        let server = "<Error> Application: Listen [127.0.0.1]:2157 failed: Net Exception: Address already in use: 127.0.0.1:2157\n";
        assert!(is_said_taken(nats, 21570));
        assert!(!is_said_taken(nats, 2157));
        assert!(is_said_taken(engine, 2157) && is_said_taken(server, 2157));
        assert!(!is_said_taken(engine, 215) && !is_said_taken(engine, 21570));
        assert!(!is_said_taken("[FTL] cannot read 127.0.0.1:2157\n", 2157));
    }
}
