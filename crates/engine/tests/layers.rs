//! Rooms of the engine use those below them only. ARCHITECTURE.md has the picture.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the lowest to the highest; those in one row do not know each other. The lowest are what all need.
const LAYERS: [&[&str]; 11] = [
    &["model"],
    &["error", "failpoint"],
    &["environment", "stop"],
    &["retry"],
    &["nats", "clickhouse"],
    &["fleet"],
    &["compute"],
    &["work", "sink"],
    &["seal"],
    &["produce"],
    &["control", "observe"],
];

#[test]
fn rooms_use_those_below_them_only() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut wrong, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for file in rust_files(&source) {
        let shown = file.strip_prefix(&source).expect("within").display().to_string();
        let room = shown.split(['/', '.']).next().expect("a name").to_owned();
        // The root names all rooms, and the simulation plays several.
        if ["lib", "simulation"].contains(&room.as_str()) {
            continue;
        }
        for used in rooms_used(&product(&fs::read_to_string(&file).expect("text"))) {
            if used != room && layer(&used) >= layer(&room) {
                wrong.insert(format!("{shown} uses `{used}`"));
            }
            seen.insert(used);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen.len() > 10, "paths are not found any more: {seen:?}");
}

fn layer(room: &str) -> usize {
    let layer = LAYERS.iter().position(|rooms| rooms.contains(&room));
    layer.unwrap_or_else(|| {
        panic!("`{room}` has no layer: give it one here, or name the module and not what the root re-exports")
    })
}

/// The text without comments, and without tests, which are at a file's end.
fn product(text: &str) -> String {
    let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"));
    lines.map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The first word of each path that begins at the crate's root.
fn rooms_used(text: &str) -> BTreeSet<String> {
    let paths = text.split("crate::").skip(1);
    paths.map(|path| path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()).collect()
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    let (directories, files): (Vec<PathBuf>, Vec<PathBuf>) = entries.partition(|path| path.is_dir());
    let mut found: Vec<PathBuf> =
        files.into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "rs")).collect();
    directories.iter().for_each(|directory| found.extend(rust_files(directory)));
    found
}
