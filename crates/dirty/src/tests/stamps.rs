//! The test that matters: guests write at random, and a copy made of nothing but the reported pages is compared
//! with guest memory after every epoch.
// UNSAFETY: writes guest memory through a raw pointer, as kernel and device writes do.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::guest::{self, AREAS, Guest, Job, Rain, Stop, Vcpu};
use crate::{Choice, Config, Exit, Hot, Tracker};

const CONFIG: Config = Config { vcpus: 0, max_dirty_pages: 600, trigger: 300, exact: false, hot: Hot::Off };

/// Splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

#[derive(Debug, Default)]
struct Outcome {
    epochs: u64,
    pages: u64,
    /// Pages that were written and not reported, over all epochs.
    missed: usize,
    listed_twice: usize,
    /// vCPU runs that a signal ended.
    interrupted: u64,
}

/// One epoch of a vCPU thread: run, then stop where the dice say, then save and harvest.
fn vcpu_epoch(vcpu: &mut Vcpu, index: usize, job: Job, tracker: &Tracker, random: &mut Random) -> u64 {
    vcpu.set_job(job);
    let mut interrupted = 0;
    loop {
        match vcpu.run() {
            Stop::Done => break,
            Stop::RingFull => {
                if tracker.ring_full(index).unwrap() == Exit::DirtyLogFull {
                    break;
                }
            }
            Stop::Signal => {
                interrupted += 1;
                match random.below(8) {
                    0 => break,
                    1 => drop(tracker.harvest_vcpu(index).unwrap()),
                    _ => (),
                }
            }
        }
    }
    vcpu.save();
    // Sometimes it leaves the harvest to the thread that ends the epoch.
    if random.below(4) != 0 {
        tracker.harvest_vcpu(index).unwrap();
    }
    interrupted
}

/// What a device does while the guest runs: writes through `vm-memory`, and through a pointer.
fn device_writes(guest: &Guest, stamp: u64, random: &mut Random) {
    for _ in 0..random.below(8) {
        let (base, pages) = AREAS[random.below(2) as usize];
        let gpa = base + random.below(pages) * 4096;
        guest.memory.write_obj(stamp, GuestAddress(gpa + 8)).unwrap();
        let gpa = base + random.below(pages) * 4096;
        let target = guest.memory.get_host_address(GuestAddress(gpa + 16)).unwrap();
        // SAFETY: 8 aligned bytes inside a page of guest memory; the guest writes others.
        unsafe { target.cast::<u64>().write_volatile(stamp) };
        guest.global.mark_range(gpa + 16, 8);
    }
}

/// Runs epochs and compares. The vCPU threads talk by channels, so that a failed one ends the test.
fn run(mut guest: Guest, epochs: u64, rain_period: Duration) -> Outcome {
    let vcpus = std::mem::take(&mut guest.vcpus);
    let tracker = guest.tracker.clone();
    let mut outcome = Outcome::default();
    tracker.enable().unwrap();
    let mut shadow = guest.shadow();
    std::thread::scope(|scope| {
        let (stopped, has_stopped) = channel();
        let jobs: Vec<Sender<Job>> = vcpus
            .into_iter()
            .enumerate()
            .map(|(index, vcpu)| {
                let (send, receive) = channel();
                let (stopped, tracker) = (stopped.clone(), &tracker);
                scope.spawn(move || vcpu_thread(vcpu, index, receive, stopped, tracker));
                send
            })
            .collect();
        drop(stopped);
        let mut threads = vec![guest::this_thread()];
        threads.extend(jobs.iter().map(|_| has_stopped.recv().unwrap().1));
        let rain = Rain::on(threads, rain_period);
        let mut random = Random(7);
        for stamp in 1..=epochs {
            for job in &jobs {
                let (writes, area) = (1 + random.below(400), random.below(2) as usize);
                job.send(Job { stamp, writes, area }).unwrap();
            }
            device_writes(&guest, stamp, &mut random);
            jobs.iter().for_each(|_| outcome.interrupted += has_stopped.recv().unwrap().0);
            end_epoch(&guest, &mut shadow, &mut outcome, random.below(20) == 0);
        }
        // Before the threads end.
        drop(rain);
        drop(jobs);
    });
    tracker.disable().unwrap();
    println!("{outcome:?} {:?}", tracker.stats());
    outcome
}

