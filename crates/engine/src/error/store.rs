//! Why ClickHouse did not do what was asked, and what that means for an insert.

use std::time::Duration;

/// Why ClickHouse did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreFault {
    /// It answered with an exception.
    #[error("code {code}: {text}")]
    Exception {
        /// ClickHouse's error code.
        code: u32,
        /// Its text, shortened.
        text: String,
    },
    /// No answer, a cut connection, or an answer that makes no sense: whether it was done is unknown.
    #[error("{0}")]
    Unclear(String),
    /// No answer in time: whether it was done is unknown.
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
}

/// What to do about a failed insert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Wait and try again, for as long as it takes: the fault is the server's.
    Retry,
    /// The same, but it may have been done: kill it, ask, then try again.
    Unclear,
    /// The bytes themselves are refused, or the table does not have what the INSERT names: trying the same again cannot
    /// help, and must not hold other rows up.
    Reject,
}

/// What stands before the name of a materialized view that an INSERT failed in.
pub(crate) const PUSHING: &str = "while pushing to view ";

/// ClickHouse's code for rows that a constraint of their table refuses.
const VIOLATED_CONSTRAINT: u32 = 469;

impl StoreFault {
    /// The materialized view of the operator's that the INSERT failed in, as the server spells it. Our own rows are stored
    /// by then in most servers; the view, and perhaps others, did not get them.
    pub fn view(&self) -> Option<&str> {
        let Self::Exception { text, .. } = self else { return None };
        let name = text.split_once(PUSHING)?.1;
        let end = [" (", ". (", ": ", ", ", "\n"].iter().filter_map(|end| name.find(end)).min();
        Some(name[..end.unwrap_or(name.len())].trim_end_matches('.'))
    }

    /// The constraint of an operator's that an INSERT violates.
    pub fn constraint(&self) -> Option<&str> {
        let Self::Exception { code: VIOLATED_CONSTRAINT, text } = self else { return None };
        let (name, _) = text.split_once("Constraint `")?.1.split_once("` for table ")?;
        Some(name)
    }

    /// Whether the user lacks the right to do it.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Exception { code: 497 | 164, .. })
    }

    /// Whether a table or a database that was asked is not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Exception { code: 60 | 81, .. })
    }

    /// What to do when this came of an insert.
    ///
    /// Codes: <https://github.com/ClickHouse/ClickHouse/blob/master/src/Common/ErrorCodes.cpp>.
    pub fn class(&self) -> Class {
        match self {
            // Not our bytes, whatever the code is: the rows may be stored, which is asked next.
            fault if fault.view().is_some() => Class::Retry,
            // Parsing of the body: bad data, types or arguments that do not fit, constraints. A type whose name is none (50, 62)
            // is what is read where one block ended early and another follows.
            Self::Exception {
                code: 6 | 26 | 27 | 33 | 38 | 41 | 50 | 53 | 62 | 69 | 70 | 72 | 117 | 131 | 349 | 469 | 691,
                ..
            } => Class::Reject,
            // The table was changed since it was asked about its columns: one is gone, computed, or of another type.
            Self::Exception { code: 8 | 10 | 16 | 20 | 44 | 47 | 122, .. } => Class::Reject,
            // It ran and was stopped, timed out, or lost touch with its own parts: it may have committed.
            Self::Exception { code: 159 | 209 | 210 | 216 | 236 | 319 | 394 | 425 | 999, .. } => {
                Class::Unclear
            }
            Self::Exception { .. } => Class::Retry,
            Self::Unclear(_) | Self::Silent(_) => Class::Unclear,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constraint_is_named() {
        let text = "Constraint `my small` for table e.t (6bc) is violated at row 1. Expression: (a < 3). Column values: a = 9.";
        let fault = |code| StoreFault::Exception { code, text: text.to_owned() };
        assert_eq!((fault(469).constraint(), fault(47).constraint()), (Some("my small"), None));
    }

    #[test]
    fn an_insert_is_rejected_only_for_its_own_bytes_and_columns() {
        let table = [
            (33, Class::Reject),   // CANNOT_READ_ALL_DATA
            (50, Class::Reject),   // UNKNOWN_TYPE
            (62, Class::Reject),   // SYNTAX_ERROR
            (16, Class::Reject),   // NO_SUCH_COLUMN_IN_TABLE
            (44, Class::Reject),   // ILLEGAL_COLUMN: it is computed by now
            (252, Class::Retry),   // TOO_MANY_PARTS
            (243, Class::Retry),   // NOT_ENOUGH_SPACE
            (241, Class::Retry),   // MEMORY_LIMIT_EXCEEDED
            (60, Class::Retry),    // UNKNOWN_TABLE: an operator can bring it back
            (159, Class::Unclear), // TIMEOUT_EXCEEDED
            (216, Class::Unclear), // QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING
        ];
        for (code, class) in table {
            assert_eq!(StoreFault::Exception { code, text: String::new() }.class(), class, "{code}");
        }
        let text = format!("Missing columns: {PUSHING}e.mv (`x`)");
        assert_eq!(StoreFault::Exception { code: 47, text }.class(), Class::Retry, "a view's fault");
        assert_eq!(StoreFault::Silent(Duration::from_secs(1)).class(), Class::Unclear);
    }
}
