//! Computing ids: on a rayon pool, in a pool process, or one id at a time in isolated processes.
//!
//! The pool splits a batch over the cores in short pieces and computes each id behind a panic guard. The thread that
//! computed an id writes its row into typed columns. The worker joins the pieces of a batch and packs them into one
//! block (`block`).
//!
//! A thread cannot be killed, so the pool runs in a child process (`pool_process`): an id that crashes or overruns its
//! limits costs that process, not the worker. Isolated processes then compute the lost ids one at a time (`isolated`).
//! Only an id that kills its process, or forces the worker to kill it, becomes a dead letter. Both kinds are a
//! `process` with everything that it started (`group`) and prints (`output`); `child` is the other end.

mod ahead;
pub(crate) mod block;
mod cgroup;
mod child;
mod child_link;
mod computed;
mod cores;
mod frames;
mod function;
pub(crate) mod group;
mod guard;
mod id_queue;
mod isolated;
mod leaks;
mod order;
mod output;
mod piece_slot;
mod pool;
mod pool_process;
mod process;
mod protocol;
mod results;
mod row;
mod watch;

pub use block::Maker;
pub use child::child_main;
pub use computed::{BatchKey, Computed};
pub use cores::{Cores, Place};
pub use function::{AnyFunction, Function};
pub use pool::Pool;
pub(crate) use process::SILENT;
pub(crate) use results::{FULL, Results};
pub use row::Rows;

/// Cores that this process may use, by its affinity and its cgroup's quota.
pub fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use millstream::{Failure, Outcome, Pipeline};
    use serde::ser::SerializeStruct;
    use serde::{Deserialize, Serialize};

    use super::*;

    struct Picky;

    #[derive(Serialize, Deserialize)]
    struct Doubled {
        doubled: u64,
    }

    impl Pipeline for Picky {
        const NAME: &'static str = "picky";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("doubled", "UInt64")];
        type Id = u64;
        type Row = Doubled;

        fn compute(&self, id: &u64) -> Outcome<Doubled> {
            match id % 1000 {
                1 => panic!("odd one: {id}"),
                2 => Err(Failure::reject("never")),
                3 => Err(Failure::retry("not yet")),
                _ => Ok(Doubled { doubled: id * 2 }),
            }
        }
    }

    /// Rows that are slow to write.
    struct Slow;

    #[derive(Deserialize)]
    struct Late {
        number: u64,
    }

    impl Serialize for Late {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let mut row = serializer.serialize_struct("Late", 1)?;
            row.serialize_field("number", &self.number)?;
            row.end()
        }
    }

    impl Pipeline for Slow {
        const NAME: &'static str = "slow";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("number", "UInt64")];
        type Id = u64;
        type Row = Late;

        fn compute(&self, id: &u64) -> Outcome<Late> {
            Ok(Late { number: *id })
        }
    }

    #[tokio::test]
    async fn writing_rows_counts_as_encoding() {
        let pool = pool_of(Slow);
        let Computed { rows, spent, .. } = pool.compute((0..100).collect(), true).await;
        // A thread sleeps at least as long as asked, and the estimate treats untimed rows like timed ones.
        assert_eq!(rows.count(), 100);
        assert!(spent.encoding >= std::time::Duration::from_millis(200), "{spent:?}");
    }

    fn pool_of<P: Pipeline>(pipeline: P) -> Pool<P::Id> {
        let function = Function::of(Arc::new(pipeline)).expect("sound");
        Pool::start(function, 2).expect("two threads")
    }

    #[tokio::test]
    async fn every_id_yields_one_row() {
        let ids: Vec<u64> = (0..5000).collect();
        let computed = pool_of(Picky).compute(ids.clone(), true).await;
        assert_eq!((computed.ids, computed.rows.count()), (ids, 5000));
        let dead: Vec<u32> = computed.rows.dead.iter().map(|(at, _)| *at).collect();
        let wanted: Vec<u32> = (0..5000).filter(|id| (1..=3).contains(&(id % 1000))).collect();
        assert_eq!(dead, wanted);
        let [panicked, rejected, gave_up] = [3, 4, 5].map(|dead| computed.rows.dead[dead].1.as_str());
        assert!(panicked.starts_with("panicked at ") && panicked.ends_with(": odd one: 1001"), "{panicked}");
        assert_eq!((rejected, gave_up), ("never", "gave up after every attempt: not yet"));
    }

    /// Rows, some of which panic while they are written.
    struct Shaky;

    #[derive(Deserialize)]
    struct Loose {
        number: u64,
    }

    impl Serialize for Loose {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut row = serializer.serialize_struct("Loose", 1)?;
            row.serialize_field("number", &self.number)?;
            assert!(self.number % 10 != 7, "a row that ends in 7");
            row.end()
        }
    }

    impl Pipeline for Shaky {
        const NAME: &'static str = "shaky";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("number", "UInt64")];
        type Id = u64;
        type Row = Loose;

        fn compute(&self, id: &u64) -> Outcome<Loose> {
            Ok(Loose { number: *id })
        }
    }

    #[tokio::test]
    async fn a_panic_while_a_row_is_written_costs_one_id() {
        let computed = pool_of(Shaky).compute((0..100).collect(), true).await;
        assert_eq!((computed.ids.len(), computed.rows.count(), computed.rows.dead.len()), (100, 100, 10));
        let (at, reason) = &computed.rows.dead[0];
        assert!(*at == 7 && reason.ends_with(": a row that ends in 7"), "{at}: {reason}");
    }

    #[tokio::test]
    async fn ids_that_ask_for_another_attempt_have_no_row_yet() {
        let computed = pool_of(Picky).compute((0..10).collect(), false).await;
        assert_eq!(computed.again, [(3, "not yet".to_owned())]);
        assert_eq!(computed.ids, [0, 1, 2, 4, 5, 6, 7, 8, 9]);
        assert_eq!(computed.rows.count(), 9);
    }

    #[tokio::test]
    async fn panics_do_not_shrink_the_pool() {
        let pool = pool_of(Picky);
        for _ in 0..100 {
            assert_eq!(pool.compute(vec![1], false).await.rows.dead.len(), 1);
        }
        assert_eq!(pool.compute(vec![4, 5, 6, 7], false).await.rows.dead.len(), 0);
    }
}
