//! No allocation in the cycle: counted by the allocator of the test program, thread by thread.
// UNSAFETY: an allocator; passes everything on to the system's.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use super::guest::{self, Job, Stop};
use crate::{BackendChoice, Fetch, Gfn, HotPages, HotRule, TrackerConfig};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

#[test]
fn the_count_works() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 2);
}

fn ten_thousand_epochs(choice: BackendChoice, exact: bool) {
    // So small that lists overflow, too.
    let hot = HotPages::Rule(HotRule { max_gap: 8, traps: 2, probe_after: 8, max_pages: 200, trap_ns: 0 });
    let config = TrackerConfig { max_vcpus: 1, max_slots: 4, max_dirty_pages: 40, trigger: 20, exact, hot };
    let Some(mut guest) = guest::start(choice, config) else { return };
    let tracker = guest.tracker.clone();
    let mut vcpu = guest.vcpus.remove(0);
    tracker.enable_stopped().unwrap();
    let mut buffer = [Gfn(0); 8];
    let (mut count, mut pages) = (0, 0);
    let epochs = super::stamps::epochs(10_000);
    for stamp in 1..=epochs {
        vcpu.set_job(Job { stamp, writes: stamp % 60 + 1, area: usize::from(stamp % 64 == 0) });
        loop {
            let stop = vcpu.run();
            count += allocations(|| match stop {
                Stop::RingFull => assert!(tracker.ring_full(0).is_ok()),
                _ => assert!(tracker.fetch(&mut buffer, Fetch::default()).unwrap().rearm().is_ok()),
            });
            if stop != Stop::Signal {
                break;
            }
        }
        vcpu.save();
        count += allocations(|| {
            (0..stamp % 90).for_each(|page| guest.global.mark(Gfn(page)));
            tracker.should_stop();
            tracker.harvest_vcpu(0).unwrap();
            let epoch = tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
            pages += epoch.pages().len();
            drop(tracker.part(0, 1));
            epoch.copied().run();
        });
    }
    println!("{choice:?}: {pages} pages {:?}", tracker.stats());
    assert_eq!(count, 0);
    assert!(pages as u64 > 10 * epochs);
}

#[test]
fn an_epoch_of_the_ring_allocates_nothing() {
    ten_thousand_epochs(BackendChoice::Ring, false);
}

#[test]
fn an_epoch_with_an_exact_trigger_allocates_nothing() {
    ten_thousand_epochs(BackendChoice::Ring, true);
}

#[test]
fn an_epoch_of_the_clear_log_allocates_nothing() {
    ten_thousand_epochs(BackendChoice::ClearLog, false);
}

#[test]
fn an_epoch_of_the_bitmap_allocates_nothing() {
    ten_thousand_epochs(BackendChoice::Bitmap, false);
}
