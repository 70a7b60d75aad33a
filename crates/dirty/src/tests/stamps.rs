//! The most important test: guests write at random, and a copy made of nothing but the reported pages is
//! compared with guest memory after every epoch.
// UNSAFETY: writes guest memory through a raw pointer, as kernel and device writes do.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::guest::{self, AREAS, Guest, Job, Rain, Setup, Stop, Vcpu};
use crate::{
    BackendChoice, Fetch, Gfn, HarvestError, HotPages, HotRule, RingExit, Shard, Tracker, TrackerConfig,
    TrackerStats,
};

/// Pages become hot after two writes, are written more often than not, and are probed often.
const HOT: HotPages =
    HotPages::Rule(HotRule { max_gap: 4, traps: 2, probe_after: 6, max_pages: 300, trap_ns: 0 });

fn config(vcpus: usize) -> TrackerConfig {
    TrackerConfig {
        max_vcpus: vcpus,
        max_slots: 0,
        max_dirty_pages: 600,
        trigger: 300,
        exact: false,
        hot: HotPages::Off,
    }
}

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
    stats: TrackerStats,
}

/// One epoch of a vCPU thread: run, then stop at a random moment, then save and harvest.
fn vcpu_epoch(vcpu: &mut Vcpu, index: usize, job: Job, tracker: &Tracker, random: &mut Random) -> u64 {
    vcpu.set_job(job);
    let mut interrupted = 0;
    loop {
        match vcpu.run() {
            Stop::Done => break,
            Stop::RingFull => {
                if tracker.ring_full(index).unwrap() == RingExit::DirtyLogFull {
                    break;
                }
            }
            Stop::Signal => {
                interrupted += 1;
                match random.below(8) {
                    0 => break,
                    1 => harvest(tracker, index),
                    _ => (),
                }
            }
        }
    }
    // KVM writes the wall clock and its version, outside KVM_RUN.
    if random.below(8) == 0 {
        let (base, pages) = AREAS[random.below(2) as usize];
        vcpu.set_wall_clock(base + random.below(pages) * 4096 + 1024);
    }
    vcpu.save();
    // Sometimes it leaves the harvest to the thread that ends the epoch.
    if random.below(4) != 0 {
        harvest(tracker, index);
    }
    interrupted
}

fn harvest(tracker: &Tracker, vcpu: usize) {
    match tracker.harvest_vcpu(vcpu) {
        // A fetcher is using the list.
        Ok(_) | Err(HarvestError::Busy { .. }) => (),
        Err(error) => panic!("{error}"),
    }
}

/// A device's work while the guest runs: it writes through `vm-memory`, and through a pointer.
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

/// Activity beside the vCPUs.
#[derive(Clone, Copy)]
struct Weather {
    epochs: u64,
    /// Time between two signals to each thread.
    rain: Duration,
    /// Threads that fetch pages while the guest runs.
    fetchers: usize,
    /// Shards to fetch, in turn, each without a lock over reading and sending. With 0 there are no shards but
    /// a lock.
    shards: u32,
}

const STORM: Weather = Weather { epochs: 2000, rain: Duration::from_millis(1), fetchers: 0, shards: 0 };

/// Epochs of a test: fewer if OUTLIVE_TEST_EPOCHS says so, as it does in emulated hosts.
pub(super) fn epochs(most: u64) -> u64 {
    let wanted = std::env::var("OUTLIVE_TEST_EPOCHS").ok().and_then(|text| text.parse().ok());
    wanted.map_or(most, |wanted: u64| wanted.clamp(20, most))
}

