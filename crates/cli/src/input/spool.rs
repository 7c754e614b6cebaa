//! What can be read once only, kept in a temporary file so that it can be read twice.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::Context as _;
use millstream::Id;
use millstream_engine::Store;
use millstream_engine::error::Error;
use millstream_engine::model::input_fault::ReadFault;
use millstream_engine::produce::input::{Form, Input, Value};

/// What is copied at once.
const PIECE: usize = 1 << 16;

/// Whether a path is of something that gives its bytes once: a pipe, a terminal.
pub(super) fn is_read_once(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Opens a file; what is none is read to its end and kept. Blocks, for as long as a pipe has no writer.
pub(super) fn open(path: &Path, shown: String, form: Form) -> anyhow::Result<Input> {
    let opened = File::open(path).and_then(|file| {
        let kind = file.metadata()?.file_type();
        if kind.is_dir() { Err(ErrorKind::IsADirectory.into()) } else { Ok((file, kind.is_file())) }
    });
    let (file, regular) = opened.map_err(|source| Error::Input { input: shown.clone(), source })?;
    let file = if regular { file } else { keep(file, &shown)? };
    Ok(Input::File { file: file.into(), shown, form })
}

/// Standard input, kept. Blocks until it ends.
pub(super) fn stdin(form: Form) -> anyhow::Result<Input> {
    let shown = "standard input".to_owned();
    let failed = |source| Error::Input { input: shown.clone(), source };
    let file = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let file = keep(file.into(), &shown)?;
    Ok(Input::File { file: file.into(), shown, form })
}

fn keep(mut from: File, shown: &str) -> anyhow::Result<File> {
    let failed = |source| Error::Input { input: shown.to_owned(), source };
    let kind = from.metadata().map_err(failed)?.file_type();
    let endless = kind.is_block_device() || (kind.is_char_device() && !from.is_terminal());
    let mut kept = temporary(shown)?;
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(kept),
            // /dev/null is a device, too, and gives nothing.
            Ok(_) if endless => return Err(failed(ReadFault::Device.into()).into()),
            Ok(read) => kept.write_all(&piece[..read]).with_context(kept_where(shown))?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error).into()),
        }
    }
}

/// A temporary file without a name: it is gone with this process, however that ends.
fn temporary(what: &str) -> anyhow::Result<File> {
    tempfile::tempfile().with_context(kept_where(what))
}

fn kept_where(what: &str) -> impl Fn() -> String {
    move || {
        format!(
            "failed to keep {what} in a temporary file in `{}`\nhint: make room there, or name another directory in TMPDIR",
            std::env::temp_dir().display()
        )
    }
}

/// The answer to a query, kept, in an order that is the same each time.
pub(super) async fn query<I: Id>(query: &str, store: &Store) -> anyhow::Result<(File, Value)> {
    let columns = store.describe_query(query).await?;
    let (name, value) = match &columns[..] {
        [(name, kind)] if value_of::<I>(kind).is_some() => (name, value_of::<I>(kind)),
        _ => (&String::new(), None),
    };
    let Some(value) = value else {
        let found: Vec<String> = columns.iter().map(|(name, kind)| format!("`{name}` {kind}")).collect();
        return Err(Error::QueryColumns { found: found.join(", "), expected: I::CLICKHOUSE }.into());
    };
    let mut kept = temporary("the query's answer")?;
    let mut written = Ok(());
    let write = |piece: bytes::Bytes| {
        if written.is_ok() {
            written = kept.write_all(&piece);
        }
    };
    store.sql(&millstream_engine::clickhouse::sql::ordered(query, name), "RowBinary", write).await?;
    written.with_context(kept_where("the query's answer"))?;
    Ok((kept, value))
}

/// How RowBinary writes a column of this type, if its values are ids.
fn value_of<I: Id>(kind: &str) -> Option<Value> {
    let kind = kind.strip_prefix("LowCardinality(").map_or(kind, |kind| kind.trim_end_matches(')'));
    match (I::CLICKHOUSE, kind) {
        ("String", "String") => Some(Value::Text),
        ("UInt64", "UInt8") => Some(Value::Number(1)),
        ("UInt64", "UInt16") => Some(Value::Number(2)),
        ("UInt64", "UInt32") => Some(Value::Number(4)),
        ("UInt64", "UInt64") => Some(Value::Number(8)),
        _ => None,
    }
}
