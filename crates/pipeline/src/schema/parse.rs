//! Parses types as ClickHouse spells them, and refuses those that rows cannot be written to, with a reason.

use super::kind::{ColumnType, EnumType, Int, Part};

/// The deepest nesting of a type, because the text comes from other processes too.
const MAX_DEPTH: usize = 16;

/// The longest `FixedString`: ClickHouse refuses longer ones unless a setting allows them.
const MAX_FIXED_STRING: usize = 256;

const MAX_PRECISION: u8 = 76;

/// Why rows cannot be written to a type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeFault {
    /// There is no such type.
    #[error("`{name}` is not a column type that rows can be written to{}", similar(.name))]
    Unknown {
        /// The name, as it was spelled.
        name: String,
    },
    /// ClickHouse has the type, but Millstream does not support it.
    #[error("`{name}` is not supported: use {instead}")]
    Unsupported {
        /// The name of the type.
        name: String,
        /// The type to use instead.
        instead: &'static str,
    },
    /// The text is not the syntax of a type.
    #[error("`{text}` is not a type: {expected} is missing")]
    Syntax {
        /// The rest of the text, shortened.
        text: String,
        /// What was expected there.
        expected: &'static str,
    },
    /// ClickHouse refuses to create a column of the type.
    #[error("`{text}` is refused by ClickHouse: {reason}")]
    Refused {
        /// The text of the type.
        text: String,
        /// The reason.
        reason: String,
    },
}

/// A suggestion for a type name with wrong capitals, because type names are case-sensitive.
fn similar(name: &str) -> String {
    let known = ["String", "Float32", "Float64", "FixedString", "Array", "Tuple", "Map", "Nullable"];
    let also = ["LowCardinality", "UUID", "IPv4", "IPv6", "DateTime", "Enum8", "Enum16", "Nested"];
    let ints = ["UInt8", "UInt16", "UInt32", "UInt64", "Int8", "Int16", "Int32", "Int64"];
    let all = known.iter().chain(&also).chain(&ints);
    let found = all.into_iter().find(|known| known.eq_ignore_ascii_case(name));
    found.map_or_else(String::new, |known| format!(" (`{known}` is)"))
}

/// ClickHouse types that rows cannot be written to, with the type to use instead.
const UNSUPPORTED: [(&str, &str); 24] = [
    ("JSON", "String, and JSONExtract or a cast to JSON when reading"),
    ("Object", "String, and JSONExtract when reading"),
    ("Variant", "a Nullable column for each type"),
    ("Dynamic", "String, or a Nullable column for each type"),
    ("Time", "Int32 with the seconds"),
    ("Time64", "Int64 with the ticks"),
    ("Point", "Tuple(Float64, Float64)"),
    ("Ring", "Array(Tuple(Float64, Float64))"),
    ("LineString", "Array(Tuple(Float64, Float64))"),
    ("Polygon", "Array(Array(Tuple(Float64, Float64)))"),
    ("MultiLineString", "Array(Array(Tuple(Float64, Float64)))"),
    ("MultiPolygon", "Array(Array(Array(Tuple(Float64, Float64))))"),
    ("Geometry", "String with the text form of the shape"),
    ("AggregateFunction", "the value itself, and a materialized view that aggregates"),
    ("SimpleAggregateFunction", "the value itself, and a materialized view that aggregates"),
    ("BFloat16", "Float32"),
    ("QBit", "Array(Float32)"),
    ("Nothing", "another type: it holds no value"),
    ("IntervalSecond", "Int64"),
    ("IntervalMinute", "Int64"),
    ("IntervalHour", "Int64"),
    ("IntervalDay", "Int64"),
    ("IntervalWeek", "Int64"),
    ("IntervalMonth", "Int64"),
];

impl ColumnType {
    /// Parses a type as ClickHouse spells it.
    ///
    /// # Errors
    /// [`TypeFault`] that names the wrong part, and why.
    pub fn parse(text: &str) -> Result<Self, TypeFault> {
        let mut parser = Parser::new(text);
        let kind = parser.kind(0)?;
        match parser.rest() {
            "" => Ok(kind),
            _ => Err(parser.syntax("the end")),
        }
    }
}

/// A position in the text.
pub(super) struct Parser<'a> {
    text: &'a str,
}