fn vcpu_thread(
    mut vcpu: Vcpu,
    index: usize,
    jobs: Receiver<Job>,
    stopped: Sender<(u64, libc::pthread_t)>,
    tracker: &Tracker,
) {
    let mut random = Random(index as u64);
    stopped.send((0, guest::this_thread())).unwrap();
    for job in jobs {
        let interrupted = vcpu_epoch(&mut vcpu, index, job, tracker, &mut random);
        stopped.send((interrupted, guest::this_thread())).unwrap();
    }
}

fn end_epoch(guest: &Guest, shadow: &mut guest::Shadow, outcome: &mut Outcome, drop_first: bool) {
    if drop_first {
        // An epoch that fails half way: its pages must come again.
        drop(guest.tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap());
    }
    let epoch = guest.tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    shadow.copy(guest, epoch.pages());
    outcome.epochs += 1;
    outcome.pages += epoch.pages().len() as u64;
    let unique: BTreeSet<_> = epoch.pages().iter().collect();
    outcome.listed_twice += epoch.pages().len() - unique.len();
    epoch.copied().run();
    let missed = shadow.differences(guest);
    outcome.missed += missed.len();
    // So that a page is counted once.
    shadow.copy(guest, &missed);
}

fn no_page_is_missed(choice: Choice, vcpus: usize) {
    let Some(guest) = guest::start(choice, vcpus, Config { vcpus, ..CONFIG }) else { return };
    let outcome = run(guest, 400, Duration::from_millis(1));
    assert_eq!((outcome.missed, outcome.listed_twice), (0, 0));
    assert!(outcome.pages > 20_000 && outcome.interrupted > 0, "the test has tested nothing");
}

#[test]
fn ring_one_vcpu() {
    no_page_is_missed(Choice::Ring, 1);
}

#[test]
fn ring_two_vcpus() {
    no_page_is_missed(Choice::Ring, 2);
}

#[test]
fn bitmap_one_vcpu() {
    no_page_is_missed(Choice::Bitmap, 1);
}

#[test]
fn bitmap_two_vcpus() {
    no_page_is_missed(Choice::Bitmap, 2);
}

#[test]
fn the_test_notices_a_lost_page() {
    for choice in [Choice::Ring, Choice::Bitmap] {
        let Some(guest) = guest::start_planted(choice, 1, Config { vcpus: 1, ..CONFIG }, 1000) else {
            return;
        };
        let outcome = run(guest, 100, Duration::from_millis(1));
        assert!(outcome.missed > 0, "{outcome:?}");
    }
}

/// Signals come at their densest while rings of thousands of pages are reset.
#[test]
fn blocked_signals_cut_no_reset_short() {
    let config = Config { vcpus: 1, max_dirty_pages: 3000, trigger: 3000, ..CONFIG };
    let Some(guest) = guest::start(Choice::Ring, 1, config) else { return };
    let tracker = guest.tracker.clone();
    let outcome = run(guest, 300, Duration::from_micros(20));
    assert_eq!((outcome.missed, outcome.listed_twice), (0, 0));
    assert_eq!(tracker.stats().full_rearms, 0);
}

/// With signals left in, this kernel loses pages at resets (6.17 and later). The tracker sees a reset that was cut
/// short and write-protects everything. What nobody can see is a signal between the last entry and the end of the
/// reset, which is why they are blocked.
#[test]
fn a_reset_that_is_cut_short_is_noticed() {
    let config = Config { vcpus: 1, max_dirty_pages: 3000, trigger: 3000, ..CONFIG };
    let Some(guest) = guest::start_with(Choice::Ring, 1, config, false, 0) else { return };
    let tracker = guest.tracker.clone();
    let outcome = run(guest, 300, Duration::from_micros(20));
    let cut = tracker.stats().full_rearms;
    println!("{cut} resets were cut short, {} pages missed", outcome.missed);
    assert!(outcome.missed as u64 <= 5 + cut / 5, "{outcome:?}");
}
