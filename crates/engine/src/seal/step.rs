//! What to do next with a pass on its way to the seal: the decision alone. `drive.rs` takes the steps on real servers,
//! `simulation/seal.rs` on the worst that there could be.
//!
//! Each step is one question or one operation with a limit of its own. What it came to decides which step is next, and after
//! which pause; nothing here waits, and no pass knows of another.

use std::time::Duration;

use crate::model::record::PassState;
use crate::telemetry::labels::SealStep;

/// The pause before a step whose wait ends with a change that is seen (of the record, of the workers' consumer): the step is
/// taken then, and after this long in case the change was not seen.
pub(crate) const IDLE: Duration = Duration::from_secs(30);
/// Pauses between looks at rows on their way.
const LOOKS: Ladder = Ladder { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Pauses between proofs, merges and repairs of a pass that stays as it is.
const TRIES: Ladder = Ladder { first: Duration::from_secs(1), most: Duration::from_secs(60) };
/// Pauses after servers that gave no answer.
const ERRORS: Ladder = Ladder { first: Duration::from_secs(2), most: Duration::from_secs(30) };
/// The pause between two looks at what is left of a cancelled pass, and at a claim of a repair.
const AGAIN: Duration = Duration::from_secs(2);
/// A seal that another sealer made is finished by that one, unless it has not done so after this long.
const FINISH_FOR_OTHERS: Duration = Duration::from_secs(10);
/// A sealer that comes after another looks again after this long.
const TURN: Duration = Duration::from_secs(10);
/// Repairs of one pass that a process makes by itself; after so many a person has to look.
pub(crate) const REPAIRS: u32 = 5;

/// Something to be done for a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Read the records: whether all ids are published, and whether a repair has the pass.
    Read,
    /// Ask the broker where workers and sinks stand. Costs ClickHouse nothing.
    Ask,
    /// Count the pass's rows in ClickHouse.
    Count,
    /// Ask whether rows of the pass are on their way.
    Landing,
    /// Ask whether another sealer comes first: what follows costs ClickHouse much, and need be done once.
    Turn,
    /// Copy the rows of ids that the pass does not cover.
    TakeOver,
    /// Prove ids and values.
    Prove,
    /// Merge raw duplicates away, and see whether they are.
    Merge,
    /// Have computed again, or handed out again, what is lost.
    Repair,
    /// Sum up, and write the row by which readers see the pass.
    Show,
    /// Say in the pass's record that it is sealed, if that is as it was before the proof.
    Mark,
    /// Announce the seal, and remove what the broker holds of the pass.
    Finish,
    /// Remove what the broker holds of a cancelled pass.
    Free,
    /// Nothing is left to be done.
    Rest,
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Ids are still being published.
    Publishing,
    /// A repair has claimed the pass.
    BeingRepaired,
    /// All ids are published.
    Published,
    /// The pass's record is gone, or says that the pass is at its end.
    Gone,
    /// Batches wait for workers.
    Computing,
    /// All batches are drawn, and workers hold some; or a worker that is gone does.
    InWorkers,
    /// All batches are computed, and sinks have not drawn all of their rows.
    Undrawn,
    /// Sinks have drawn all rows, and have not acked all.
    InSinks,
    /// Nothing of the pass is under way.
    Landed,
    /// As many rows are stored as there are ids.
    Enough,
    /// This sealer goes on with the pass.
    OurTurn,
    /// Another one does, if it lives.
    OthersTurn,
    /// Fewer are.
    Lacking,
    /// Rows come back again and again, as ClickHouse or the table does not take them.
    Refused,
    /// Every row that another pass has to give is there.
    TakenOver,
    /// Each id has its one row, as it was computed.
    Clean,
    /// Each id has its row, and some have several.
    Duplicates,
    /// Rows landed while they were counted: the figures are of two moments.
    Moving,
    /// Some ids have no row, or another than was computed.
    Incomplete,
    /// The values of some rows cannot be proven.
    Unproven,
    /// No raw duplicate is left.
    Merged,
    /// ClickHouse was asked to merge them, and they are there still.
    NotMerged,
    /// Something was done about what is lost.
    Repaired,
    /// There was nothing to do, or it is not the time.
    NotRepaired,
    /// No repair helps, or the last of them is made.
    Stuck,
    /// Readers see the pass.
    Shown,
    /// The record says that the pass is sealed.
    Marked,
    /// The record is another than before the proof.
    Beaten,
    /// Announced, and nothing is left of the pass in the broker; the record says so.
    Finished,
    /// Some of it has to stay for now.
    NotFinished,
    /// A server gave no answer, or the step's limit passed.
    Failed,
}

