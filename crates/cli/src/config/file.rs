//! `millstream.toml`: typed values by dotted key, with every fault collected and every unknown key noticed.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

use super::keys::{Key, Numbers, Text, Truth};
use crate::units::{Durations, Sizes};

/// A configuration file that is being read. Keys that no setting reads are faults in the end.
#[derive(Debug, Default)]
pub(super) struct File {
    path: PathBuf,
    table: Table,
    asked: BTreeSet<String>,
    faults: Vec<String>,
}

impl File {
    /// Reads the file; one that is not there is empty unless it was named.
    pub fn read(path: &Path, named: bool, faults: &mut Vec<String>) -> Self {
        let mut file = Self { path: path.to_owned(), ..Self::default() };
        match std::fs::read_to_string(path) {
            Ok(text) => match text.parse::<Table>() {
                Ok(table) => file.table = table,
                Err(error) => {
                    let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
                    faults.push(format!("{} line {line}: {}", path.display(), error.message()));
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => {}
            Err(error) => faults.push(format!("{}: {error}", path.display())),
        }
        file
    }

    /// A text.
    pub fn text(&mut self, key: &Key<Text>) -> Option<String> {
        match self.value(key.name)? {
            Value::String(text) => Some(text),
            // A password stays out of the journal, whatever is wrong with it.
            _ if key.name.ends_with("password") => self.fault(key.name, "the value is not a text in quotes"),
            other => self.fault(key.name, format_args!("{other} is not a text in quotes")),
        }
    }

    /// A whole number.
    pub fn number(&mut self, key: &Key<Numbers>) -> Option<u64> {
        match self.value(key.name)? {
            Value::Integer(number) => match u64::try_from(number) {
                Ok(number) if key.takes.hold(number) => Some(number),
                _ => self.fault(key.name, format_args!("{number} is outside {}", key.takes)),
            },
            other => self.fault(key.name, format_args!("{other} is not a whole number")),
        }
    }

    /// A size in bytes.
    pub fn size(&mut self, key: &Key<Sizes>) -> Option<u64> {
        let text = self.with_unit(key.name)?;
        key.takes.read(&text).map_or_else(|fault| self.fault(key.name, fault), Some)
    }

    /// A duration.
    pub fn duration(&mut self, key: &Key<Durations>) -> Option<Duration> {
        let text = self.with_unit(key.name)?;
        key.takes.read(&text).map_or_else(|fault| self.fault(key.name, fault), Some)
    }

    /// `true` or `false`.
    pub fn truth(&mut self, key: &Key<Truth>) -> Option<bool> {
        match self.value(key.name)? {
            Value::Boolean(truth) => Some(truth),
            other => self.fault(key.name, format_args!("{other} is not true or false")),
        }
    }

    /// The file, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keys that were asked for, in order.
    #[cfg(test)]
    pub fn asked(&self) -> Vec<&str> {
        self.asked.iter().map(String::as_str).collect()
    }

    /// All faults, unknown keys among them.
    pub fn finish(mut self) -> Vec<String> {
        let mut keys = Vec::new();
        list_keys("", &self.table, &mut keys);
        let unknown = keys.into_iter().filter(|key| !self.asked.contains(key));
        let known = self.asked.iter().cloned().collect::<Vec<_>>().join(", ");
        self.faults.extend(unknown.map(|key| format!("{key}: no such key, there are {known}")));
        let path = self.path.display();
        self.faults.into_iter().map(|fault| format!("{path}: {fault}")).collect()
    }

    fn value(&mut self, key: &str) -> Option<Value> {
        self.asked.insert(key.to_owned());
        let mut parts = key.split('.');
        let mut value = self.table.get(parts.next()?)?;
        for part in parts {
            value = value.as_table()?.get(part)?;
        }
        Some(value.clone())
    }

    /// The text of a duration or a size. A bare number is a text too, which is refused with the form that is right.
    fn with_unit(&mut self, key: &str) -> Option<String> {
        match self.value(key)? {
            Value::String(text) => Some(text),
            other => Some(other.to_string()),
        }
    }

    fn fault<T>(&mut self, key: &str, fault: impl Display) -> Option<T> {
        self.faults.push(format!("{key}: {fault}"));
        None
    }
}

fn list_keys(prefix: &str, table: &Table, keys: &mut Vec<String>) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Table(inner) => list_keys(&key, inner, keys),
            _ => keys.push(key),
        }
    }
}