impl<'a> Parser<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text: text.trim() }
    }

    pub(super) fn rest(&self) -> &'a str {
        self.text
    }

    pub(super) fn syntax(&self, expected: &'static str) -> TypeFault {
        TypeFault::Syntax { text: self.text.chars().take(80).collect(), expected }
    }

    /// Skips `symbol` and the blanks after it, if it comes next.
    pub(super) fn take(&mut self, symbol: char) -> bool {
        match self.text.strip_prefix(symbol) {
            Some(rest) => {
                self.text = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, symbol: char, expected: &'static str) -> Result<(), TypeFault> {
        if self.take(symbol) { Ok(()) } else { Err(self.syntax(expected)) }
    }

    fn word(&mut self) -> &'a str {
        let end = self.text.find(|symbol: char| !symbol.is_ascii_alphanumeric() && symbol != '_');
        let (word, rest) = self.text.split_at(end.unwrap_or(self.text.len()));
        self.text = rest.trim_start();
        word
    }

    /// Whether a name and a type follow, rather than a type.
    fn at_name(&self) -> bool {
        let mut ahead = Self { text: self.text };
        ahead.take('`')
            || (!ahead.word().is_empty()
                && !ahead.text.starts_with(['(', ',', ')'])
                && !ahead.text.is_empty())
    }

    /// Parses a name, with or without backticks.
    pub(super) fn name(&mut self) -> Result<&'a str, TypeFault> {
        let quoted = self.text.starts_with('`');
        let name = if quoted {
            let (name, rest) =
                self.text[1..].split_once('`').ok_or_else(|| self.syntax("a closing backtick"))?;
            self.text = rest.trim_start();
            name
        } else {
            self.word()
        };
        if name.is_empty() { Err(self.syntax("a name")) } else { Ok(name) }
    }

    pub(super) fn kind(&mut self, depth: usize) -> Result<ColumnType, TypeFault> {
        let start = self.text;
        if depth > MAX_DEPTH {
            return Err(refused(start, format!("it is nested more than {MAX_DEPTH} deep")));
        }
        let name = self.word();
        if name.is_empty() {
            return Err(self.syntax("a type"));
        }
        let kind = self.named(name, depth)?;
        let spelled = start[..start.len() - self.text.len()].trim_end();
        allowed(&kind, spelled)?;
        Ok(kind)
    }

    fn named(&mut self, name: &'a str, depth: usize) -> Result<ColumnType, TypeFault> {
        if let Some(int) = Int::named(name) {
            return Ok(ColumnType::Int(int));
        }
        Ok(match name {
            "Bool" => ColumnType::Bool,
            "Float32" => ColumnType::Float32,
            "Float64" => ColumnType::Float64,
            "Date" => ColumnType::Date,
            "Date32" => ColumnType::Date32,
            "UUID" => ColumnType::Uuid,
            "IPv4" => ColumnType::Ipv4,
            "IPv6" => ColumnType::Ipv6,
            "String" => ColumnType::String,
            "Decimal" | "Decimal32" | "Decimal64" | "Decimal128" | "Decimal256" => self.decimal(name)?,
            "DateTime" => ColumnType::DateTime(self.zone()?),
            "DateTime64" => self.datetime64()?,
            "Enum" | "Enum8" | "Enum16" => ColumnType::Enum(self.values(name)?),
            "FixedString" => ColumnType::FixedString(self.only(|parser| parser.number("a length"))?),
            "Array" => ColumnType::Array(self.inner(depth)?),
            "Nullable" => ColumnType::Nullable(self.inner(depth)?),
            "LowCardinality" => ColumnType::LowCardinality(self.inner(depth)?),
            "Tuple" => ColumnType::Tuple(self.parts(depth)?),
            // ClickHouse turns a `Nested` inside of another type into this.
            "Nested" => ColumnType::Array(Box::new(ColumnType::Tuple(self.nested(depth)?))),
            "Map" => self.map(depth)?,
            _ => return Err(unknown(name)),
        })
    }

    /// Parses the parts of a `Nested(..)`, after its name.
    pub(super) fn nested(&mut self, depth: usize) -> Result<Vec<Part>, TypeFault> {
        let start = self.text;
        let parts = self.parts(depth)?;
        if parts.iter().any(|part| part.name.is_empty()) {
            return Err(refused(&format!("Nested{start}"), "each of its columns needs a name".to_owned()));
        }
        Ok(parts)
    }

    fn only<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, TypeFault>) -> Result<T, TypeFault> {
        self.expect('(', "`(`")?;
        let value = read(self)?;
        self.expect(')', "`)`")?;
        Ok(value)
    }

    fn inner(&mut self, depth: usize) -> Result<Box<ColumnType>, TypeFault> {
        self.only(|parser| parser.kind(depth + 1)).map(Box::new)
    }

    fn number<N: std::str::FromStr>(&mut self, expected: &'static str) -> Result<N, TypeFault> {
        let at = self.syntax(expected);
        let sign = if self.take('-') { "-" } else { "" };
        format!("{sign}{}", self.word()).parse().map_err(|_| at)
    }

    fn quoted(&mut self, expected: &'static str) -> Result<String, TypeFault> {
        let at = self.syntax(expected);
        let mut symbols = self.text.strip_prefix('\'').ok_or_else(|| at.clone())?.chars();
        let mut value = String::new();
        loop {
            match symbols.next().ok_or_else(|| at.clone())? {
                '\'' if symbols.as_str().starts_with('\'') => {
                    value.push('\'');
                    symbols.next();
                }
                '\'' => break,
                '\\' => value.push(symbols.next().and_then(unescaped).ok_or_else(|| at.clone())?),
                plain => value.push(plain),
            }
        }
        self.text = symbols.as_str().trim_start();
        Ok(value)
    }

    /// Parses the time zone of a `DateTime`; its parentheses may be missing.
    fn zone(&mut self) -> Result<Option<String>, TypeFault> {
        if !self.take('(') {
            return Ok(None);
        }
        let zone =
            if self.text.starts_with(')') { None } else { Some(self.quoted("a time zone in quotes")?) };
        self.expect(')', "`)`")?;
        Ok(zone)
    }

    fn datetime64(&mut self) -> Result<ColumnType, TypeFault> {
        let start = self.text;
        if !self.take('(') {
            return Ok(ColumnType::DateTime64(3, None));
        }
        let digits: u8 = self.number("the number of decimal places of the second")?;
        let zone = if self.take(',') { Some(self.quoted("a time zone in quotes")?) } else { None };
        self.expect(')', "`)`")?;
        if digits > 9 {
            let reason = "a second has at most 9 digits after the point".to_owned();
            return Err(refused(&format!("DateTime64{}", spelled(start, self.text)), reason));
        }
        Ok(ColumnType::DateTime64(digits, zone))
    }

    fn decimal(&mut self, name: &'a str) -> Result<ColumnType, TypeFault> {
        let start = self.text;
        let fixed = match name {
            "Decimal32" => Some(9),
            "Decimal64" => Some(18),
            "Decimal128" => Some(38),
            "Decimal256" => Some(MAX_PRECISION),
            _ => None,
        };
        let (precision, scale) = match fixed {
            Some(precision) => (precision, self.only(|parser| parser.number("a scale"))?),
            None if !self.take('(') => (10, 0), // the server's defaults
            None => {
                let precision = self.number("a precision")?;
                let scale = if self.take(',') { self.number("a scale")? } else { 0 };
                self.expect(')', "`)`")?;
                (precision, scale)
            }
        };
        let fault = |reason| Err(refused(&format!("{name}{}", spelled(start, self.text)), reason));
        match () {
            () if !(1..=MAX_PRECISION).contains(&precision) => {
                fault(format!("a precision is 1 to {MAX_PRECISION}"))
            }
            () if scale > precision => fault("the scale is larger than the precision".to_owned()),
            () => Ok(ColumnType::Decimal { precision, scale }),
        }
    }

    /// Parses `'a' = 1, 'b'`: a value without a number has the number after the previous one.
    fn values(&mut self, name: &'a str) -> Result<EnumType, TypeFault> {
        let start = self.text;
        self.expect('(', "`(`")?;
        let mut values: Vec<(String, i64)> = Vec::new();
        while !self.text.starts_with(')') {
            let value = self.quoted("a value in quotes")?;
            let next = values.last().map_or(1, |(_, number)| number + 1);
            let number = if self.take('=') { i64::from(self.number::<i32>("a number")?) } else { next };
            values.push((value, number));
            if !self.take(',') {
                break;
            }
        }
        self.expect(')', "`)`")?;
        enum_type(name, values)
            .map_err(|reason| refused(&format!("{name}{}", spelled(start, self.text)), reason))
    }

    fn parts(&mut self, depth: usize) -> Result<Vec<Part>, TypeFault> {
        let start = self.text;
        self.expect('(', "`(`")?;
        let mut parts: Vec<Part> = Vec::new();
        while !self.text.starts_with(')') {
            let name = if self.at_name() { self.name()?.to_owned() } else { String::new() };
            parts.push(Part { name, kind: self.kind(depth + 1)? });
            if !self.take(',') {
                break;
            }
        }
        self.expect(')', "`)`")?;
        sound_parts(&parts)
            .map_err(|reason| refused(&format!("Tuple{}", spelled(start, self.text)), reason))?;
        Ok(parts)
    }

    fn map(&mut self, depth: usize) -> Result<ColumnType, TypeFault> {
        self.expect('(', "`(`")?;
        let key = self.kind(depth + 1)?;
        self.expect(',', "`,`")?;
        let value = self.kind(depth + 1)?;
        self.expect(')', "`)`")?;
        Ok(ColumnType::Map(Box::new((key, value))))
    }
}