/// A step, and the pause before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Next {
    pub step: Step,
    pub after: Duration,
}

/// Pauses that double from the first to the last.
#[derive(Debug, Clone, Copy)]
struct Ladder {
    first: Duration,
    most: Duration,
}

impl Ladder {
    fn pause(&self, made: &mut u32) -> Duration {
        let pause = self.first.saturating_mul(1 << (*made).min(16)).min(self.most);
        *made += 1;
        pause
    }
}

impl Step {
    /// After this long the step is given up: its outcome is not known, and the next one looks.
    pub(crate) fn within(self) -> Duration {
        Duration::from_secs(match self {
            Self::Read | Self::Ask | Self::Count | Self::Landing | Self::Turn | Self::Mark | Self::Rest => {
                120
            }
            Self::Finish => 300,
            Self::Show => 2 * 3600,
            Self::TakeOver | Self::Prove | Self::Merge | Self::Repair | Self::Free => 3 * 3600,
        })
    }

    /// Whether it may read or write all rows of a pass: of such steps a process takes few at once.
    pub(crate) fn is_heavy(self) -> bool {
        matches!(self, Self::TakeOver | Self::Prove | Self::Merge | Self::Repair | Self::Show | Self::Free)
    }

    /// The step as metrics name it; `None` where there is none to be taken.
    pub(crate) fn label(self) -> Option<SealStep> {
        Some(match self {
            Self::Read => SealStep::Read,
            Self::Ask => SealStep::Ask,
            Self::Count => SealStep::Count,
            Self::Landing => SealStep::Landing,
            Self::Turn => SealStep::Turn,
            Self::TakeOver => SealStep::TakeOver,
            Self::Prove => SealStep::Prove,
            Self::Merge => SealStep::Merge,
            Self::Repair => SealStep::Repair,
            Self::Show => SealStep::Show,
            Self::Mark => SealStep::Mark,
            Self::Finish => SealStep::Finish,
            Self::Free => SealStep::Free,
            Self::Rest => return None,
        })
    }

    /// Whether its wait ends with a change of the records or of the workers' consumer, or with rows that land.
    pub(crate) fn waits_for_workers(self) -> bool {
        matches!(self, Self::Read | Self::Ask)
    }
}

/// Steps that one process takes at once: looks; heavy ones of small passes; heavy ones of large passes. So a small pass never
/// waits for the proof of a large one.
#[derive(Debug, Default)]
pub(crate) struct Room([usize; 3]);

impl Room {
    const MOST: [usize; 3] = [32, 6, 2];

    /// A place for the step of a pass, which [`Self::leave`] gives back; `None` where all of its kind are taken.
    pub(crate) fn enter(&mut self, step: Step, is_large: bool) -> Option<usize> {
        let kind = match (step.is_heavy(), is_large) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 2,
        };
        let has_room = self.0[kind] < Self::MOST[kind];
        self.0[kind] += usize::from(has_room);
        has_room.then_some(kind)
    }

    pub(crate) fn leave(&mut self, place: usize) {
        self.0[place] -= 1;
    }
}

/// The way of one pass, as one process goes it.
#[derive(Debug, Clone)]
pub(crate) struct Course {
    step: Step,
    /// Whether the pass takes over rows of another one.
    takes_over: bool,
    /// What the broker said last of its rows.
    rows: Seen,
    /// A proof has found it incomplete: it is not proven again before all of its rows have landed.
    was_incomplete: bool,
    looks: u32,
    tries: u32,
    errors: u32,
    repairs: u32,
}

