//! What ids leak in their process: open files and threads, until the next id finds none left.
//!
//! That next id would fail because of earlier ones. So after a failure the process checks whether it has any left; if
//! not, it ends, and the worker has the ids in progress computed in a fresh process. A process that has computed no
//! other id keeps the failure: it is the id's own.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Open files beyond this share of the limit count as all, because a function may need several.
const FULL: (u64, u64) = (9, 10);
/// The check starts a thread no more often than this: it costs more than a light id.
const TRY_THREAD: Duration = Duration::from_millis(10);

/// The checks after failures.
#[derive(Debug)]
pub(super) struct Leaks {
    files: u64,
    /// Ids that the process computed before.
    computed: AtomicU64,
    tried: Mutex<Instant>,
}

impl Leaks {
    /// Call it once the pipeline is ready: files that `start` holds open for all ids are no leak.
    pub fn new() -> Self {
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let mut leaks = Self { files, computed: AtomicU64::new(0), tried: Mutex::new(Instant::now()) };
        if leaks.lacks_files().is_some() {
            leaks.files = u64::MAX;
        }
        leaks
    }

    /// Adds ids to the count of computed ids.
    pub fn computed(&self, ids: u64) {
        self.computed.fetch_add(ids, Ordering::Relaxed);
    }

    /// Ends this process if ids before the failed one have used it up.
    #[expect(clippy::print_stderr, reason = "goes to the worker, which logs it")]
    pub fn look(&self) {
        if self.computed.load(Ordering::Relaxed) == 0 {
            return;
        }
        if let Some(what) = self.lacks_files().or_else(|| self.lacks_threads()) {
            eprintln!(
                "{what} in a process that has computed other ids: the ids in progress are computed in a fresh process"
            );
            // At once: exit handlers might wait for threads that compute.
            let _gone = kill(Pid::this(), Signal::SIGKILL);
        }
    }

    /// The system gives the lowest free number, so the number shows how many files are open.
    fn lacks_files(&self) -> Option<String> {
        let limit = self.files;
        match File::open("/dev/null") {
            Ok(file) if file.as_raw_fd() as u64 >= limit / FULL.1 * FULL.0 => {
                Some(format!("{} of {limit} open files are open", file.as_raw_fd()))
            }
            Err(fault) if fault.raw_os_error() == Some(nix::libc::EMFILE) => {
                Some(format!("all of {limit} open files are open"))
            }
            _ => None,
        }
    }

    fn lacks_threads(&self) -> Option<String> {
        let Ok(mut tried) = self.tried.try_lock() else { return None };
        if tried.elapsed() < TRY_THREAD {
            return None;
        }
        *tried = Instant::now();
        let fault = std::thread::Builder::new().stack_size(64 << 10).spawn(|| {}).err()?;
        (fault.kind() == io::ErrorKind::WouldBlock)
            .then(|| format!("the system gives no thread any more ({fault})"))
    }
}
