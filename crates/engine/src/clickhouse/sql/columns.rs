//! Columns as the server lists them, and whether one type holds every value of another.
//!
//! Types are compared in the server's own spelling, so the server is asked for it: `Decimal(18)` is
//! `Decimal(18, 0)` here.

/// A column as the server lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// The name of the column.
    pub name: String,
    /// The type of the column, as ClickHouse spells it.
    pub kind: String,
    /// `DEFAULT`, `MATERIALIZED`, `ALIAS`, `EPHEMERAL`, or empty.
    pub default_kind: String,
}

impl Column {
    /// A column that stores what is inserted.
    pub fn plain(name: &str, kind: &str) -> Self {
        Self { name: name.to_owned(), kind: kind.to_owned(), default_kind: String::new() }
    }

    /// Whether an INSERT may name the column and its values are stored.
    pub fn is_insertable(&self) -> bool {
        self.default_kind.is_empty() || self.default_kind == "DEFAULT"
    }

    /// Whether a SELECT may name the column.
    pub fn is_readable(&self) -> bool {
        self.default_kind != "EPHEMERAL"
    }
}

/// Whether a column of type `theirs` stores every value of type `ours` unchanged.
pub fn holds(theirs: &str, ours: &str) -> bool {
    theirs == ours || wider(bare(theirs), bare(ours))
}

/// A type without wrappers that change only how it is stored.
fn bare(kind: &str) -> &str {
    match Type::of(kind) {
        Type { name: "LowCardinality", arguments } if arguments.len() == 1 => bare(arguments[0]),
        Type { name: "SimpleAggregateFunction", arguments } if arguments.len() == 2 => bare(arguments[1]),
        _ => kind.trim(),
    }
}

fn wider(theirs: &str, ours: &str) -> bool {
    let to = Type::of(theirs);
    let from = Type::of(ours);
    match (to.name, from.name) {
        _ if theirs == ours => true,
        ("Nullable", "Nullable") => holds(to.only(), from.only()),
        ("Nullable", _) => holds(to.only(), ours),
        ("Array", "Array") => holds(to.only(), from.only()),
        ("Map", "Map") => each_holds(&to.arguments, &from.arguments),
        ("Tuple", "Tuple") => tuple_holds(&to, &from),
        ("String", "FixedString" | "Enum8" | "Enum16") => true,
        ("Enum8" | "Enum16", "Enum8" | "Enum16") => {
            from.arguments.iter().all(|value| to.arguments.contains(value))
        }
        ("Decimal", "Decimal") => decimal_holds(&to, &from),
        ("Date32", "Date") | ("DateTime", "DateTime") | ("DateTime64", "DateTime") | ("IPv6", "IPv4") => true,
        ("DateTime64", "DateTime64") => to.number(0) >= from.number(0),
        _ => number_holds(to.name, from.name),
    }
}

fn each_holds(theirs: &[&str], ours: &[&str]) -> bool {
    theirs.len() == ours.len() && theirs.iter().zip(ours).all(|(theirs, ours)| holds(theirs, ours))
}

/// Whether one tuple holds another. Elements are matched by position, and their names must agree if both have
/// names.
fn tuple_holds(to: &Type<'_>, from: &Type<'_>) -> bool {
    let [theirs, ours] =
        [to, from].map(|tuple| tuple.arguments.iter().map(|part| element(part)).collect::<Vec<_>>());
    theirs.len() == ours.len()
        && theirs
            .iter()
            .zip(&ours)
            .all(|((name, theirs), (other, ours))| name == other && holds(theirs, ours))
}

/// A tuple's element: its name, if it has one, and its type.
fn element(text: &str) -> (Option<&str>, &str) {
    let name_end = match text.strip_prefix('`').and_then(|rest| rest.find('`')) {
        Some(end) => Some(end + 2),
        None => text.find(|symbol: char| !symbol.is_alphanumeric() && symbol != '_'),
    };
    match name_end.map(|end| text.split_at(end)) {
        Some((name, kind)) if kind.starts_with(' ') => (Some(name), kind.trim()),
        _ => (None, text),
    }
}

/// Whether one decimal holds another: no fewer digits before the point, and no fewer after it.
fn decimal_holds(to: &Type<'_>, from: &Type<'_>) -> bool {
    match (to.number(0), to.number(1), from.number(0), from.number(1)) {
        (Some(precision), Some(scale), Some(of), Some(after)) => {
            scale >= after && precision.saturating_sub(scale) >= of.saturating_sub(after)
        }
        _ => false,
    }
}

