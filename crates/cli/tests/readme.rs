//! README's table of troubles and the codes that the program prints are the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use millstream_engine::error::Code;

/// The root of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Codes by the rows of README's table, as they stand there.
fn rows() -> Vec<String> {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md is read");
    let (_, troubles) = readme.split_once("\n## When something fails\n").expect("README.md has that heading");
    let troubles = troubles.split("\n## ").next().unwrap_or_default();
    let rows = troubles.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| code "));
    rows.map(|row| row.split('|').nth(1).unwrap_or_default().trim().to_owned()).collect()
}

#[test]
fn each_row_of_the_table_has_a_code_of_the_program_and_each_code_a_row() {
    let codes: Vec<String> = Code::ALL.iter().map(Code::to_string).collect();
    assert_eq!(
        rows(),
        codes,
        "the rows of \"When something fails\" in README.md, in the order of their codes"
    );
}

#[test]
fn each_code_is_printed_somewhere() {
    let listed: BTreeSet<String> = Code::ALL.iter().map(|code| format!("{code:?}")).collect();
    let mut used = BTreeSet::new();
    for file in
        ["crates/engine/src", "crates/cli/src"].iter().flat_map(|folder| rust_files(&root().join(folder)))
    {
        let text = fs::read_to_string(&file).expect("text");
        let product = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for name in product.split("Code::").skip(1) {
            let end = name.find(|symbol: char| !symbol.is_ascii_alphanumeric()).unwrap_or(name.len());
            used.insert(name[..end].to_owned());
        }
    }
    // Reasons of dead letters are told by `Code::of_reason`.
    let of_reasons = [
        "crashed: ",
        "row of 9 bytes is larger than a message may be",
        "the row does not fit its columns: ",
        "it was the first id of its process",
    ];
    let told = of_reasons.iter().filter_map(|reason| Code::of_reason(reason)).map(|code| format!("{code:?}"));
    let printed: BTreeSet<String> =
        used.into_iter().filter(|name| listed.contains(name)).chain(told).collect();
    assert_eq!(printed, listed);
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => rust_files(&path),
            false => vec![path],
        })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}
