//! What makes a pass over some ids whole: the rows of the others, copied inside ClickHouse.

use millstream::names::{PassId, RunName};

use crate::clickhouse::store::Store;
use crate::error::Error;
use crate::failpoint;
use crate::model::record::{Covers, Published};

/// Rows that one copy inside ClickHouse takes at most, which is what one part should hold. The store cuts it where they are
/// large.
const COPIED_AT_ONCE: u32 = 500_000;

/// Once every id that the pass covers is computed, copies the rows of all others from its base; `false` while they are
/// not.
///
/// # Errors
/// [`Error::BaseGone`] when the base has lost rows that the pass lacks; [`Error::Unstable`] when the condition no longer selects
/// what it did; ClickHouse's. It can be called again at any time, by any number of processes: what is copied twice is merged away
/// before the seal.
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

/// What stands against a pass over some ids whose base lacks rows, of as many as the run has ids. Where raw duplicates stand in
/// for them, they are not missed.
///
/// # Errors
/// ClickHouse's.
pub(crate) async fn base_gone(
    store: &Store,
    pass: &PassId,
    covers: &Covers,
    ids: u64,
) -> Result<Option<Error>, Error> {
    let base = covers.base;
    let rows = ids.saturating_sub(store.raw_rows(&pass.run.pass(base)).await?);
    Ok((rows > 0).then(|| Error::BaseGone { run: pass.run.to_string(), pass: pass.pass, base, rows }))
}

/// Copies the rows of all ids that the pass does not cover, by a selection that was checked.
///
/// # Errors
/// ClickHouse's.
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

/// The batches of a run in pieces that one copy takes, from the first to below the second of each pair.
fn pieces(batch_ids: u32, published: &Published) -> impl Iterator<Item = [u32; 2]> {
    let step = (COPIED_AT_ONCE / batch_ids.max(1)).max(1);
    let batches = published.batches;
    let firsts = (0..batches).step_by(step as usize);
    firsts.map(move |first| [first, first.saturating_add(step).min(batches)])
}

/// Makes sure that the selection is what it was when the pass was begun.
///
/// # Errors
/// [`Error::Unstable`]; ClickHouse's.
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
