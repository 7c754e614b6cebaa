//! Faults of system calls, by `strace -f -p PID -e inject=…` on a server that runs.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tests::{SOON, signal, wait_until};

use crate::netns::install;

/// The calls by which a part gets its name.
pub const RENAMES: &str = "rename,renameat,renameat2";
/// The calls by which its files are brought to the disk.
pub const SYNCS: &str = "fsync,fdatasync";
/// What `strace` writes behind a call that it made fail.
const INJECTED: &str = "(INJECTED)";
/// A part that an INSERT has written and not yet made visible.
const TEMPORARY_PART: &str = "tmp_insert_";

/// `strace` on a process; it lets go when dropped.
pub struct Strace {
    child: Child,
    log: PathBuf,
}

impl Strace {
    /// Attaches to a process and all of its threads. `fault` is what stands behind `inject=CALLS:`.
    pub fn attach(pid: u32, calls: &str, fault: &str, log: PathBuf) -> Self {
        install(&[("strace", "strace")]);
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "strace", "-f", "-y", "-p", &pid.to_string()])
            .args(["-e", &format!("trace={calls}"), "-e", &format!("inject={calls}:{fault}"), "-o"])
            .arg(&log)
            .stdin(Stdio::null())
            .stderr(File::create(log.with_extension("err")).expect("a log"))
            .spawn()
            .expect("`strace` starts");
        let mut strace = Self { child, log };
        wait_until("strace attached", SOON, || {
            let said = fs::read_to_string(strace.log.with_extension("err")).unwrap_or_default();
            let ended = strace.child.try_wait().expect("it can be waited for");
            assert!(ended.is_none(), "strace ended: {said}");
            if said.contains("attached") { Ok(()) } else { Err(said) }
        });
        strace
    }

    /// The traced calls on parts that were being inserted and that failed, or were the last of the process.
    pub fn hits(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let killed = log.contains("+++ killed by SIGKILL +++");
        let is_hit = |line: &&str| {
            line.contains(TEMPORARY_PART) && (line.contains(INJECTED) || killed && !line.ends_with("= 0"))
        };
        log.lines().filter(is_hit).map(str::to_owned).collect()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // Told to end it detaches; killed, it would take the traced process along in a stopped state.
        signal(self.child.id(), "INT");
        if let Err(error) = self.child.wait() {
            assert!(std::thread::panicking(), "strace does not end: {error}");
        }
    }
}