fn spelled<'a>(start: &'a str, rest: &str) -> &'a str {
    start[..start.len() - rest.len()].trim_end()
}

/// The character of an escape; `None` for escapes that ClickHouse treats in a special way.
fn unescaped(symbol: char) -> Option<char> {
    Some(match symbol {
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        '0' => '\0',
        'b' => '\x08',
        'f' => '\x0C',
        '\'' | '"' | '`' | '\\' | '/' => symbol,
        _ => return None,
    })
}

fn unknown(name: &str) -> TypeFault {
    match UNSUPPORTED.iter().find(|(known, _)| *known == name) {
        Some((_, instead)) => TypeFault::Unsupported { name: name.to_owned(), instead },
        None => TypeFault::Unknown { name: name.to_owned() },
    }
}

fn refused(text: &str, reason: String) -> TypeFault {
    TypeFault::Refused { text: text.chars().take(200).collect(), reason }
}

fn enum_type(name: &str, mut values: Vec<(String, i64)>) -> Result<EnumType, String> {
    let narrow = values.iter().all(|(_, number)| i8::try_from(*number).is_ok());
    let wide = name == "Enum16" || (name == "Enum" && !narrow);
    values.sort_by_key(|(_, number)| *number);
    if let Some(pair) = values.windows(2).find(|pair| pair[0].1 == pair[1].1) {
        return Err(format!("`{}` and `{}` have the same number {}", pair[0].0, pair[1].0, pair[0].1));
    }
    let mut names: Vec<&str> = values.iter().map(|(name, _)| &name[..]).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("`{}` is there twice", pair[0]));
    }
    if values.is_empty() {
        return Err("an Enum needs a value".to_owned());
    }
    let range = if wide { i64::from(i16::MIN)..=i64::from(i16::MAX) } else { -128..=127 };
    let number = |(name, number): (String, i64)| match i16::try_from(number) {
        Ok(fits) if range.contains(&number) => Ok((name, fits)),
        _ => Err(format!("{number} is outside of {} to {}", range.start(), range.end())),
    };
    Ok(EnumType { wide, values: values.into_iter().map(number).collect::<Result<_, _>>()? })
}

