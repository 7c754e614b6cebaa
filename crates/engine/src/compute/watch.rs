//! Which id each compute thread works on, so that a watch notices an id that takes too long. The price is two stores an
//! id.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// One thread slot. It has its own cache line, because the thread writes it for every id.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Hand {
    /// The order in progress; 0 for none.
    order: AtomicU64,
    /// Place of the id in progress within the order.
    at: AtomicU32,
    /// Ids begun so far: while the count stands still, so does the id in progress.
    begun: AtomicU64,
}

impl Hand {
    /// Notes the order that the thread works on.
    pub fn take(&self, order: u64) {
        self.order.store(order, Ordering::Relaxed);
    }

    /// Notes that the thread works on no order.
    pub fn put_down(&self) {
        self.order.store(0, Ordering::Relaxed);
    }

    /// Whether the thread works on an order.
    pub fn is_busy(&self) -> bool {
        self.order.load(Ordering::Relaxed) != 0
    }

    /// Notes that the thread begins an id.
    pub fn begin(&self, at: u32) {
        self.at.store(at, Ordering::Relaxed);
        // Only this thread writes the count, and a locked addition costs ten times as much.
        self.begun.store(self.begun.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// An id that takes longer than it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overdue {
    /// The order of the id.
    pub order: u64,
    /// The place of the id within the order.
    pub at: u32,
    /// Whether the id exceeds the hard limit.
    pub hard: bool,
}

/// Age at which an id in progress counts as long: it may take hours.
const STANDS: Duration = Duration::from_millis(200);

/// Polls all thread slots. Time is counted in polls, so that an id is not blamed while the process was suspended.
#[derive(Debug)]
pub(super) struct Watch {
    soft: Option<Duration>,
    hard: Option<Duration>,
    seen: Vec<(u64, Duration)>,
}

impl Watch {
    pub fn new(threads: usize, soft: Option<Duration>, hard: Option<Duration>) -> Self {
        Self { soft, hard, seen: vec![(0, Duration::ZERO); threads] }
    }

    /// Whether the slot has had the same id at the last polls.
    pub fn stands(&self, hand: usize) -> bool {
        self.seen[hand].1 >= STANDS
    }

    /// Ids that have become overdue since the last poll, which was `step` ago.
    pub fn look(&mut self, hands: &[Hand], step: Duration) -> Vec<Overdue> {
        let mut overdue = Vec::new();
        for (hand, (seen, age)) in hands.iter().zip(&mut self.seen) {
            let order = hand.order.load(Ordering::Relaxed);
            let begun = hand.begun.load(Ordering::Relaxed);
            if order == 0 || begun != *seen {
                (*seen, *age) = (begun, Duration::ZERO);
                continue;
            }
            let before = *age;
            *age += step;
            let passed = |limit: Option<Duration>| limit.is_some_and(|limit| before < limit && *age >= limit);
            if passed(self.soft) || passed(self.hard) {
                let at = hand.at.load(Ordering::Relaxed);
                overdue.push(Overdue { order, at, hard: passed(self.hard) });
            }
        }
        overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_secs(1);

    #[test]
    fn an_id_is_overdue_once_at_each_limit() {
        let hands = [Hand::default(), Hand::default()];
        let mut watch = Watch::new(2, Some(STEP * 2), Some(STEP * 4));
        hands[0].take(7);
        hands[0].begin(3);
        let seen: Vec<_> = (0..8).map(|_| watch.look(&hands, STEP)).collect();
        let overdue = |hard| vec![Overdue { order: 7, at: 3, hard }];
        assert_eq!(seen[2], overdue(false), "{seen:?}");
        assert_eq!(seen[4], overdue(true), "{seen:?}");
        assert_eq!(seen.concat().len(), 2, "{seen:?}");
    }

    #[test]
    fn the_next_id_has_its_own_time() {
        let hands = [Hand::default()];
        let mut watch = Watch::new(1, None, Some(STEP * 2));
        hands[0].take(7);
        for at in 0..10 {
            hands[0].begin(at);
            assert_eq!(watch.look(&hands, STEP), []);
            assert_eq!(watch.look(&hands, STEP), []);
        }
        hands[0].put_down();
        assert!((0..5).all(|_| watch.look(&hands, STEP).is_empty()), "an idle hand is never overdue");
    }
}