/// Runs epochs and compares. The vCPU threads talk by channels, so that a failed one ends the test.
fn run(mut guest: Guest, weather: Weather) -> Outcome {
    let vcpus = std::mem::take(&mut guest.vcpus);
    let count = vcpus.len();
    let tracker = guest.tracker.clone();
    let mut outcome = Outcome::default();
    tracker.enable_stopped().unwrap();
    let shadow = Mutex::new(guest.shadow());
    let running = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (stopped, has_stopped) = channel();
        let mut jobs: Vec<Sender<Job>> = Vec::new();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (send, receive) = channel();
            let (stopped, tracker) = (stopped.clone(), &tracker);
            scope.spawn(move || vcpu_thread(vcpu, index, receive, stopped, tracker));
            jobs.push(send);
        }
        for index in 0..weather.fetchers {
            let (send, receive) = channel();
            let (stopped, guest, shadow, running) = (stopped.clone(), &guest, &shadow, &running);
            let shard =
                (weather.shards > 0).then(|| Shard::new(index as u32 % weather.shards, weather.shards));
            let shard = shard.flatten();
            scope.spawn(move || fetcher_thread((index, shard), receive, stopped, guest, shadow, running));
            jobs.push(send);
        }
        drop(stopped);
        let mut threads = vec![guest::this_thread()];
        threads.extend(jobs.iter().map(|_| has_stopped.recv().unwrap().1));
        let rain = Rain::on(threads, weather.rain);
        let mut random = Random(7);
        for stamp in 1..=epochs(weather.epochs) {
            running.store(count, Ordering::Relaxed);
            for job in &jobs {
                let (writes, area) = (1 + random.below(400), random.below(2) as usize);
                job.send(Job { stamp, writes, area }).unwrap();
            }
            device_writes(&guest, stamp, &mut random);
            for _ in 0..count {
                outcome.interrupted += has_stopped.recv().unwrap().0;
            }
            // The fetchers end after the vCPUs.
            running.store(0, Ordering::Relaxed);
            (0..weather.fetchers).for_each(|_| _ = has_stopped.recv().unwrap());
            end_epoch(&guest, &mut shadow.lock().unwrap(), &mut outcome, random.below(20) == 0);
        }
        // Before the threads end.
        drop(rain);
        drop(jobs);
    });
    outcome.stats = tracker.stats();
    tracker.disable().unwrap();
    println!("{outcome:?}");
    outcome
}

/// Copies pages while the guest runs: each is read after it was armed, so its next write is caught.
fn fetcher_thread(
    (index, shard): (usize, Option<Shard>),
    jobs: Receiver<Job>,
    stopped: Sender<(u64, libc::pthread_t)>,
    guest: &Guest,
    shadow: &Mutex<guest::Shadow>,
    running: &AtomicUsize,
) {
    let mut random = Random(100 + index as u64);
    let mut buffer = [Gfn(0); 50];
    stopped.send((0, guest::this_thread())).unwrap();
    for _ in jobs {
        let began = Instant::now();
        while running.load(Ordering::Relaxed) != 0 {
            assert!(began.elapsed() < Duration::from_secs(20), "a vCPU thread has failed");
            let how = Fetch {
                wait: Some(Duration::from_micros(random.below(300))),
                rearm: random.below(2) == 0,
                shard,
                ..Fetch::default()
            };
            if random.below(20) == 0 {
                guest.tracker.age().unwrap();
            }
            let room = random.below(51) as usize;
            let fetched = guest.tracker.fetch(&mut buffer[..room], how).unwrap();
            // Sometimes it drops them.
            if random.below(10) != 0 {
                let pages = fetched.rearm().unwrap();
                if shard.is_some() {
                    send_late(guest, shadow, pages, &mut random);
                } else {
                    shadow.lock().unwrap().copy(guest, pages);
                }
            }
        }
        stopped.send((0, guest::this_thread())).unwrap();
    }
}

