//! SQL that removes a run, or one pass of a run.
//!
//! Uses mutations. A lightweight delete only hides rows, and frees their space after a merge that may never
//! come.

use super::{PARTITIONS, SeenPass, Tables, moment, string};
use millstream::Id;
use millstream::names::{PassId, RunName};

/// Removes rows, and waits until every replica has removed them.
pub(super) fn delete(table: &str, condition: &str) -> String {
    format!("ALTER TABLE {table} DELETE WHERE {condition} SETTINGS mutations_sync = 2")
}

fn of(run: &RunName, pass: Option<u32>) -> String {
    let pass = pass.map(|pass| format!(" AND pass = {pass}"));
    format!("run = {}{}", string(run.as_str()), pass.unwrap_or_default())
}

impl Tables {
    /// Counts the rows of a run, or of one pass, with raw duplicates: `(rows)`.
    pub fn rows_of(&self, run: &RunName, pass: Option<u32>) -> String {
        format!("SELECT count() FROM {} WHERE {}", self.rows(), of(run, pass))
    }

    /// Bytes on disk of the partition that holds a run's rows: `(bytes)`.
    pub fn bytes_beside(&self, run: &RunName) -> String {
        format!(
            "SELECT toUInt64(sum(bytes_on_disk)) FROM system.parts WHERE database = {} AND table = {} AND active \
             AND partition = '{}'",
            string(&self.database),
            string(&self.rows_name()),
            run.to_string().sip_hash() % u64::from(PARTITIONS),
        )
    }

    /// Removes every row of a run, or of one pass.
    pub fn remove_rows(&self, run: &RunName, pass: Option<u32>) -> String {
        delete(&self.rows(), &of(run, pass))
    }

    /// Unfinished mutations of our tables, the oldest first: `(table, id, command, parts, running, reason)`.
    pub fn mutations(&self) -> String {
        let names: Vec<String> = self.all_names().iter().map(|name| string(name)).collect();
        let database = string(&self.database);
        let names = names.join(", ");
        format!(
            "SELECT table, mutation_id AS id, substring(command, 1, 200) AS command, toInt64(parts_to_do) AS parts, ifNull((SELECT \
             count() FROM system.merges AS m WHERE m.database = {database} AND m.table IN ({names})), 0) AS running, \
             substring(latest_fail_reason, 1, 600) AS reason FROM system.mutations \
             WHERE database = {database} AND table IN ({names}) AND NOT is_done ORDER BY create_time, mutation_id"
        )
    }

    /// Ends a mutation.
    pub fn kill_mutation(&self, table: &str, id: &str) -> String {
        let [database, table, id] = [&self.database, table, id].map(string);
        format!("KILL MUTATION WHERE database = {database} AND table = {table} AND mutation_id = {id}")
    }

    /// Counts the rows of a run in the table of sealed passes: `(rows)`.
    pub fn count_sealed(&self, pass: &PassId) -> String {
        format!("SELECT count() FROM {} WHERE {}", self.passes(), of(&pass.run, Some(pass.pass)))
    }

    /// Hides a sealed pass of a run from readers.
    pub fn hide(&self, pass: &PassId) -> String {
        delete(&self.passes(), &of(&pass.run, Some(pass.pass)))
    }

    /// Removes one row of a sealed pass, identified by its seal time; and counts how many are left: `(rows)`.
    pub fn remove_seen(&self, run: &RunName, seen: &SeenPass) -> [String; 2] {
        let of_moment = format!("{} AND sealed_at = {}", of(run, Some(seen.pass)), moment(seen.at_ms));
        [
            delete(&self.passes(), &of_moment),
            format!("SELECT count() FROM {} WHERE {of_moment}", self.passes()),
        ]
    }

    /// Removes the recorded view faults of a run, or of one pass.
    pub fn forget_view_faults(&self, run: &RunName, pass: Option<u32>) -> String {
        delete(&self.table("_view_faults"), &of(run, pass))
    }

    /// Runs whose records ClickHouse has, the newest first: `(run)`.
    pub fn kept_runs(&self) -> String {
        format!("SELECT run FROM {} FINAL ORDER BY created_at DESC LIMIT 1000", self.runs())
    }

    /// Counts the records of a run: `(records)`.
    pub fn count_runs(&self, run: &RunName) -> String {
        format!("SELECT count() FROM {} WHERE {}", self.runs(), of(run, None))
    }

    /// Removes a run's record.
    pub fn forget_run(&self, run: &RunName) -> String {
        delete(&self.runs(), &of(run, None))
    }
}