/// Compares whole numbers, floating point and Bool by their bits.
fn number_holds(theirs: &str, ours: &str) -> bool {
    let whole = |name: &str| {
        let (signed, bits) = match name.strip_prefix("UInt") {
            Some(bits) => (false, bits),
            None => (true, name.strip_prefix("Int")?),
        };
        bits.parse::<u32>().ok().map(|bits| (signed, bits))
    };
    // The bits of a whole number that a floating point type holds exactly.
    let exact = |name: &str| match name {
        "Float32" => Some(24),
        "Float64" => Some(53),
        _ => None,
    };
    match (whole(theirs), whole(ours)) {
        (Some((signed, bits)), Some((was_signed, was))) if signed == was_signed => bits >= was,
        (Some((signed, bits)), Some((_, was))) => signed && bits > was,
        (Some(_), None) => ours == "Bool",
        (None, Some((_, was))) => exact(theirs).is_some_and(|bits| bits >= was),
        (None, None) => {
            matches!((theirs, ours), ("Float64", "Float32") | ("Float32" | "Float64", "BFloat16"))
        }
    }
}

/// A type's name, and the arguments in its brackets.
struct Type<'a> {
    name: &'a str,
    arguments: Vec<&'a str>,
}

impl<'a> Type<'a> {
    fn of(text: &'a str) -> Self {
        let text = text.trim();
        match text.split_once('(').and_then(|(name, rest)| Some((name, rest.strip_suffix(')')?))) {
            Some((name, arguments)) => Self { name: name.trim(), arguments: split(arguments) },
            None => Self { name: text, arguments: Vec::new() },
        }
    }

    /// The single argument of a type.
    fn only(&self) -> &'a str {
        self.arguments.first().copied().unwrap_or_default()
    }

    fn number(&self, place: usize) -> Option<u32> {
        self.arguments.get(place)?.parse().ok()
    }
}

/// Splits at the commas outside of brackets and quotes.
fn split(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut begin = 0;
    let mut depth = 0;
    let mut quote = None;
    let mut escaped = false;
    for (at, symbol) in text.char_indices() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if symbol == '\\' => escaped = true,
            Some(open) if symbol == open => quote = None,
            Some(_) => {}
            None => match symbol {
                '\'' | '`' => quote = Some(symbol),
                '(' => depth += 1,
                ')' => depth -= 1,
                ',' if depth == 0 => {
                    parts.push(text[begin..at].trim());
                    begin = at + 1;
                }
                _ => {}
            },
        }
    }
    let last = text[begin..].trim();
    parts.extend((!last.is_empty()).then_some(last));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_holds_another_when_no_value_changes() {
        let table = [
            ("UInt64", "UInt32", true),
            ("UInt32", "UInt64", false),
            ("Int64", "UInt32", true),
            ("Int32", "UInt32", false),
            ("UInt64", "Int32", false),
            ("UInt8", "Bool", true),
            ("UInt256", "UInt128", true),
            ("Float64", "Float32", true),
            ("Float64", "UInt32", true),
            ("Float32", "UInt32", false),
            ("Float64", "UInt64", false),
            ("Float32", "Float64", false),
            ("Nullable(UInt64)", "UInt32", true),
            ("UInt32", "Nullable(UInt32)", false),
            ("String", "LowCardinality(String)", true),
            ("LowCardinality(Nullable(String))", "String", true),
            ("String", "LowCardinality(Nullable(String))", false),
            ("String", "FixedString(4)", true),
            ("FixedString(4)", "String", false),
            ("Enum8('a' = 1, 'b' = 2, 'c, d' = 3)", "Enum8('a' = 1, 'c, d' = 3)", true),
            ("Enum16('a' = 1, 'b' = 2)", "Enum8('a' = 1)", true),
            ("Enum8('a' = 2)", "Enum8('a' = 1)", false),
            ("Decimal(38, 2)", "Decimal(18, 2)", true),
            ("Decimal(38, 4)", "Decimal(18, 2)", true),
            ("Decimal(18, 4)", "Decimal(18, 2)", false),
            ("Decimal(9, 2)", "Decimal(18, 2)", false),
            ("DateTime64(6, 'UTC')", "DateTime64(3)", true),
            ("DateTime64(3)", "DateTime64(6)", false),
            ("DateTime('UTC')", "DateTime", true),
            ("DateTime64(3)", "DateTime('Europe/Berlin')", true),
            ("DateTime", "DateTime64(0)", false),
            ("Date32", "Date", true),
            ("Array(UInt64)", "Array(UInt32)", true),
            ("Array(UInt32)", "UInt32", false),
            ("Map(String, UInt64)", "Map(LowCardinality(String), UInt32)", true),
            ("Tuple(a UInt64, `b c` String)", "Tuple(a UInt32, `b c` String)", true),
            ("Tuple(b UInt32, a UInt32)", "Tuple(a UInt32, b UInt32)", false),
            ("Tuple(UInt32, Array(UInt8))", "Tuple(UInt32)", false),
            ("SimpleAggregateFunction(max, UInt64)", "UInt32", true),
            ("UUID", "UInt128", false),
        ];
        for (theirs, ours, expected) in table {
            assert_eq!(holds(theirs, ours), expected, "{theirs} holds {ours}");
        }
    }
}
