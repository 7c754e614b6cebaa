//! The steps to a seal. `seal/step.rs` decides which is next; metrics count each.

/// Something that a sealer does for a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Read the records: whether all ids are published, and whether a repair has claimed the pass.
    Read,
    /// Ask NATS for the state of workers and sinks. Costs ClickHouse nothing.
    Ask,
    /// Count the pass's rows in ClickHouse.
    Count,
    /// Ask whether rows of the pass are on their way to ClickHouse.
    Landing,
    /// Ask whether another sealer comes first, because the next steps are expensive for ClickHouse and needed
    /// once.
    Turn,
    /// Copy the unchanged rows: those of ids that the pass does not cover.
    TakeOver,
    /// Prove ids and values.
    Prove,
    /// Remove raw duplicates, and check that they are gone.
    Merge,
    /// Have lost rows computed again, or delivered again.
    Repair,
    /// Run the summary, and write the row that makes readers see the pass.
    Show,
    /// Mark the pass sealed in its record, if the record has not changed since before the proof.
    Mark,
    /// Announce the seal, and remove what NATS holds of the pass.
    Finish,
    /// Remove what NATS holds of a cancelled pass.
    Free,
    /// Nothing is left to do.
    Rest,
}