impl Course {
    /// The way of a pass in this state, and its first step.
    pub(crate) fn begin(state: PassState, takes_over: bool) -> (Self, Next) {
        let (step, after) = match state {
            PassState::Running => (Step::Read, Duration::ZERO),
            PassState::Paused => (Step::Rest, Duration::ZERO),
            PassState::Cancelled => (Step::Free, Duration::ZERO),
            PassState::Sealed => (Step::Finish, FINISH_FOR_OTHERS),
        };
        let course = Self {
            step,
            takes_over,
            rows: Seen::Computing,
            was_incomplete: false,
            looks: 0,
            tries: 0,
            errors: 0,
            repairs: 0,
        };
        (course, Next { step, after })
    }

    /// The step that is due next.
    pub(crate) fn step(&self) -> Step {
        self.step
    }

    /// Whether the process has made all the repairs that it makes by itself.
    pub(crate) fn is_out_of_repairs(&self) -> bool {
        self.repairs >= REPAIRS
    }

    /// Something of the pass has changed: looks follow each other quickly again.
    pub(crate) fn changed(&mut self) {
        self.looks = 0;
    }

    /// The step after this one, which came to `seen`. A proof follows only where as many rows are stored as there are ids;
    /// after one that found some missing, only once nothing of the pass is under way.
    pub(crate) fn next(&mut self, seen: Seen) -> Next {
        if seen != Seen::Failed {
            self.errors = 0;
        }
        let (step, after) = self.decide(seen);
        self.step = step;
        Next { step, after }
    }

    fn decide(&mut self, seen: Seen) -> (Step, Duration) {
        let now = Duration::ZERO;
        match seen {
            Seen::Publishing => (Step::Read, IDLE),
            Seen::BeingRepaired => (Step::Read, AGAIN),
            Seen::Published => (Step::Ask, now),
            // The watch may say of no change: a record that was lost may come back as it was.
            Seen::Gone if self.step == Step::Read => (Step::Read, IDLE),
            Seen::Gone => (Step::Rest, now),
            Seen::Computing => (Step::Ask, IDLE),
            Seen::Undrawn => (Step::Ask, LOOKS.pause(&mut self.looks)),
            Seen::InWorkers | Seen::InSinks | Seen::Landed if self.step == Step::Ask => {
                self.rows = seen;
                (Step::Count, now)
            }
            Seen::Enough if !self.was_incomplete || self.rows == Seen::Landed => (Step::Turn, now),
            Seen::Enough | Seen::Lacking => self.lacking(),
            Seen::Landed => {
                self.rows = Seen::Landed;
                // Rows that landed since they were counted are counted once more.
                (Step::Count, now)
            }
            Seen::InWorkers | Seen::InSinks => (Step::Ask, LOOKS.pause(&mut self.looks)),
            Seen::OurTurn if self.takes_over => (Step::TakeOver, now),
            Seen::OurTurn | Seen::TakenOver => (Step::Prove, now),
            Seen::OthersTurn => (Step::Turn, TURN),
            Seen::Clean => (Step::Show, now),
            Seen::Duplicates => (Step::Merge, now),
            Seen::Moving => (Step::Read, LOOKS.pause(&mut self.looks)),
            Seen::Incomplete => {
                self.was_incomplete = true;
                (Step::Repair, now)
            }
            Seen::Merged => (Step::Prove, now),
            // The proof holds but for the duplicates: ClickHouse is asked again, and nothing is read again.
            Seen::NotMerged => (Step::Merge, TRIES.pause(&mut self.tries)),
            Seen::Unproven | Seen::NotRepaired | Seen::Refused | Seen::Stuck => {
                (Step::Read, TRIES.pause(&mut self.tries))
            }
            Seen::Repaired => {
                self.repairs += 1;
                self.was_incomplete = false;
                (Step::Read, TRIES.pause(&mut self.tries))
            }
            Seen::Shown => (Step::Mark, now),
            Seen::Marked => (Step::Finish, now),
            Seen::Beaten => (Step::Read, AGAIN),
            Seen::Finished => (Step::Rest, now),
            Seen::NotFinished => (self.step, AGAIN),
            Seen::Failed => {
                let pause = ERRORS.pause(&mut self.errors);
                match self.step {
                    Step::Finish | Step::Free => (self.step, pause),
                    _ => (Step::Read, pause),
                }
            }
        }
    }

