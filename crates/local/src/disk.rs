//! How much of a disk is free, and how much a directory uses.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statvfs::statvfs;

/// Bytes that this user may still write on the volume of `path`.
///
/// # Errors
/// When nothing is there, or it cannot be looked at.
#[allow(clippy::unnecessary_cast, reason = "the fields are 32 bits wide on macOS")]
pub fn free(path: &Path) -> io::Result<u64> {
    let volume = statvfs(path)?;
    Ok(volume.blocks_available() as u64 * volume.fragment_size() as u64)
}

/// Bytes in the files under `path`; what cannot be read counts as nothing.
pub(crate) fn used(path: &Path) -> u64 {
    let Ok(meta) = path.symlink_metadata() else { return 0 };
    if !meta.is_dir() {
        return meta.len();
    }
    fs::read_dir(path).map_or(0, |entries| entries.flatten().map(|entry| used(&entry.path())).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_uses_what_its_files_do() {
        let temp = tempfile::tempdir().expect("a temp dir");
        fs::create_dir(temp.path().join("a")).expect("created");
        fs::write(temp.path().join("a/b"), [0; 1000]).expect("written");
        fs::write(temp.path().join("c"), [0; 24]).expect("written");
        assert_eq!(used(temp.path()), 1024);
        assert_eq!(used(&temp.path().join("missing")), 0);
        assert!(free(temp.path()).expect("a volume") > 0);
    }
}
