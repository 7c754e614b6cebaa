//! The data's directory before the engine has it: its lock, and what tables that were dropped left behind.

use std::ffi::OsStr;
use std::fs::{self, DirEntry, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::Error;

const LOCK: &str = "chdb-http.lock";
/// `database.table.UUID.sql` for each table that was dropped.
const DROPPED: &str = "metadata_dropped";
const UUID: usize = 36;
/// By how many characters of its UUID a table's directory is filed.
const SHELF: usize = 3;

/// Makes the directory and locks it, until the file is closed. The engine has a lock as well, but its message names
/// neither problem nor remedy.
pub(crate) fn open(path: &Path) -> Result<File, Error> {
    let directory = |source| Error::Directory { path: path.to_owned(), source };
    fs::create_dir_all(path).map_err(directory)?;
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    let file = options.open(path.join(LOCK)).map_err(directory)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => return Err(directory(source)),
    }
    remove_dropped(path).map_err(directory)?;
    Ok(file)
}

/// A server removes the data of dropped tables after eight minutes; the engine as a library never does.
fn remove_dropped(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path.join(DROPPED)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let Some(data) = dropped_data(path, &entry) else { continue };
        match fs::remove_dir_all(&data) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => tracing::info!(data = %data.display(), "removed what a dropped table left"),
        }
        // Last: whatever fails before is found again.
        fs::remove_file(entry.path())?;
    }
    Ok(())
}

fn dropped_data(path: &Path, entry: &DirEntry) -> Option<PathBuf> {
    let name = entry.file_name();
    let (_, uuid) = Path::new(&name).file_stem().and_then(OsStr::to_str)?.rsplit_once('.')?;
    let is_uuid = uuid.len() == UUID && uuid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    is_uuid.then(|| path.join("store").join(&uuid[..SHELF]).join(uuid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dropped_tables_left_is_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path();
        let uuids = ["736901ef-6246-4129-832e-e234e1c1e533", "c591f60d-c463-4bb1-b7fd-465954fa2a02"];
        for uuid in uuids {
            fs::create_dir_all(path.join("store").join(&uuid[..SHELF]).join(uuid)).expect("a table");
        }
        fs::create_dir(path.join(DROPPED)).expect("a directory");
        for name in [format!("d.t%2Ex.{}.sql", uuids[0]), "d.t.not-a-uuid.sql".to_owned(), "odd".to_owned()] {
            fs::write(path.join(DROPPED).join(name), "").expect("a file");
        }
        let lock = open(path).expect("the directory");
        assert!(!path.join("store/736").join(uuids[0]).exists());
        assert!(path.join("store/c59").join(uuids[1]).exists());
        assert_eq!(fs::read_dir(path.join(DROPPED)).expect("a directory").count(), 2);
        assert!(matches!(open(path), Err(Error::InUse { .. })));
        drop(lock);
        assert!(open(path).is_ok());
    }
}
