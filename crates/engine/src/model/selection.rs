//! Which ids of a pass another one computes again, as an operator asks for it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::moment::Moment;

/// Which of a pass's dead letters are meant: all of them, or those that fit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letters {
    /// Only those whose error holds this text.
    pub error: Option<String>,
    /// Only those of this batch.
    pub batch: Option<u32>,
    /// Only those that this host computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Only those that this build computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
}

/// What a person asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Dead letters.
    Letters(Letters),
    /// Ids whose rows fulfil a condition in SQL.
    Where(String),
    /// Batches by number.
    Batches {
        /// The first.
        first: u32,
        /// The one after the last.
        end: u32,
    },
    /// Batches by when they were published.
    Published {
        /// Then or later.
        since: Option<Moment>,
        /// Before then.
        until: Option<Moment>,
    },
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Letters(_) => f.write_str("dead letters"),
            Self::Where(condition) => write!(f, "ids where `{condition}`"),
            Self::Batches { first, end } => write!(f, "batches {first}..{end}"),
            Self::Published { since, until } => {
                f.write_str("batches published")?;
                since.iter().try_for_each(|moment| write!(f, " since {}", moment.words))?;
                until.iter().try_for_each(|moment| write!(f, " until {}", moment.words))
            }
        }
    }
}
