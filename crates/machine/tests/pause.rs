//! Invariant 5: between stopping and resuming the vCPUs nothing is allocated.

// UNSAFETY: a global allocator that counts.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "the guests of the other tests")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nix::unistd::{getpid, gettid};
use outlive_dirty::BackendChoice;
use outlive_epoch::image::StateVersions;
use outlive_machine::{
    After, DiskOptions, InPause, MAX_VCPUS, Machine, NoSink, Options, Outgoing, PortEnd, SLOTS, SpillError,
};
use support::{TWO_COUNTERS, boot, host, options};
use tempfile::NamedTempFile;

static COUNTS: AtomicBool = AtomicBool::new(false);
static CALLS: AtomicU64 = AtomicU64::new(0);

struct Counting;

/// The main thread, if the test runs on another: it says when a test takes long, and allocates for it.
static HARNESS: AtomicI32 = AtomicI32::new(0);

fn count() {
    if COUNTS.load(Ordering::Relaxed) && gettid().as_raw() != HARNESS.load(Ordering::Relaxed) {
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

    fn spill(&mut self, _staging: &mut Outgoing) -> Result<(), SpillError> {
        Ok(())
    }
}

/// As many disks as a machine has slots for beside its entropy device and its console.
fn full_board() -> Vec<NamedTempFile> {
    let disk = |_| {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file
    };
    (0..SLOTS - 2).map(disk).collect()
}

/// The only test of its process, because every thread counts: so the vCPU threads' saving, harvesting and
/// copying is included.
#[test]
fn a_pause_allocates_nothing() {
    if gettid() != getpid() {
        HARNESS.store(getpid().as_raw(), Ordering::Relaxed);
    }
    COUNTS.store(true, Ordering::Relaxed);
    drop(std::hint::black_box(Box::new([0u8; 64])));
    COUNTS.store(false, Ordering::Relaxed);
    assert!(CALLS.load(Ordering::Relaxed) >= 2, "the count counts");
    let Some(host) = host() else { return };
    // As many vCPUs and devices as a VM can have bring the most state.
    let full = full_board();
    for (tracker, vcpus, rounds, disks) in [
        (BackendChoice::Ring, 2, 500, None),
        (BackendChoice::Bitmap, 2, 500, None),
        (BackendChoice::Auto, MAX_VCPUS, 40, Some(&full)),
    ] {
        let mut options: Options = options(vcpus, tracker);
        if let Some(disks) = disks {
            options.rng = true;
            options.console = Some(PortEnd::new(Arc::new(NoSink)).unwrap());
            options.serial = Some(PortEnd::new(Arc::new(NoSink)).unwrap());
            let disk = |file: &NamedTempFile| DiskOptions { queues: 16, ..DiskOptions::new(file.path()) };
            options.disks = disks.iter().map(disk).collect();
        }
        let mut machine = Machine::new(host.clone(), &options).unwrap();
        boot(&mut machine, TWO_COUNTERS);
        machine.resume();
        machine.enable_tracking().unwrap();
        let mut staging = Outgoing::new(256, 0).unwrap();
        // The first one sizes the scratch buffers.
        machine.checkpoint(&mut staging, After::Resume, &mut Nothing).unwrap();
        // Of those that are counted the first is a base, which has the most state, in a buffer that is new.
        machine.next_is_base(StateVersions::NEWEST);
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
