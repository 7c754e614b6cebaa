//! How much memory a piece of code takes at its peak.

use peak_alloc::PeakAlloc;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// What the test's own harness, on another thread, may take meanwhile.
const HARNESS: usize = 16 << 10;

/// Runs `read`, which may have at most `limit` bytes on the heap at once beyond what is there already.
///
/// Counts the whole process: nothing else may allocate meanwhile.
pub(crate) fn bounded<T>(limit: usize, read: impl FnOnce() -> T) -> T {
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    let value = read();
    let taken = HEAP.peak_usage().saturating_sub(before);
    assert!(taken <= limit + HARNESS, "{taken} bytes were on the heap at once, {limit} are allowed");
    value
}
