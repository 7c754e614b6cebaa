//! A pipeline whose columns are not those of its row type: every command refuses it.

use millstream::{Outcome, Pipeline};
use serde::{Deserialize, Serialize};

struct Misfit;

#[derive(Serialize, Deserialize)]
struct Row {
    squared: u64,
    cubed: u64,
}

impl Pipeline for Misfit {
    const NAME: &'static str = "misfit";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("squared", "String"), ("cube", "UInt64")];
    type Id = u64;
    type Row = Row;

    fn compute(&self, id: &u64) -> Outcome<Row> {
        Ok(Row { squared: id.wrapping_mul(*id), cubed: id.wrapping_mul(*id).wrapping_mul(*id) })
    }
}

fn main() -> std::process::ExitCode {
    millstream_cli::main(Misfit)
}
