//! Rooms of the engine use those below them only, and modules of a room each other in one direction. ARCHITECTURE.md has the
//! picture. What is looked at are imports and paths: a method that is called names no module, and what lies deeper than a
//! room's own modules counts as theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the lowest to the highest; those in one row do not know each other. The lowest are what all need.
const LAYERS: [&[&str]; 12] = [
    &["model"],
    &["error", "failpoint"],
    &["environment", "stop", "telemetry"],
    &["retry"],
    &["nats", "clickhouse"],
    &["session"],
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

#[test]
fn modules_of_a_room_use_each_other_in_one_direction() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    // `error` is one enum, whose texts and hints are files of their own.
    for room in LAYERS.concat().into_iter().filter(|room| *room != "error") {
        let mut uses = uses_within(&source, room);
        while let Some(free) = uses
            .iter()
            .find(|(_, used)| used.iter().all(|used| !uses.contains_key(used)))
            .map(|(name, _)| name.clone())
        {
            uses.remove(&free);
        }
        assert!(uses.is_empty(), "`{room}` has a circle among {uses:#?}");
    }
}

/// Which modules of a room each of them uses. The room's own page goes by the room's name.
fn uses_within(source: &Path, room: &str) -> BTreeMap<String, BTreeSet<String>> {
    let files = rust_files(source).into_iter();
    let mut texts: BTreeMap<String, Vec<(usize, String)>> = BTreeMap::new();
    for file in files {
        let within = file.strip_prefix(source).expect("within").with_extension("");
        let words: Vec<String> = within.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        if words[0] == room {
            let text = product(&fs::read_to_string(&file).expect("text"));
            texts.entry(words.get(1).unwrap_or(&words[0]).clone()).or_default().push((words.len(), text));
        }
    }
    let used_by = |name: &String, (depth, text): &(usize, String)| -> BTreeSet<String> {
        let module_or_page = |word: String| if texts.contains_key(&word) { word } else { room.to_owned() };
        let mut used: BTreeSet<String> =
            words_behind(text, &format!("crate::{room}::")).map(module_or_page).collect();
        match depth {
            1 => used.extend(texts.keys().filter(|other| text.contains(&format!("{other}::"))).cloned()),
            2 => used.extend(words_behind(text, "super::").map(module_or_page)),
            _ => {}
        }
        used.remove(name);
        used
    };
    texts
        .iter()
        .map(|(name, files)| (name.clone(), files.iter().flat_map(|file| used_by(name, file)).collect()))
        .collect()
}

fn layer(room: &str) -> usize {
    let layer = LAYERS.iter().position(|rooms| rooms.contains(&room));
    layer.unwrap_or_else(|| {
        panic!("`{room}` has no layer: give it one here, or name the module and not what the root re-exports")
    })
}

/// The text without comments, and without tests, which are at a file's end.
fn product(text: &str) -> String {
    let lines = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().lines();
    lines.map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The first word of each path that begins at the crate's root.
fn rooms_used(text: &str) -> BTreeSet<String> {
    words_behind(text, "crate::").collect()
}

fn words_behind(text: &str, start: &str) -> impl Iterator<Item = String> {
    let paths = text.split(start).skip(1).map(str::to_owned).collect::<Vec<_>>();
    paths.into_iter().map(|path| path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    let (directories, files): (Vec<PathBuf>, Vec<PathBuf>) = entries.partition(|path| path.is_dir());
    let mut found: Vec<PathBuf> =
        files.into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "rs")).collect();
    directories.iter().for_each(|directory| found.extend(rust_files(directory)));
    found
}
