//! Completes a partial replay: copies the rows of all other ids inside ClickHouse.

use millstream::names::{PassId, RunName};

use crate::clickhouse::store::Store;
use crate::error::Error;
use crate::failpoint;
use crate::model::record::{Covers, Published};

/// The most rows in one copy inside ClickHouse, which is what one part should hold. The store uses smaller
/// pieces for large rows.
const COPIED_AT_ONCE: u32 = 500_000;

/// Copies the rows of all other ids from the base pass, once every id that the pass covers is computed; `false`
/// until then.
///
/// # Errors
/// [`Error::BaseGone`] when the base has lost rows that the pass lacks; [`Error::Unstable`] when the condition
/// no longer selects the same ids; errors of ClickHouse. Any number of processes may call it at any time: rows
/// that are copied twice are deduplicated before the seal.
pub(crate) async fn take_over(
    store: &Store,
    pass: &PassId,
    covers: &Covers,
    batch_ids: u32,
    published: &Published,
) -> Result<bool, Error> {
    if store.raw_rows(pass).await? < published.ids
        && let Some(gone) = base_gone(store, pass, covers, published.ids).await?
    {
        return Err(gone);
    }
    check_selected(store, &pass.run, covers).await?;
    for piece in pieces(batch_ids, published) {
        if store.not_computed(pass, covers, piece).await? > 0 {
            return Ok(false);
        }
    }
    copy_others(store, pass, covers, batch_ids, published).await?;
    Ok(true)
}

/// The error of a partial replay whose base lacks rows, compared with the run's ids. It is missed if raw
/// duplicates make up the number.
///
/// # Errors
/// Errors of ClickHouse.
pub(crate) async fn base_gone(
    store: &Store,
    pass: &PassId,
    covers: &Covers,
    ids: u64,
) -> Result<Option<Error>, Error> {
    let rows = ids.saturating_sub(store.raw_rows(&covers.base_of(&pass.run)).await?);
    let PassId { run, pass } = pass;
    Ok((rows > 0).then(|| Error::BaseGone { run: run.to_string(), pass: *pass, base: covers.base, rows }))
}

/// Copies the rows of all ids that the pass does not cover. The selection must have been checked.
///
/// # Errors
/// Errors of ClickHouse.
pub(crate) async fn copy_others(
    store: &Store,
    pass: &PassId,
    covers: &Covers,
    batch_ids: u32,
    published: &Published,
) -> Result<(), Error> {
    for piece in pieces(batch_ids, published) {
        store.take_over(pass, covers, piece).await?;
        failpoint::pass("replay-in-copy");
    }
    Ok(())
}

/// The batches of a run as half-open ranges, each small enough for one copy.
fn pieces(batch_ids: u32, published: &Published) -> impl Iterator<Item = [u32; 2]> {
    let step = (COPIED_AT_ONCE / batch_ids.max(1)).max(1);
    let batches = published.batches;
    let firsts = (0..batches).step_by(step as usize);
    firsts.map(move |first| [first, first.saturating_add(step).min(batches)])
}

/// Checks that the selection still selects what it did when the pass began.
///
/// # Errors
/// [`Error::Unstable`]; errors of ClickHouse.
pub(crate) async fn check_selected(store: &Store, run: &RunName, covers: &Covers) -> Result<(), Error> {
    let Some(before) = covers.selected else { return Ok(()) };
    let after = store.selected(run, covers).await?;
    if after == before {
        return Ok(());
    }
    let run = run.to_string();
    let selection = covers.selection.clone();
    Err(Error::Unstable { run, selection, before: before.ids, after: after.ids })
}
