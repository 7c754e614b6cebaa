//! README's table of troubles and the codes that the program prints are the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use millstream_engine::error::Code;

/// The root of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The rows of README's table: code, and what the program says.
fn rows() -> Vec<(String, String)> {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md is read");
    let (_, troubles) = readme.split_once("\n## When something fails\n").expect("README.md has that heading");
    let troubles = troubles.split("\n## ").next().unwrap_or_default();
    let rows = troubles.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| code "));
    let cells = rows.map(|row| row.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>());
    cells.map(|cells| (cells[1].clone(), cells[2].clone())).collect()
}

#[test]
fn each_row_of_the_table_has_a_code_of_the_program_and_each_code_a_row() {
    let codes: Vec<String> = Code::ALL.iter().map(Code::to_string).collect();
    assert_eq!(
        rows().into_iter().map(|(code, _)| code).collect::<Vec<_>>(),
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

#[test]
fn what_the_table_quotes_the_program_says() {
    let said = literals();
    let mut missing = Vec::new();
    for (code, cell) in rows() {
        for quoted in cell.split('`').skip(1).step_by(2) {
            // Names and numbers stand where the program puts a value in.
            let mut pieces = quoted.split('…').flat_map(|part| part.split("RUN")).flat_map(|part| {
                part.split(|symbol: char| symbol.is_ascii_digit())
                    .map(|piece| piece.trim_matches([' ', ',', ':']))
            });
            if let Some(piece) = pieces.find(|piece| piece.len() >= SHORTEST && !said.contains(piece)) {
                missing.push(format!("{code}: `{piece}` of `{quoted}`"));
            }
        }
    }
    assert!(missing.is_empty(), "README.md quotes what is in no text of the program: {missing:#?}");
}

#[test]
fn no_text_names_a_key_that_was_renamed() {
    const RENAMED: [&str; 9] = [
        "hard_seconds",
        "soft_seconds",
        "start_seconds",
        "retry_seconds",
        "drain_seconds",
        "rows_wait_seconds",
        "keep_ids_seconds",
        "keep_rows_seconds",
        "group_ms",
    ];
    let said = literals();
    let named: Vec<&str> = RENAMED.into_iter().filter(|key| said.contains(key)).collect();
    assert!(named.is_empty(), "the configuration has no such keys: {named:?}");
}

/// Shorter pieces of a quoted text stand in too many others to say anything.
const SHORTEST: usize = 6;

/// All string literals of the product, a line each: escapes and placeholders replaced, without backticks.
fn literals() -> String {
    let folders = ["crates/engine/src", "crates/cli/src", "crates/local/src", "crates/pipeline/src"];
    let mut said = String::new();
    for file in folders.iter().flat_map(|folder| rust_files(&root().join(folder))) {
        let text = fs::read_to_string(&file).expect("text");
        let product = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let code = product.lines().filter(|line| !line.trim_start().starts_with("//"));
        said.push_str(&strings_of(&code.collect::<Vec<_>>().join("\n")));
    }
    said
}

fn strings_of(code: &str) -> String {
    let mut said = String::new();
    let mut symbols = code.chars().peekable();
    let (mut within, mut placeholder) = (false, false);
    while let Some(symbol) = symbols.next() {
        match symbol {
            '\'' if !within && symbols.peek() == Some(&'"') => drop(symbols.next()),
            '"' => {
                within = !within;
                said.push('\n');
            }
            _ if !within => {}
            '\\' => match symbols.next() {
                // A literal that goes on in the next line.
                Some('\n') => while symbols.next_if(|next| next.is_whitespace()).is_some() {},
                Some('"') => said.push('"'),
                _ => {}
            },
            '{' => placeholder = true,
            '}' => {
                placeholder = false;
                said.push('…');
            }
            '`' => {}
            symbol if !placeholder => said.push(symbol),
            _ => {}
        }
    }
    said
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
