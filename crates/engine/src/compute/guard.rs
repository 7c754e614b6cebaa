//! The guard around the user's code: a panic becomes its id's dead letter.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{Once, OnceLock};

use millstream::{Failure, Outcome};

thread_local! {
    /// Whether the user's function runs on this thread.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    /// Where it panicked last.
    static PANICKED_AT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Is told of each panic of the user's function before it unwinds, should the process not live to answer.
type Witness = Box<dyn Fn(&str) + Send + Sync>;
static WITNESS: OnceLock<Witness> = OnceLock::new();

/// Is asked, after an id that failed, whether this process is fit to fail it.
type Fitness = Box<dyn Fn() + Send + Sync>;
static FITNESS: OnceLock<Fitness> = OnceLock::new();

/// Has `fitness` asked after each id that fails: a process that ids before it have used up is to end there, without an answer.
pub(super) fn ask_when_ids_fail(fitness: impl Fn() + Send + Sync + 'static) {
    let _second = FITNESS.set(Box::new(fitness));
}

#[cold]
fn has_failed() {
    if let Some(fitness) = FITNESS.get() {
        fitness();
    }
}

/// Runs the user's function; a panic becomes a rejection with its message and place. Inlined, as it is called for every
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
    let told = told(&PANICKED_AT.take(), panic_message(payload.as_ref()));
    // Dropping a payload can panic too.
    drop(catch_unwind(AssertUnwindSafe(|| drop(payload))));
    told
}

fn told(place: &str, message: &str) -> String {
    match place {
        // On another thread, whose end this one has waited for.
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

/// Has panics of the user's function told to `witness` as well.
pub(super) fn tell_panics(witness: impl Fn(&str) + Send + Sync + 'static) {
    install_panic_hook();
    // The first one stays: a process has one worker.
    let _second = WITNESS.set(Box::new(witness));
}

/// Panics of the user's function are dead letters, not reports on stderr: one bad id in a thousand would drown the log.
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
                witness(&told(&place, panic_message(info.payload())));
            }
            // A thread that ends has no place for it, and is not asked for it.
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
