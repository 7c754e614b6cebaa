//! What readers see of a run: its rows in the table of sealed passes, compared with the records of its passes.

use millstream::names::RunName;
use serde::Serialize;

use crate::clickhouse::sql::SeenPass;
use crate::clickhouse::store::Store;
use crate::error::Error;
use crate::model::record::{PassRecord, PassState, Published};
use crate::nats::bucket::Records;

/// A row in the table of sealed passes that differs from the pass's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SeenFault {
    /// The pass of the row.
    pub pass: u32,
    /// What the row says, and what is right.
    pub why: String,
    /// The row as it is.
    #[serde(skip)]
    found: SeenPass,
    /// The correct row; `None` if there should be none.
    #[serde(skip)]
    right: Option<SeenPass>,
}

/// Compares the rows in the table of sealed passes with the records of the run's passes. `complete` is the
/// newest pass, if all of it is stored: it may have its row a moment before its record says so. The rows must
/// be read first, so that a seal made meanwhile is no fault.
pub(super) fn faults(
    seen: &[SeenPass],
    passes: &[PassRecord],
    published: Option<&Published>,
    complete: Option<u32>,
) -> Vec<SeenFault> {
    // A lost bucket proves nothing; it is restored from these rows.
    if passes.is_empty() {
        return Vec::new();
    }
    let fault_of = |row: &SeenPass| {
        let record = passes.iter().find(|record| record.pass == row.pass);
        let fault = |why, right| SeenFault { pass: row.pass, why, found: row.clone(), right };
        let no_row = |why: String| Some(fault(why, None));
        match (record, published) {
            (None, _) => no_row("no record says that there is such a pass".to_owned()),
            // Readers keep what they see of a pass until it is sealed again.
            (Some(record), _) if record.forgetting || record.unsealed || record.repair.is_some() => None,
            (Some(PassRecord { state: PassState::Sealed, sealed: Some(sealed), .. }), Some(published)) => {
                let right = SeenPass::of(row.pass, published, sealed);
                let why = difference(row, &right)?;
                Some(fault(why, Some(right)))
            }
            (Some(_), _) if complete == Some(row.pass) => None,
            (Some(record), _) => no_row(format!("the pass is not sealed, but {}", record.state)),
        }
    };
    seen.iter().filter_map(fault_of).collect()
}

/// Describes what is wrong in a row, if anything is.
fn difference(row: &SeenPass, right: &SeenPass) -> Option<String> {
    let figures = |row: &SeenPass| {
        let SeenPass { batches, ids, rows, dead, digest, repeated_ids, at_ms, .. } = *row;
        [
            ("batches", u64::from(batches)),
            ("ids", ids),
            ("rows", rows),
            ("dead", dead),
            ("digest", digest),
            ("repeated_ids", repeated_ids),
            ("sealed_at in milliseconds", at_ms),
        ]
    };
    let others = figures(row).into_iter().zip(figures(right)).filter(|(found, right)| found != right);
    let mut differences: Vec<String> =
        others.map(|((name, found), (_, right))| format!("{name} {found} in place of {right}")).collect();
    if row.builds != right.builds {
        differences.push(format!("builds {:?} in place of {:?}", row.builds, right.builds));
    }
    (!differences.is_empty()).then(|| differences.join(", "))
}

/// Corrects a wrong row, or removes it, and returns whether it did. It does nothing if the fault has changed,
/// or about a pass that has rows and no record: NATS has lost the record, and `produce` restores it.
///
/// # Errors
/// Errors of NATS and ClickHouse.
pub(super) async fn mend(
    records: &Records,
    store: &Store,
    run: &RunName,
    fault: &SeenFault,
) -> Result<bool, Error> {
    let passes = records.passes_of(run).await?;
    let published = records.known_run(run).await?.record.published;
    let seen = store.sealed_passes(run).await?;
    if !faults(&seen, &passes, published.as_ref(), None).contains(fault) {
        return Ok(false);
    }
    let is_recorded = passes.iter().any(|record| record.pass == fault.pass);
    if !is_recorded && store.raw_rows(&run.pass(fault.pass)).await? > 0 {
        return Ok(false);
    }
    tracing::warn!(%run, pass = fault.pass, why = fault.why, "corrected the pass's row in the table of sealed passes");
    let found = &fault.found;
    if let Some(right) = &fault.right {
        show(store, run, right).await?;
        // Readers get the newer of two rows with the same time.
        if right.at_ms == found.at_ms {
            return Ok(true);
        }
    }
    // Only this row: a seal made meanwhile has another time.
    store.remove_seen(run, found).await?;
    Ok(true)
}

/// Writes a sealed pass's row.
///
/// # Errors
/// Errors of ClickHouse.
pub(super) async fn show(store: &Store, run: &RunName, right: &SeenPass) -> Result<(), Error> {
    store.write("make a sealed pass visible again", &store.tables().insert_pass(run, right)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::Sealed;

    #[test]
    fn a_row_that_contradicts_its_record_is_named() {
        let run: RunName = "a".parse().expect("legal");
        let published = Published { batches: 3, ids: 30, digest: 7, dropped_repeats: 0, at_ms: 1 };
        let summary = None;
        let summary_fault = None;
        let builds = vec!["1".to_owned()];
        let sealed = Sealed { rows: 30, dead: 2, repeated_ids: 0, at_ms: 5, summary, summary_fault, builds };
        let running = |pass| PassRecord::begin(&run.pass(pass), 10, 0);
        let first = PassRecord { state: PassState::Sealed, sealed: Some(sealed.clone()), ..running(1) };
        let right = SeenPass::of(1, &published, &sealed);
        let found = |row: &SeenPass, passes: &[PassRecord], complete| {
            let found = faults(std::slice::from_ref(row), passes, Some(&published), complete);
            found.into_iter().next().map(|fault| (fault.why, fault.right))
        };
        let passes = [first.clone(), running(2)];
        assert_eq!(found(&right, &passes, None), None);
        let wrong = SeenPass { batches: 2, builds: Vec::new(), ..right.clone() };
        let why = "batches 2 in place of 3, builds [] in place of [\"1\"]";
        assert_eq!(found(&wrong, &passes, None), Some((why.to_owned(), Some(right.clone()))));
        assert_eq!(found(&wrong, &[], None), None, "the bucket was lost");

        let none = |why: &str| Some((why.to_owned(), None));
        let of_second = SeenPass { pass: 2, ..right.clone() };
        assert_eq!(found(&of_second, &[first], None), none("no record says that there is such a pass"));
        assert_eq!(found(&of_second, &passes, None), none("the pass is not sealed, but running"));
        assert_eq!(found(&of_second, &passes, Some(2)), None, "a seal that is not marked yet");
        for repaired in
            [PassRecord { unsealed: true, ..running(2) }, PassRecord { repair: Some(7), ..running(2) }]
        {
            assert_eq!(found(&of_second, &[repaired], None), None, "a seal that is repaired");
        }
    }
}