fn sound_parts(parts: &[Part]) -> Result<(), String> {
    let named = parts.iter().filter(|part| !part.name.is_empty()).count();
    if parts.is_empty() {
        return Err("a Tuple without parts holds no value".to_owned());
    }
    if named != 0 && named != parts.len() {
        return Err("either all parts have names or none has".to_owned());
    }
    if let Some(part) = parts.iter().find(|part| !part.name.is_empty() && !is_part_name(&part.name)) {
        return Err(format!(
            "the name `{}` is not one of A-Z a-z 0-9 _, not beginning with a digit",
            part.name
        ));
    }
    for (index, part) in parts.iter().enumerate() {
        if named != 0 && parts[..index].iter().any(|before| before.name == part.name) {
            return Err(format!("the name `{}` is there twice", part.name));
        }
    }
    Ok(())
}

fn is_part_name(name: &str) -> bool {
    super::is_column_name(name)
}

/// Checks which types may contain which, as the server does when it creates a table with default settings.
fn allowed(kind: &ColumnType, text: &str) -> Result<(), TypeFault> {
    let fault = |reason: &str| Err(refused(text, reason.to_owned()));
    match kind {
        ColumnType::FixedString(0) => fault("its length is 1 or more"),
        ColumnType::FixedString(length) if *length > MAX_FIXED_STRING => {
            fault("a FixedString longer than 256 bytes needs a setting; use String")
        }
        ColumnType::Nullable(inner) => match **inner {
            ColumnType::Array(_) | ColumnType::Map(_) | ColumnType::Tuple(_) => fault(
                "Array, Map and Tuple cannot be Nullable: an empty one stands for none, or make the parts Nullable",
            ),
            ColumnType::Nullable(_) => fault("Nullable cannot contain Nullable"),
            ColumnType::LowCardinality(_) => fault("write LowCardinality(Nullable(..))"),
            _ => Ok(()),
        },
        ColumnType::LowCardinality(inner) => {
            let held = if let ColumnType::Nullable(held) = &**inner { held } else { inner };
            match **held {
                ColumnType::String | ColumnType::FixedString(_) | ColumnType::Uuid => Ok(()),
                _ => fault("LowCardinality is for String, FixedString and UUID; leave it away"),
            }
        }
        ColumnType::Map(pair) => match pair.0.plain() {
            ColumnType::Nullable(_) => fault("the key of a Map cannot be Nullable"),
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}
