//! A compute process and everything that it has started, killed as a whole.
//!
//! A compute process leads a process group, which programs that it starts are born into. A program may leave the group
//! (`setsid`). So all of them also carry a mark in their environment, by which the worker finds them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

/// The environment variable whose value marks a compute process and everything that it starts.
pub(super) const MARK: &str = "MILLSTREAM_COMPUTES_FOR";

/// The process group of a child. Dropping the value kills the whole group.
#[derive(Debug)]
pub(super) struct Group {
    leader: Pid,
    mark: String,
}

impl Group {
    /// The group that child `pid` leads, started with `mark`.
    pub fn of(pid: u32, mark: String) -> Self {
        Self { leader: Pid::from_raw(pid as i32), mark }
    }

    /// Whether the leader has ended. It stays a zombie, so that the system does not reuse its process id.
    pub fn has_ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        // An error means that the child no longer exists.
        !matches!(waitid(Id::Pid(self.leader), flags), Ok(WaitStatus::StillAlive))
    }

    /// Kills the leader and all members of the group.
    pub fn kill(&self) {
        // An empty group needs no signal.
        let _empty = killpg(self.leader, Signal::SIGKILL);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
        let mark = Arc::new(std::mem::take(&mut self.mark));
        // The scan reads a file of every process of this host, so it runs in a thread; if the host gives no thread, it
        // runs here.
        let marked = mark.clone();
        let thread = std::thread::Builder::new().name("strays".into()).spawn(move || kill_marked(&marked));
        if thread.is_err() {
            kill_marked(&mark);
        }
    }
}

/// Ends this process and everything that it started, because its worker is gone.
pub(super) fn end_own() -> ! {
    if let Ok(mark) = std::env::var(MARK) {
        kill_marked(&mark);
    }
    if nix::unistd::getpgrp() == Pid::this() {
        let _own = killpg(Pid::this(), Signal::SIGKILL);
    }
    std::process::exit(1)
}

/// Kills every other process that carries this mark.
fn kill_marked(mark: &str) {
    kill_where(|_, marked| marked == mark);
}

/// Kills programs of compute processes whose worker was killed while the compute process crashed: no process was left
/// to end them. It looks only at workers of this process's own pid namespace.
pub(crate) fn end_orphans() {
    let numbering = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = numbering("self");
    kill_where(|pid, mark| {
        worker_of(mark).is_some_and(|worker| !Path::new(&format!("/proc/{worker}")).exists())
            && own.is_some()
            && numbering(&pid.to_string()) == own
    });
}

/// The mark of the `number`th process that this worker starts.
pub(super) fn mark_of(worker: u32, number: u64, random: u64) -> String {
    format!("millstream-{worker}-{number}-{random:016x}")
}

fn worker_of(mark: &str) -> Option<u32> {
    mark.strip_prefix("millstream-")?.split('-').next()?.parse().ok()
}

/// Kills every other process whose number and mark match.
fn kill_where(is_asked_for: impl Fn(u32, &str) -> bool) {
    for pid in processes().filter(|pid| *pid != std::process::id()) {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let variables = environment.split(|byte| *byte == 0);
        let marks =
            variables.filter_map(|variable| variable.strip_prefix(MARK.as_bytes())?.strip_prefix(b"="));
        let mut marks = marks.filter_map(|mark| std::str::from_utf8(mark).ok());
        if marks.any(|mark| is_asked_for(pid, mark)) {
            // The process may have ended meanwhile.
            let _gone = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Reaps orphans that came to this process, as happens to the first process of a container. The ones in `before` had
/// already ended at the last call, so no other part of this process waits for them.
pub(crate) fn reap_strays(before: &mut Vec<u32>) {
    let own = std::process::id();
    let ended: Vec<u32> = processes().filter(|pid| ended_child_of(*pid, own)).collect();
    for pid in ended.iter().filter(|pid| before.contains(pid)) {
        let _reaped = waitpid(Pid::from_raw(*pid as i32), Some(WaitPidFlag::WNOHANG));
    }
    *before = ended;
}

/// Whether process `pid` has ended and `parent` has not waited for it yet.
fn ended_child_of(pid: u32, parent: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The preceding field, the name in parentheses, may contain any character.
    let Some((_, fields)) = stat.rsplit_once(')') else { return false };
    let mut fields = fields.split_whitespace();
    fields.next() == Some("Z") && fields.next().and_then(|field| field.parse().ok()) == Some(parent)
}

/// Ends this process if it is a fork of process `of`: a function that forks must not return in the copy, whose answers
/// would mix with the original's.
pub(super) fn end_a_copy(of: u32) {
    if std::process::id() != of {
        let _at_once = kill(Pid::this(), Signal::SIGKILL);
    }
}
