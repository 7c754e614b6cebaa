//! One pipeline as several builds have it: the same name, other columns, rows or functions. The variable `VARIANT` says
//! which build a process is.

use std::process::ExitCode;

use millstream::{Outcome, Pipeline};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

/// Which build a process is.
pub const VARIABLE: &str = "VARIANT";

/// Defines a build: its columns, its row type, and what it computes of an id.
macro_rules! build {
    ($name:ident, $version:literal, $row:ty, $columns:expr, $compute:expr) => {
        struct $name;
        impl Pipeline for $name {
            const NAME: &'static str = "variant";
            const VERSION: &'static str = $version;
            const COLUMNS: &'static [(&'static str, &'static str)] = $columns;
            type Id = u64;
            type Row = $row;
            fn compute(&self, id: &u64) -> Outcome<$row> {
                crate::spin(crate::micros("TRIAL_MICROS"));
                let compute: fn(u64) -> $row = $compute;
                Ok(compute(*id))
            }
        }
    };
}

/// The command line of the build that the environment names.
pub fn main() -> ExitCode {
    match std::env::var(VARIABLE).unwrap_or_default().as_str() {
        "hilo" => millstream_cli::main(HiLo),
        "extra" => millstream_cli::main(Extra),
        "renamed" => millstream_cli::main(Renamed),
        "large" => millstream_cli::main(Large),
        "kinds" => millstream_cli::main(Kinds),
        "places" => millstream_cli::main(Places),
        "skips" => millstream_cli::main(Skips),
        "flat" => millstream_cli::main(Flat),
        "nullable" => millstream_cli::main(Nullable),
        "zeroless" => millstream_cli::main(Zeroless),
        "unsummed" => millstream_cli::main(Unsummed),
        "lies" => millstream_cli::main(Lies),
        _ => millstream_cli::main(LoHi),
    }
}

#[derive(Serialize, Deserialize)]
struct Bounds {
    lo: u64,
    hi: u64,
}

build!(LoHi, "1", Bounds, &[("lo", "UInt64"), ("hi", "UInt64")], |id| Bounds { lo: id, hi: id + 1000 });
// A later build whose author has put the columns and the fields in another order.
#[derive(Serialize, Deserialize)]
struct Turned {
    hi: u64,
    lo: u64,
}
build!(HiLo, "2", Turned, &[("hi", "UInt64"), ("lo", "UInt64")], |id| Turned { lo: id, hi: id + 1000 });

// A later build with one column more.
#[derive(Serialize, Deserialize)]
struct More {
    lo: u64,
    hi: u64,
    extra: u32,
}
build!(Extra, "3", More, &[("lo", "UInt64"), ("hi", "UInt64"), ("extra", "UInt32")], |id| More {
    lo: id,
    hi: id + 1000,
    extra: 7
});

// A build that calls a column by another name.
#[derive(Serialize, Deserialize)]
struct Named {
    lo: u64,
    top: u64,
}
build!(Renamed, "4", Named, &[("lo", "UInt64"), ("top", "UInt64")], |id| Named { lo: id, top: id + 1000 });

// A build in which a column may be NULL.
#[derive(Serialize, Deserialize)]
struct Maybe {
    lo: u64,
    hi: Option<u64>,
}
build!(Nullable, "6", Maybe, &[("lo", "UInt64"), ("hi", "Nullable(UInt64)")], |id| Maybe {
    lo: id,
    hi: (id % 2 == 0).then_some(id)
});

// A build whose values an operator's constraint does not allow.
build!(Large, "5", Bounds, &[("lo", "UInt64"), ("hi", "UInt64")], |id| Bounds { lo: id, hi: 1 << 40 });

// Of ten ids, one has a kind that its column does not have.
#[derive(Serialize, Deserialize)]
struct Kind {
    kind: i8,
    name: String,
}
build!(
    Kinds,
    "1",
    Kind,
    &[("kind", "Enum8('low' = 1, 'high' = 2)"), ("name", "Enum8('low' = 1, 'high' = 2)")],
    |id| Kind {
        kind: if id % 10 == 7 { 9 } else { 1 + (id % 2) as i8 },
        name: if id % 10 == 8 { "middle".into() } else { "high".into() },
    }
);

#[derive(Serialize, Deserialize)]
struct Point {
    lat: f64,
    lon: f64,
}
#[derive(Serialize, Deserialize)]
struct Place {
    at: Point,
}
build!(Places, "1", Place, &[("at", "Tuple(lon Float64, lat Float64)")], |id| Place {
    at: Point { lat: id as f64, lon: -(id as f64) }
});

// A field that is left out for some values, and for none that could be tried at the start.
#[derive(Serialize, Deserialize)]
struct Skipping {
    #[serde(skip_serializing_if = "is_five")]
    lo: u64,
    hi: u64,
}
fn is_five(number: &u64) -> bool {
    *number == 5
}
build!(Skips, "1", Skipping, &[("lo", "UInt64"), ("hi", "UInt64")], |id| Skipping { lo: id % 10, hi: id });

// A field that is left out when it is zero, as blank rows show at the start.
#[derive(Serialize, Deserialize)]
struct Sparse {
    #[serde(skip_serializing_if = "is_zero")]
    lo: u64,
    hi: u64,
}
fn is_zero(number: &u64) -> bool {
    *number == 0
}
build!(Zeroless, "1", Sparse, &[("lo", "UInt64"), ("hi", "UInt64")], |id| Sparse { lo: id, hi: id });

#[derive(Serialize, Deserialize)]
struct Flattened {
    lo: u64,
    #[serde(flatten)]
    rest: Rest,
}
#[derive(Serialize, Deserialize)]
struct Rest {
    hi: u64,
}
build!(Flat, "1", Flattened, &[("lo", "UInt64"), ("hi", "UInt64")], |id| Flattened {
    lo: id,
    rest: Rest { hi: id }
});

// A row whose `Serialize` says something else than its `Deserialize`.
#[derive(Deserialize)]
struct Lying {
    #[expect(dead_code, reason = "read by serde alone")]
    lo: u64,
    hi: u64,
}
impl Serialize for Lying {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut row = serializer.serialize_struct("Lying", 2)?;
        // Blank rows, which are tried at the start, say nothing of it.
        let kind = if (1_000_000..2_000_000).contains(&self.hi) { self.hi % 4 } else { 0 };
        match kind {
            1 => row.serialize_field("lo", "text")?,
            2 => row.serialize_field("low", &1u64)?,
            3 => row.serialize_field("lo", &-1i64)?,
            _ => row.serialize_field("lo", &1u64)?,
        }
        row.serialize_field("hi", &self.hi)?;
        row.end()
    }
}
build!(Lies, "1", Lying, &[("lo", "UInt64"), ("hi", "UInt64")], |id| Lying { lo: 0, hi: id });

// A build whose summary names a column that it does not have.
struct Unsummed;
impl Pipeline for Unsummed {
    const NAME: &'static str = "variant";
    const COLUMNS: &'static [(&'static str, &'static str)] = LoHi::COLUMNS;
    const SUMMARY: Option<&'static str> = Some("SELECT max(no_such_column) FROM {rows}");
    type Id = u64;
    type Row = Bounds;
    fn compute(&self, id: &u64) -> Outcome<Bounds> {
        LoHi.compute(id)
    }
}
