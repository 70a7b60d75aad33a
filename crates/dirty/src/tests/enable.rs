//! Tracking is turned on and off while the guest runs and writes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::guest::{self, Guest, Job, Stop, Vcpu};
use crate::{BackendChoice, Tracker, TrackerConfig};

/// Rounds of a test: each turns tracking on and off once.
const ROUNDS: u64 = 25;

/// Writes until it is told to stop, each time with a new stamp: a page that is written unseen then differs
/// from every earlier copy.
fn write_on(vcpu: &mut Vcpu, stamp: &AtomicU64, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let stamp = stamp.fetch_add(1, Ordering::Relaxed);
        vcpu.set_job(Job { stamp, writes: 3000, area: 1 });
        // An exact trigger may stop it; then it writes nothing more until the epoch or tracking ends.
        assert_ne!(vcpu.run(), Stop::Signal);
    }
}

/// Does `work` while all vCPUs write, with some time for them before and after it.
fn while_they_write<T>(vcpus: &mut [Vcpu], stamp: &AtomicU64, work: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for vcpu in vcpus {
            scope.spawn(|| write_on(vcpu, stamp, &stop));
        }
        std::thread::sleep(Duration::from_millis(1));
        let result = work();
        std::thread::sleep(Duration::from_millis(2));
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// Rounds, and pages that were written after `enable` had returned and were not reported.
fn missed(guest: &mut Guest, enable: impl Fn(&Tracker)) -> (u64, usize) {
    let mut vcpus = std::mem::take(&mut guest.vcpus);
    let guest = &*guest;
    let stamp = AtomicU64::new(1);
    let (mut missed, mut reported) = (0, 0);
    for _ in 0..ROUNDS {
        let mut shadow = while_they_write(&mut vcpus, &stamp, || {
            enable(&guest.tracker);
            guest.shadow()
        });
        let epoch = guest.tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
        shadow.copy(guest, epoch.pages());
        reported += epoch.pages().len() as u64;
        epoch.copied().run();
        missed += shadow.differences(guest).len();
        while_they_write(&mut vcpus, &stamp, || guest.tracker.disable().unwrap());
    }
    println!("{reported} pages reported, {missed} missed");
    (reported, missed)
}

fn nothing_is_missed(choice: BackendChoice, config: TrackerConfig) {
    let Some(mut guest) = guest::start(choice, config) else { return };
    let (reported, missed) = missed(&mut guest, |tracker| tracker.enable().unwrap());
    assert_eq!(missed, 0);
    assert!(reported > 100 * ROUNDS, "the guest has written next to nothing: {reported}");
}

fn config(exact: bool) -> TrackerConfig {
    TrackerConfig { max_vcpus: 2, max_dirty_pages: 5000, trigger: 4000, exact, ..TrackerConfig::default() }
}

#[test]
fn a_ring_that_is_enabled_while_the_guest_runs_misses_nothing() {
    nothing_is_missed(BackendChoice::Ring, config(false));
}

#[test]
fn an_exact_ring_that_is_enabled_while_the_guest_runs_misses_nothing() {
    nothing_is_missed(BackendChoice::Ring, config(true));
}

#[test]
fn a_clear_log_that_is_enabled_while_the_guest_runs_misses_nothing() {
    nothing_is_missed(BackendChoice::ClearLog, config(false));
}

#[test]
fn a_bitmap_that_is_enabled_while_the_guest_runs_misses_nothing() {
    nothing_is_missed(BackendChoice::Bitmap, config(false));
}
