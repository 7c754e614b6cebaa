//! Environments of one pipeline, such as staging and production (**environments-do-not-meet**).
//!
//! A stream, consumer, bucket or table belongs to one environment. Both servers record which: NATS in the
//! metadata of the streams, ClickHouse in the comments of the tables. A process of another environment is
//! refused before it changes anything.

use std::collections::HashMap;
use std::fmt;

use millstream::names::{NameFault, Namespace};

use crate::error::Error;

const NAMESPACE: &str = "millstream.namespace";
const DATABASE: &str = "millstream.database";
const COMMENT: &str = "Millstream, namespace: ";

/// The environment of a process: its namespace in NATS and its database in ClickHouse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// The prefix of every NATS name in this environment, if it has one.
    pub namespace: Option<Namespace>,
    /// The ClickHouse database that holds this environment's tables.
    pub database: String,
}

impl Environment {
    /// An environment without a namespace.
    pub fn plain(database: &str) -> Self {
        Self { namespace: None, database: database.to_owned() }
    }

    /// The namespace as text; empty when there is none.
    pub(crate) fn namespace(&self) -> &str {
        self.namespace.as_ref().map_or("", Namespace::as_str)
    }

    /// The stream metadata that names this environment.
    pub(crate) fn metadata(&self) -> HashMap<String, String> {
        [(NAMESPACE, self.namespace()), (DATABASE, &self.database)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }

    /// Whether a stream's metadata names an environment; if so, Millstream made the stream.
    pub(crate) fn is_marked(metadata: &HashMap<String, String>) -> bool {
        metadata.contains_key(DATABASE)
    }

    /// Refuses a stream of another environment. A stream whose metadata names none was made by hand and is
    /// accepted.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`].
    pub(crate) fn check_stream(&self, name: &str, metadata: &HashMap<String, String>) -> Result<(), Error> {
        let Some(database) = metadata.get(DATABASE) else { return Ok(()) };
        let namespace = metadata.get(NAMESPACE).map_or("", String::as_str);
        self.check(&format!("stream `{name}`"), namespace, database)
    }

    /// The table comment that names this environment.
    pub(crate) fn comment(&self) -> String {
        format!("{COMMENT}{}", self.namespace())
    }

    /// Whether a table's comment names an environment; if so, Millstream made the table.
    pub(crate) fn is_told(&self, comment: &str) -> bool {
        comment.starts_with(COMMENT)
    }

    /// Refuses a table of another environment, by its comment. A table whose comment names none is accepted.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`].
    pub(crate) fn check_table(&self, name: &str, comment: &str) -> Result<(), Error> {
        match comment.strip_prefix(COMMENT) {
            Some(namespace) => self.check(&format!("table {name}"), namespace, &self.database),
            None => Ok(()),
        }
    }

    /// Refuses a stream or table of another environment.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`].
    pub(crate) fn check(&self, what: &str, namespace: &str, database: &str) -> Result<(), Error> {
        if (namespace, database) == (self.namespace(), &*self.database) {
            return Ok(());
        }
        let theirs = describe(namespace, database);
        Err(Error::OtherEnvironment { what: what.to_owned(), theirs, ours: self.to_string() })
    }

    /// The default database of a namespace, when the user names no database.
    pub fn usual_database(namespace: Option<&Namespace>) -> String {
        match namespace {
            Some(namespace) => format!("millstream_{}", namespace.as_str()),
            None => "millstream".to_owned(),
        }
    }

    /// Parses a namespace as the user typed it; `None` for an empty text.
    ///
    /// # Errors
    /// [`NameFault::Namespace`].
    pub fn parse_namespace(text: &str) -> Result<Option<Namespace>, NameFault> {
        if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&describe(self.namespace(), &self.database))
    }
}

fn describe(namespace: &str, database: &str) -> String {
    match namespace {
        "" => format!("database `{database}` without a namespace"),
        _ => format!("database `{database}` in namespace `{namespace}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_another_environment_are_refused_with_both_names() {
        let staging =
            Environment { namespace: Some("staging".parse().expect("legal")), database: "s".into() };
        let production = Environment::plain("millstream");
        assert!(staging.check_stream("a_ids", &staging.metadata()).is_ok());
        assert!(staging.check_stream("a_ids", &HashMap::new()).is_ok(), "made by hand");
        let other = Environment::plain("other").metadata();
        for (ours, theirs) in
            [(&staging, &production.metadata()), (&production, &staging.metadata()), (&production, &other)]
        {
            let Err(Error::OtherEnvironment { what, .. }) = ours.check_stream("a_ids", theirs) else {
                panic!("{ours} takes {theirs:?}")
            };
            assert_eq!(what, "stream `a_ids`");
        }
        assert!(staging.check_table("t", &staging.comment()).is_ok());
        assert!(staging.check_table("t", "the team's own words").is_ok());
        assert!(staging.check_table("t", &production.comment()).is_err());
    }
}
