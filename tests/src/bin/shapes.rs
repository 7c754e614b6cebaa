//! Versions of one pipeline whose columns differ, and pipelines whose columns ClickHouse spells otherwise or refuses.
//! `SHAPE` says which of them the process is.

use millstream::{Outcome, Pipeline};
use serde::{Deserialize, Serialize};

/// Declares a pipeline over numbers, its row type, and what it computes.
macro_rules! pipeline {
    ($pipeline:ident, $row:ident, $name:literal, { $($field:ident: $rust:ty, $kind:literal = $value:expr;)+ }) => {
        struct $pipeline;

        #[derive(Serialize, Deserialize)]
        struct $row {
            $($field: $rust,)+
        }

        impl Pipeline for $pipeline {
            const NAME: &'static str = $name;
            const COLUMNS: &'static [(&'static str, &'static str)] = &[$((stringify!($field), $kind)),+];
            type Id = u64;
            type Row = $row;

            fn compute(&self, id: &u64) -> Outcome<$row> {
                tests::spin(tests::micros("SHAPE_MICROS"));
                Ok($row { $($field: $value(*id),)+ })
            }
        }
    };
}

pipeline!(First, FirstRow, "shape", { a: u32, "UInt32" = |id| id as u32; });
pipeline!(Second, SecondRow, "shape", { a: u32, "UInt32" = |id| id as u32; extra: u64, "UInt64" = |id| id * 10; });
pipeline!(Wide, WideRow, "shape", { a: u64, "UInt64" = |id| id + 5_000_000_000; });
pipeline!(Text, TextRow, "shape", { a: String, "String" = |id: u64| id.to_string(); });
pipeline!(Narrow, NarrowRow, "shape", { a: u16, "UInt16" = |id| id as u16; });
pipeline!(Spelled, SpelledRow, "spelled", {
    sum: i64, "Decimal(18)" = |id| id as i64;
    at: i64, "DateTime64" = |id| id as i64;
    kind: i8, "Enum8('b'=2,'a'=1)" = |id| (id % 2) as i8 + 1;
});
pipeline!(Nowhere, NowhereRow, "nowhere", {
    a: u32, "UInt32" = |id| id as u32;
    at: u32, "DateTime('Nowhere')" = |id| id as u32;
    then: i64, "DateTime64(3, 'Atlantis')" = |id| id as i64;
});

fn main() -> std::process::ExitCode {
    match std::env::var("SHAPE").as_deref() {
        Ok("second") => millstream_cli::main(Second),
        Ok("wide") => millstream_cli::main(Wide),
        Ok("text") => millstream_cli::main(Text),
        Ok("narrow") => millstream_cli::main(Narrow),
        Ok("spelled") => millstream_cli::main(Spelled),
        Ok("nowhere") => millstream_cli::main(Nowhere),
        _ => millstream_cli::main(First),
    }
}
