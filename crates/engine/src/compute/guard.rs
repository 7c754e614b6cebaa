//! The guard around the user's code: a panic becomes a dead letter of its id.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{Once, OnceLock};

use millstream::{Failure, Outcome};

thread_local! {
    /// Whether the user's function runs on this thread.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    /// Where the user's function panicked last on this thread.
    static PANICKED_AT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Receives each panic of the user's function before it unwinds, because the process may not live to answer.
type Witness = Box<dyn Fn(&str) + Send + Sync>;
static WITNESS: OnceLock<Witness> = OnceLock::new();

/// Runs after an id failed, and ends this process if it is no longer fit to judge ids.
type Fitness = Box<dyn Fn() + Send + Sync>;
static FITNESS: OnceLock<Fitness> = OnceLock::new();

/// Sets the check that runs after each failed id: if earlier ids have used up the process, it ends there without an
/// answer.
pub(super) fn ask_when_ids_fail(fitness: impl Fn() + Send + Sync + 'static) {
    let _second = FITNESS.set(Box::new(fitness));
}

#[cold]
fn has_failed() {
    if let Some(fitness) = FITNESS.get() {
        fitness();
    }
}

/// Runs the user's function; a panic becomes a rejection with its message and place. Inlined, because it runs for every
/// id: a call and a value with a destructor cost 6 % of the lightest function.
#[inline]
pub(super) fn guarded<R>(compute: impl FnOnce() -> Outcome<R>) -> Outcome<R> {
    let outer = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(compute));
    GUARDED.set(outer);
    let outcome = outcome.unwrap_or_else(|payload| Err(Failure::Reject(panicked(payload))));
    if outcome.is_err() {
        has_failed();
    }
    outcome
}

#[cold]
fn panicked(payload: Box<dyn Any + Send>) -> String {
    let reason = panic_reason(&PANICKED_AT.take(), panic_message(payload.as_ref()));
    // Dropping a payload can panic too.
    drop(catch_unwind(AssertUnwindSafe(|| drop(payload))));
    reason
}

fn panic_reason(place: &str, message: &str) -> String {
    match place {
        // The panic happened on another thread, which this one has joined.
        "" => format!("panicked: {message}"),
        place => format!("panicked at {place}: {message}"),
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Passes panics of the user's function to `witness`.
pub(super) fn tell_panics(witness: impl Fn(&str) + Send + Sync + 'static) {
    install_panic_hook();
    // The first witness stays: a process has one worker.
    let _second = WITNESS.set(Box::new(witness));
}

/// Turns panics of the user's function into dead letters instead of reports on stderr: one bad id in a thousand would
/// flood the log.
pub(super) fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if !GUARDED.try_with(Cell::get).unwrap_or(false) {
                return usual(info);
            }
            let place = info.location().map_or_else(String::new, ToString::to_string);
            if let Some(witness) = WITNESS.get() {
                witness(&panic_reason(&place, panic_message(info.payload())));
            }
            // A thread that is ending has no thread-local value left, and needs none.
            let _ending = PANICKED_AT.try_with(|at| at.replace(place));
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_within_an_id_leaves_the_outer_one_guarded() {
        install_panic_hook();
        let outcome = guarded::<()>(|| {
            let inner = guarded::<()>(|| panic!("inner"));
            assert!(matches!(inner, Err(Failure::Reject(why)) if why.ends_with(": inner")));
            panic!("outer")
        });
        let Err(Failure::Reject(why)) = outcome else { panic!("{outcome:?}") };
        assert!(why.starts_with("panicked at crates/") && why.ends_with(": outer"), "{why}");
    }
}
