//! `millstream.toml`: typed values by dotted key, with every fault collected and every unknown key noticed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

/// A configuration file that is being read. Keys that nobody asked for are faults in the end.
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
    pub fn text(&mut self, key: &str) -> Option<String> {
        match self.value(key)? {
            Value::String(text) => Some(text),
            other => self.fault(key, &other, "a text in quotes"),
        }
    }

    /// A whole number within limits, both included.
    pub fn number(&mut self, key: &str, least: u64, most: u64) -> Option<u64> {
        match self.value(key)? {
            Value::Integer(number) => self.within(key, number.try_into().ok(), number, least, most),
            other => self.fault(key, &other, "a whole number"),
        }
    }

    /// A size: a number of bytes, or a text like `"16GiB"`.
    pub fn bytes(&mut self, key: &str, least: u64, most: u64) -> Option<u64> {
        let value = self.value(key)?;
        let bytes = match &value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            Value::String(text) => parse_size(text),
            _ => None,
        };
        match bytes {
            Some(bytes) => self.within(key, Some(bytes), bytes, least, most),
            None => self.fault(key, &value, "a size such as 1073741824 or \"16GiB\""),
        }
    }

    /// `true` or `false`.
    pub fn truth(&mut self, key: &str) -> Option<bool> {
        match self.value(key)? {
            Value::Boolean(truth) => Some(truth),
            other => self.fault(key, &other, "true or false"),
        }
    }

    /// A number of seconds within limits.
    pub fn seconds(&mut self, key: &str, least: u64, most: u64) -> Option<Duration> {
        self.number(key, least, most).map(Duration::from_secs)
    }

    /// Notes a fault that lies in more than one value, or in the gap between two.
    pub fn refuse(&mut self, fault: &str) {
        self.faults.push(fault.to_owned());
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

    fn within(
        &mut self,
        key: &str,
        number: Option<u64>,
        shown: impl std::fmt::Display,
        least: u64,
        most: u64,
    ) -> Option<u64> {
        let found = number.filter(|number| (least..=most).contains(number));
        if found.is_none() {
            self.faults.push(format!("{key}: {shown} is outside {least}..={most}"));
        }
        found
    }

    fn fault<T>(&mut self, key: &str, value: &Value, wanted: &str) -> Option<T> {
        self.faults.push(format!("{key}: {value} is not {wanted}"));
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

fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|symbol: char| !symbol.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[split..].trim() {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1u64 << 40,
        _ => return None,
    };
    text[..split].parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let table = [
            ("12", Some(12)),
            ("16GiB", Some(16 << 30)),
            ("5 MB", Some(5_000_000)),
            ("x", None),
            ("1 PB", None),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }
}