    /// Rows are missing, which is a loss only where nothing of the pass is under way. That needs no proof.
    fn lacking(&mut self) -> (Step, Duration) {
        match self.rows {
            Seen::InWorkers => (Step::Ask, LOOKS.pause(&mut self.looks)),
            // What the pass lacks may be what it takes over, or what its base has lost.
            Seen::Landed if self.takes_over && !self.was_incomplete => (Step::Turn, Duration::ZERO),
            Seen::Landed => (Step::Repair, Duration::ZERO),
            _ => (Step::Landing, Duration::ZERO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(seen: &[Seen]) -> (Course, Vec<Step>) {
        let (mut course, first) = Course::begin(PassState::Running, false);
        let steps = seen.iter().map(|seen| course.next(*seen).step);
        let steps = std::iter::once(first.step).chain(steps).collect();
        (course, steps)
    }

    #[test]
    fn a_pass_goes_straight_to_its_seal() {
        use Seen::*;
        let (_, steps) = way(&[Published, Landed, Enough, OurTurn, Clean, Shown, Marked, Finished]);
        assert_eq!(
            steps,
            [
                Step::Read,
                Step::Ask,
                Step::Count,
                Step::Turn,
                Step::Prove,
                Step::Show,
                Step::Mark,
                Step::Finish,
                Step::Rest
            ]
        );
    }

    /// At 10^9 ids the sealer had proven nine times while sinks were half behind.
    #[test]
    fn nothing_is_counted_or_proven_while_sinks_have_rows_to_draw() {
        let (mut course, _) = way(&[Seen::Published]);
        for _ in 0..100 {
            let Next { step, after } = course.next(Seen::Undrawn);
            assert_eq!(step, Step::Ask);
            assert!(after <= LOOKS.most);
        }
        assert_eq!(course.next(Seen::InSinks).step, Step::Count);
        assert_eq!(course.next(Seen::Lacking).step, Step::Landing);
        assert_eq!(course.next(Seen::InSinks).step, Step::Ask);
    }

    #[test]
    fn after_a_proof_in_vain_all_rows_have_to_land_before_the_next() {
        use Seen::*;
        let (mut course, steps) = way(&[Published, InSinks, Enough, OurTurn, Incomplete, NotRepaired]);
        assert_eq!(steps[3..], [Step::Turn, Step::Prove, Step::Repair, Step::Read]);
        course.next(Published);
        course.next(InSinks);
        assert_eq!(course.next(Enough).step, Step::Landing);
        assert_eq!(course.next(InSinks).step, Step::Ask);
        course.next(Landed);
        assert_eq!(course.next(Enough).step, Step::Turn);
        assert_eq!(course.next(OthersTurn), Next { step: Step::Turn, after: TURN });
        assert_eq!(course.next(OurTurn).step, Step::Prove);
    }

    #[test]
    fn a_loss_is_repaired_without_a_proof() {
        use Seen::*;
        let (mut course, steps) = way(&[Published, Landed, Lacking]);
        assert_eq!(steps.last(), Some(&Step::Repair));
        (0..REPAIRS).for_each(|_| assert_eq!(course.next(Repaired).step, Step::Read));
        assert!(course.is_out_of_repairs());
    }

    #[test]
    fn pauses_grow_to_their_limit_and_a_change_begins_anew() {
        let (mut course, _) = way(&[Seen::Published]);
        let pauses: Vec<Duration> = (0..20).map(|_| course.next(Seen::Undrawn).after).collect();
        assert!(pauses.is_sorted() && pauses[19] == LOOKS.most, "{pauses:?}");
        course.changed();
        assert_eq!(course.next(Seen::Undrawn).after, LOOKS.first);
        let failed: Vec<Duration> = (0..20).map(|_| course.next(Seen::Failed).after).collect();
        assert!(failed[0] == ERRORS.first && failed[19] == ERRORS.most, "{failed:?}");
    }

    #[test]
    fn merges_that_have_no_effect_are_asked_for_again_without_a_proof() {
        use Seen::*;
        let (mut course, _) = way(&[Published, Landed, Enough, OurTurn, Duplicates]);
        for _ in 0..10 {
            assert_eq!(course.next(NotMerged).step, Step::Merge);
        }
        assert_eq!(course.next(Merged).step, Step::Prove);
    }
}
