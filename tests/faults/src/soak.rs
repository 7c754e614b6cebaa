//! The soak.

use std::process::ExitCode;
use std::time::Duration;

use crate::Plan;
use crate::table::Table;

pub fn run(_plan: Plan, _faulting: Duration, table: Table) -> ExitCode {
    table.close()
}
