//! Small disks, which can be full.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

const FILLER: &str = "filler";
const BLOCK: usize = 4096;

/// A tmpfs of a few MB; unmounted when dropped.
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Mounts one at `path`, which is made if need be.
    pub fn mount(path: &Path, mb: u32) -> Self {
        fs::create_dir_all(path).expect("a mount point");
        let size = format!("size={mb}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "faults"]).arg(path).status();
        assert!(mounted.expect("`mount` runs").success(), "no tmpfs at {}: root is needed", path.display());
        Self { path: path.to_owned() }
    }

    /// Fills it to the last block; how many bytes that took.
    pub fn fill(&mut self) -> u64 {
        self.fill_but(0)
    }

    /// Fills it but for so many bytes.
    pub fn fill_but(&mut self, left: u64) -> u64 {
        let mut filler =
            File::options().create(true).append(true).open(self.path.join(FILLER)).expect("a filler");
        let mut written = 0;
        loop {
            match filler.write(&[0; BLOCK]) {
                Ok(bytes) => written += bytes as u64,
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("{}: {error}", self.path.display()),
            }
        }
        let kept = written.saturating_sub(left);
        filler.set_len(kept).expect("the filler can be cut");
        kept
    }

    /// Makes room again.
    pub fn clear(&mut self) {
        fs::remove_file(self.path.join(FILLER)).expect("the filler is removed");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: what still holds a file there ends with its process.
        let unmounted = Command::new("umount").arg("-l").arg(&self.path).status();
        if !std::thread::panicking() {
            assert!(unmounted.is_ok_and(|status| status.success()), "{} stays mounted", self.path.display());
        }
    }
}
