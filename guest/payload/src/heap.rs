//! The global allocator: one fixed region, given once at boot.
//!
//! Only vCPU 0 allocates. Every allocation whose size a client can influence goes through `try_reserve`; the
//! rest is made at boot, so running out at run time is an error reply and never an abort.

use spinning_top::RawSpinlock;
use talc::TalcLock;
use talc::source::Manual;

#[global_allocator]
static HEAP: TalcLock<RawSpinlock, Manual> = TalcLock::new(Manual);

/// Hands `[start, start + len)` to the allocator. False when the region is too small to be a heap.
///
/// # Safety
/// The region is RAM that nothing else uses, forever.
pub unsafe fn init(start: usize, len: usize) -> bool {
    // SAFETY: the caller's promise is `claim`'s requirement.
    unsafe { HEAP.lock().claim(start as *mut u8, len) }.is_some()
}