/// Reads pages, and sends them a while later: any other thread that has fetched one of them meanwhile is
/// overtaken.
fn send_late(guest: &Guest, shadow: &Mutex<guest::Shadow>, pages: &[Gfn], random: &mut Random) {
    let read: Vec<_> = pages.iter().map(|&gfn| (gfn, guest.page(gfn).to_vec())).collect();
    if random.below(2) == 0 {
        std::thread::sleep(Duration::from_micros(random.below(300)));
    }
    let mut shadow = shadow.lock().unwrap();
    read.iter().for_each(|(gfn, bytes)| shadow.store(*gfn, bytes));
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

fn no_page_is_missed(choice: BackendChoice, config: TrackerConfig) {
    let Some(guest) = guest::start(choice, config) else { return };
    let outcome = run(guest, STORM);
    assert_eq!((outcome.missed, outcome.listed_twice), (0, 0));
    let epochs = outcome.epochs;
    assert!(outcome.pages > 10 * epochs && outcome.interrupted > 0, "the test has tested nothing");
    assert!(!config.exact || outcome.stats.credits > epochs / 2, "the trigger was not exact: {outcome:?}");
    let hot_expected = config.hot != HotPages::Off && choice != BackendChoice::Bitmap;
    let TrackerStats { heated, cooled, traps_avoided, .. } = outcome.stats;
    assert_eq!(
        heated > epochs / 2 && cooled > epochs / 2 && traps_avoided > 5 * epochs,
        hot_expected,
        "{outcome:?}"
    );
}

macro_rules! no_page_is_missed {
    ($($name:ident: $choice:ident, $vcpus:literal, $hot:expr, $exact:literal;)*) => {$(
        #[test]
        fn $name() {
            no_page_is_missed(BackendChoice::$choice, TrackerConfig { hot: $hot, exact: $exact, ..config($vcpus) });
        }
    )*};
}

no_page_is_missed! {
    ring_one_vcpu: Ring, 1, HotPages::Off, false;
    ring_two_vcpus: Ring, 2, HotPages::Off, false;
    ring_four_vcpus: Ring, 4, HotPages::Off, false;
    ring_hot_one_vcpu: Ring, 1, HOT, false;
    ring_hot_two_vcpus: Ring, 2, HOT, false;
    ring_hot_four_vcpus: Ring, 4, HOT, false;
    ring_exact_one_vcpu: Ring, 1, HOT, true;
    ring_exact_two_vcpus: Ring, 2, HotPages::Off, true;
    ring_exact_four_vcpus: Ring, 4, HOT, true;
    clear_log_one_vcpu: ClearLog, 1, HotPages::Off, false;
    clear_log_two_vcpus: ClearLog, 2, HotPages::Off, false;
    clear_log_four_vcpus: ClearLog, 4, HotPages::Off, false;
    clear_log_hot_one_vcpu: ClearLog, 1, HOT, false;
    clear_log_hot_two_vcpus: ClearLog, 2, HOT, false;
    clear_log_hot_four_vcpus: ClearLog, 4, HOT, false;
    bitmap_one_vcpu: Bitmap, 1, HotPages::Off, false;
    bitmap_two_vcpus: Bitmap, 2, HotPages::Off, false;
    bitmap_four_vcpus: Bitmap, 4, HOT, false;
}

/// Two threads fetch while the guest runs and copy what they get.
fn no_page_is_missed_by_fetchers(choice: BackendChoice, config: TrackerConfig) {
    let Some(guest) = guest::start(choice, config) else { return };
    let outcome = run(guest, Weather { epochs: 500, fetchers: 2, ..STORM });
    assert_eq!((outcome.missed, outcome.listed_twice), (0, 0));
    assert!(outcome.stats.fetched > 10 * outcome.epochs, "the test has tested nothing: {outcome:?}");
}

#[test]
fn fetchers_miss_no_page_of_the_ring() {
    no_page_is_missed_by_fetchers(BackendChoice::Ring, config(2));
}

#[test]
fn fetchers_miss_no_page_of_the_ring_beside_hot_ones() {
    no_page_is_missed_by_fetchers(BackendChoice::Ring, TrackerConfig { hot: HOT, exact: true, ..config(2) });
}

#[test]
fn fetchers_miss_no_page_of_the_clear_log() {
    no_page_is_missed_by_fetchers(BackendChoice::ClearLog, TrackerConfig { hot: HOT, ..config(2) });
}

#[test]
fn fetchers_miss_no_page_of_the_bitmap() {
    no_page_is_missed_by_fetchers(BackendChoice::Bitmap, config(2));
}

/// Only one thread reads and sends each page, so no lock is needed over both.
#[test]
fn shards_let_no_older_copy_overtake_a_newer_one() {
    for choice in [BackendChoice::Ring, BackendChoice::ClearLog, BackendChoice::Bitmap] {
        let config = TrackerConfig { hot: HOT, ..config(2) };
        let Some(guest) = guest::start(choice, config) else { return };
        let outcome = run(guest, Weather { epochs: 150, fetchers: 3, shards: 3, ..STORM });
        assert_eq!((outcome.missed, outcome.listed_twice), (0, 0), "{choice:?}");
        assert!(outcome.stats.fetched > 10 * outcome.epochs, "the test has tested nothing: {outcome:?}");
    }
}

/// The previous test without the shards: three threads that fetch the same shard overtake each other.
#[test]
fn without_shards_older_copies_overtake_newer_ones() {
    let Some(guest) = guest::start(BackendChoice::Ring, config(2)) else { return };
    let outcome = run(guest, Weather { epochs: 100, fetchers: 3, shards: 1, ..STORM });
    assert!(outcome.missed > 0, "{outcome:?}");
}

/// One page in 10,000, or more often, so that a shorter run loses some.
#[test]
fn the_test_notices_a_lost_page() {
    let epochs = epochs(500);
    let planted = if epochs < 500 { 4 * epochs } else { 10_000 };
    for choice in [BackendChoice::Ring, BackendChoice::ClearLog, BackendChoice::Bitmap] {
        let setup = Setup { planted, ..Setup::of(choice, config(1)) };
        let Some(guest) = guest::start_with(setup) else { return };
        let outcome = run(guest, Weather { epochs, ..STORM });
        assert!(outcome.missed > 0, "{choice:?} {outcome:?}");
    }
}

/// A VMM that turns manual protection on unnoticed, with everything dirty at first: a ring would lose the
/// first write to every page.
#[test]
fn initially_set_is_refused() {
    for choice in [BackendChoice::Ring, BackendChoice::Bitmap] {
        let setup = Setup { manual: 3, ..Setup::of(choice, config(1)) };
        let Some(guest) = guest::start_with(setup) else { return };
        let outcome = run(guest, Weather { epochs: 100, ..STORM });
        assert_eq!((outcome.missed, outcome.listed_twice), (0, 0), "{choice:?}");
    }
}

/// The densest signals, while rings of thousands of pages are reset.
#[test]
fn blocked_signals_cut_no_reset_short() {
    let config = TrackerConfig { max_dirty_pages: 3000, trigger: 3000, ..config(1) };
    let Some(guest) = guest::start(BackendChoice::Ring, config) else { return };
    let outcome = run(guest, Weather { epochs: 300, rain: Duration::from_micros(20), ..STORM });
    assert_eq!((outcome.missed, outcome.listed_twice), (0, 0));
    assert_eq!(outcome.stats.full_rearms, 0);
}

/// If signals are not blocked, this kernel loses pages at resets (6.17 and later). The tracker sees a reset
/// that was cut short and write-protects everything. Nobody can see a signal between the last entry and the
/// end of the reset; this is why signals are blocked.
#[test]
fn a_reset_that_is_cut_short_is_noticed() {
    let config = TrackerConfig { max_dirty_pages: 3000, trigger: 3000, ..config(1) };
    let setup = Setup { block_signals: false, ..Setup::of(BackendChoice::Ring, config) };
    let Some(guest) = guest::start_with(setup) else { return };
    let outcome = run(guest, Weather { epochs: 300, rain: Duration::from_micros(20), ..STORM });
    let cut = outcome.stats.full_rearms;
    println!("{cut} resets were cut short, {} pages missed", outcome.missed);
    assert!(outcome.missed as u64 <= 5 + cut / 5, "{outcome:?}");
}
