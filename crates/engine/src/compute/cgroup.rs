//! Limits that control groups, version 1 and 2, set for this process.

use std::fs;
use std::path::PathBuf;

const ROOT: &str = "/sys/fs/cgroup";

/// The directories that hold limits for this process: its own group of `controller` and the groups above it.
fn directories(controller: &str) -> Vec<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let root = match controllers {
            // Version 2 has one tree for all controllers.
            "" => PathBuf::from(ROOT),
            _ if controllers.split(',').any(|name| name == controller) => {
                PathBuf::from(ROOT).join(controllers)
            }
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        found.extend(own.ancestors().take_while(|above| above.starts_with(&root)).map(PathBuf::from));
    }
    found
}

fn numbers(controller: &str, file: &str) -> impl Iterator<Item = (PathBuf, u64)> {
    let file = file.to_owned();
    directories(controller).into_iter().filter_map(move |directory| {
        let number = fs::read_to_string(directory.join(&file)).ok()?.trim().parse().ok()?;
        Some((directory, number))
    })
}

/// Bytes of memory that this process may use.
pub(super) fn memory() -> Option<u64> {
    let limits = numbers("memory", "memory.max").chain(numbers("memory", "memory.limit_in_bytes"));
    limits.map(|(_, bytes)| bytes).min()
}

/// Allowed and current number of processes and threads, for the group that leaves the fewest free.
pub(super) fn processes() -> Option<(u64, u64)> {
    let groups = numbers("pids", "pids.max").filter_map(|(directory, most)| {
        let now = fs::read_to_string(directory.join("pids.current")).ok()?.trim().parse().ok()?;
        Some((most, now))
    });
    groups.min_by_key(|(most, now)| most.saturating_sub(*now))
}
