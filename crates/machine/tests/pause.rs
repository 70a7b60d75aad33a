//! Invariant 5: between stopping and resuming the vCPUs nothing is allocated.

// UNSAFETY: a global allocator that counts.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "the guests of the other tests")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use outlive_dirty::BackendChoice;
use outlive_epoch::image::StateVersions;
use outlive_machine::{After, InPause, MAX_VCPUS, Outgoing};
use support::{TWO_COUNTERS, booted, host};

static COUNTS: AtomicBool = AtomicBool::new(false);
static CALLS: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn count() {
    if COUNTS.load(Ordering::Relaxed) {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Nothing;

impl InPause for Nothing {
    fn counted(&mut self, _pages: usize) {}

    fn spill(&mut self, _staging: &mut Outgoing) -> Result<(), String> {
        Ok(())
    }
}

/// The only test of its process, because every thread counts: so the vCPU threads' saving, harvesting and
/// copying is included.
#[test]
fn a_pause_allocates_nothing() {
    COUNTS.store(true, Ordering::Relaxed);
    drop(std::hint::black_box(Box::new([0u8; 64])));
    COUNTS.store(false, Ordering::Relaxed);
    assert!(CALLS.load(Ordering::Relaxed) >= 2, "the count counts");
    let Some(host) = host() else { return };
    // As many vCPUs as a VM can have bring the most state.
    for (tracker, vcpus, rounds) in
        [(BackendChoice::Ring, 2, 500), (BackendChoice::Bitmap, 2, 500), (BackendChoice::Auto, MAX_VCPUS, 40)]
    {
        let (mut machine, _events) = booted(&host, vcpus, tracker, TWO_COUNTERS);
        machine.resume();
        machine.enable_tracking().unwrap();
        let mut staging = Outgoing::new(256, 0).unwrap();
        // The first one sizes the scratch buffers.
        machine.checkpoint(&mut staging, After::Resume, &mut Nothing).unwrap();
        // Of those that are counted the first is a base, which has the most state, in a buffer that is new.
        machine.begin_base(StateVersions::NEWEST);
        let mut staging = Outgoing::new(256, 0).unwrap();
        for round in 0..rounds {
            std::thread::sleep(Duration::from_micros(100 + round % 7 * 50));
            if round % 5 == 0 {
                // Enough pages for the parallel copy.
                machine.ram().log().mark_range(0x80_0000, 150 * 4096);
            }
            CALLS.store(0, Ordering::Relaxed);
            COUNTS.store(true, Ordering::Relaxed);
            let report = machine.checkpoint(&mut staging, After::Resume, &mut Nothing);
            COUNTS.store(false, Ordering::Relaxed);
            let calls = CALLS.load(Ordering::Relaxed);
            assert_eq!(calls, 0, "checkpoint {round} of {:?} pages", report.unwrap().pages);
        }
    }
}
