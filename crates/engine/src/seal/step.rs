//! Decides the next step of a pass on its way to the seal, without I/O. `drive.rs` runs the steps on real
//! servers, `simulation/seal.rs` in a model of the worst servers.
//!
//! Each step is one request or one operation with its own time limit. Its result decides the next step and the
//! pause before it. Nothing here waits, and passes do not depend on each other.

use std::time::Duration;

use crate::model::record::PassState;
pub(crate) use crate::model::seal_step::Step;

/// The pause before a step whose wait ends with a change (of the record, of the workers' consumer). The step
/// runs when the change is seen, or after this long if it was missed.
pub(crate) const IDLE: Duration = Duration::from_secs(30);
/// Pauses between checks of rows on their way.
const LOOKS: Ladder = Ladder { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Pauses between proofs, merges and repairs of a pass that does not change.
const TRIES: Ladder = Ladder { first: Duration::from_secs(1), most: Duration::from_secs(60) };
/// Pauses after requests that a server did not answer.
const ERRORS: Ladder = Ladder { first: Duration::from_secs(2), most: Duration::from_secs(30) };
/// The pause between two checks of the rest of a cancelled pass, or of a repair's claim.
const AGAIN: Duration = Duration::from_secs(2);
/// How long a seal that another sealer made is left to that sealer to finish.
const FINISH_FOR_OTHERS: Duration = Duration::from_secs(10);
/// How long a sealer waits for the sealers before it.
const TURN: Duration = Duration::from_secs(10);
/// The repairs of one pass that a process makes by itself; after these an operator has to act.
pub(crate) const REPAIRS: u32 = 5;

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Ids are still being published.
    Publishing,
    /// A repair has claimed the pass.
    BeingRepaired,
    /// All ids are published.
    Published,
    /// The pass's record is gone, or its state is final.
    Gone,
    /// Batches wait for workers.
    Computing,
    /// All batches are delivered, and workers hold some; or a worker died with them.
    InWorkers,
    /// All batches are computed, and some rows are not delivered to sinks yet.
    Undrawn,
    /// All rows are delivered to sinks, and some are not acked yet.
    InSinks,
    /// Nothing of the pass is on its way.
    Landed,
    /// There are as many stored rows as ids.
    Enough,
    /// This sealer continues with the pass.
    OurTurn,
    /// Another sealer continues with the pass, if it lives.
    OthersTurn,
    /// There are fewer stored rows than ids.
    Lacking,
    /// Rows are redelivered again and again, because ClickHouse or the table refuses them.
    Refused,
    /// All unchanged rows are copied.
    TakenOver,
    /// Each id has exactly one row, as it was computed.
    Clean,
    /// Each id has its row, and some ids have several.
    Duplicates,
    /// Rows were inserted during the count: the figures are of two moments.
    Moving,
    /// Some ids have no row, or a row that differs from what was computed.
    Incomplete,
    /// The values of some rows cannot be proven.
    Unproven,
    /// No raw duplicate is left.
    Merged,
    /// ClickHouse was asked to remove raw duplicates, and some are left.
    NotMerged,
    /// The repair changed something.
    Repaired,
    /// There was nothing to repair, or it is too early.
    NotRepaired,
    /// No repair helps, or the last repair was made.
    Stuck,
    /// Readers see the pass.
    Shown,
    /// The record marks the pass as sealed.
    Marked,
    /// The record has changed since before the proof.
    Beaten,
    /// The seal is announced, NATS holds nothing of the pass, and the record says so.
    Finished,
    /// Something of the pass has to stay in NATS for now.
    NotFinished,
    /// A server did not answer, or the step exceeded its time limit.
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
    /// The time limit of the step. After it the outcome is unknown, and the next step checks.
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

    /// Whether the step may read or write all rows of a pass: a process runs few of these at once.
    pub(crate) fn is_heavy(self) -> bool {
        matches!(self, Self::TakeOver | Self::Prove | Self::Merge | Self::Repair | Self::Show | Self::Free)
    }

    /// Whether the step's wait ends with a change of the records or of the workers' consumer, or with inserted
    /// rows.
    pub(crate) fn waits_for_workers(self) -> bool {
        matches!(self, Self::Read | Self::Ask)
    }
}

/// Steps that one process runs at once: cheap ones; heavy ones of small passes; heavy ones of large passes. So
/// a small pass never waits for the proof of a large one.
#[derive(Debug, Default)]
pub(crate) struct Room([usize; 3]);

impl Room {
    const MOST: [usize; 3] = [32, 6, 2];

    /// Takes a slot for the step of a pass, which [`Self::leave`] returns; `None` if all slots of its kind are
    /// taken.
    pub(crate) fn enter(&mut self, step: Step, is_large: bool) -> Option<usize> {
        let kind = match (step.is_heavy(), is_large) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 2,
        };
        let has_slot = self.0[kind] < Self::MOST[kind];
        self.0[kind] += usize::from(has_slot);
        has_slot.then_some(kind)
    }

    pub(crate) fn leave(&mut self, place: usize) {
        self.0[place] -= 1;
    }
}

/// The course of one pass to its seal, in one process.
#[derive(Debug, Clone)]
pub(crate) struct Course {
    step: Step,
    /// Whether the pass is a partial replay, which copies rows of another pass.
    takes_over: bool,
    /// The last answer of NATS about the pass's rows.
    rows: Seen,
    /// Whether a proof has found the pass incomplete. It is not proven again until all of its rows have
    /// arrived.
    was_incomplete: bool,
    looks: u32,
    tries: u32,
    errors: u32,
    repairs: u32,
}

impl Course {
    /// The course of a pass in this state, and its first step.
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

    /// The next step.
    pub(crate) fn step(&self) -> Step {
        self.step
    }

    /// Whether the process has made all the repairs that it makes by itself.
    pub(crate) fn is_out_of_repairs(&self) -> bool {
        self.repairs >= REPAIRS
    }

    /// Something of the pass has changed: the pauses between checks start over.
    pub(crate) fn changed(&mut self) {
        self.looks = 0;
    }

    /// The step after the current one, whose result is `seen`. A proof runs only if there are as many rows as
    /// ids. After a proof that found rows missing, it runs only once nothing of the pass is on its way.
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
            // The watch may not report a change: a lost record may have been restored unchanged.
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
                // Rows were inserted since the count, so count again.
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
            // The proof holds except for duplicates: ask ClickHouse to merge again, and read nothing again.
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

    /// Rows are missing. They are lost only if nothing of the pass is on its way; that needs no proof.
    fn lacking(&mut self) -> (Step, Duration) {
        match self.rows {
            Seen::InWorkers => (Step::Ask, LOOKS.pause(&mut self.looks)),
            // The missing rows may be those to copy, or rows that the base has lost.
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

    /// Regression: at 10^9 ids the sealer made nine proofs while sinks were half way.
    #[test]
    fn nothing_is_counted_or_proven_while_sinks_have_undelivered_rows() {
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
    fn after_a_failed_proof_all_rows_have_to_arrive_before_the_next() {
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
    fn pauses_grow_to_their_limit_and_a_change_resets_them() {
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
