//! Which ids of a pass a partial replay computes, as an operator asks for it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::moment::Moment;

/// Which dead letters of a pass are selected: all of them, or those that match every given field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letters {
    /// Only dead letters whose error contains this text.
    pub error: Option<String>,
    /// Only dead letters of this batch.
    pub batch: Option<u32>,
    /// Only dead letters that this host computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Only dead letters that this build computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
}

/// What an operator asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Dead letters.
    Letters(Letters),
    /// Ids whose rows fulfil an SQL condition.
    Where(String),
    /// Batches by number.
    Batches {
        /// The first.
        first: u32,
        /// The one after the last.
        end: u32,
    },
    /// Batches by their publishing time.
    Published {
        /// At this moment or later.
        since: Option<Moment>,
        /// Before this moment.
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
