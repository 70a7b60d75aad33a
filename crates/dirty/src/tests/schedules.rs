//! Rare schedules, one by one: in an earlier version each of them lost pages or ended tracking without need.

use std::time::Duration;

use super::guest;
use super::kernel::{FakeKernel, RESERVED, pages};
use crate::{
    AddVcpuError, BackendChoice, DirtyKind, DisableError, Fetch, Gfn, GlobalLog, HotPages, HotRule,
    MemoryLayout, MemorySlot, NewError, RemoveSlotError, RingExit, Tracker, TrackerConfig,
};

const PAGES: u64 = 20_000;
const REARM: Fetch = Fetch { wait: None, rearm: true, at_least: 0, shard: None };

fn layout() -> MemoryLayout {
    MemoryLayout::new(vec![MemorySlot { id: 0, base: Gfn(0), pages: PAGES, host_addr: 0 }]).unwrap()
}

fn tracker(kind: DirtyKind, config: TrackerConfig, ring: u32) -> (FakeKernel, Tracker) {
    let global = GlobalLog::new(PAGES, 100);
    let (kernel, tracker) = FakeKernel::tracker(layout(), config, kind, ring, global).unwrap();
    tracker.enable_stopped().unwrap();
    (kernel, tracker)
}

fn config(vcpus: usize, max_dirty_pages: usize, trigger: usize) -> TrackerConfig {
    TrackerConfig { max_vcpus: vcpus, max_dirty_pages, trigger, ..TrackerConfig::default() }
}

fn exact(vcpus: usize, trigger: usize, max_dirty_pages: usize) -> TrackerConfig {
    TrackerConfig { exact: true, ..config(vcpus, max_dirty_pages, trigger) }
}

/// An interrupted reset in a fetch, and a second fetch.
#[test]
fn an_interrupted_reset_in_a_fetch_loses_nothing() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 200, 200), 256);
    (0..100).for_each(|page| kernel.write(0, Gfn(page), false));
    kernel.state().interrupt_after = Some(80);
    let mut buffer = [Gfn(0); 200];
    let got = tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len();
    assert_eq!(got, 100);
    // Some pages are not armed now, and are marked. A second fetch takes the marks.
    let again = tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len();
    assert_eq!(again, 0, "they are for the epoch, which arms everything");
    // The guest writes one of them after the copy.
    kernel.write(0, Gfn(70), false);
    assert!(pages(&tracker).contains(&70), "page 70 was written after its copy and is not reported");
}

/// A fetcher empties the ring between KVM's exit and ring_full.
#[test]
fn a_ring_that_a_fetch_has_emptied_is_not_overrun() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 10_000, 10_000), 4096);
    (0..4096 - RESERVED).for_each(|page| kernel.write(0, Gfn(page), false));
    assert!(!kernel.can_run(0)); // KVM_RUN returns KVM_EXIT_DIRTY_RING_FULL here
    let mut buffer = vec![Gfn(0); 1000];
    std::thread::scope(|scope| {
        let tracker = &tracker;
        scope.spawn(move || tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len());
    });
    assert_eq!(tracker.ring_full(0).unwrap(), RingExit::Resume);
    assert!(kernel.can_run(0));
}

/// KVM writes guest memory between harvest and rearm.
#[test]
fn entries_between_harvest_and_rearm_are_of_the_next_epoch() {
    for is_exact in [false, true] {
        let (kernel, tracker) =
            tracker(DirtyKind::Ring, TrackerConfig { exact: is_exact, ..config(2, 100, 40) }, 256);
        for page in 0..40 {
            if !kernel.can_run(0) && tracker.ring_full(0).unwrap() == RingExit::DirtyLogFull {
                break;
            }
            kernel.write(0, Gfn(page), false);
        }
        let epoch = tracker.stopped().state_saved().harvest().unwrap();
        // A vCPU ioctl of another thread makes KVM write page 500 on behalf of vCPU 0.
        kernel.write(0, Gfn(500), false);
        epoch.rearm().unwrap().copied().run();
        assert!(pages(&tracker).contains(&500), "exact {is_exact}: page 500 is lost");
    }
}

/// Minting fails once, for the second ring.
#[test]
fn minting_that_fails_half_way_leaves_the_rest_in_order() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, exact(2, 40, 100), 256);
    (0..10).for_each(|_| kernel.write(0, Gfn(1), true));
    (0..10).for_each(|_| kernel.write(1, Gfn(2), true));
    assert!(!kernel.can_run(1));
    assert_eq!(tracker.ring_full(1).unwrap(), RingExit::Resume);
    kernel.state().no_mint = true;
    assert_eq!(pages(&tracker), [1, 2]);
    assert!(!tracker.is_exact());
    kernel.write(0, Gfn(3), false);
    assert_eq!(pages(&tracker), [3]);
}

/// Disable, while a vCPU thread is using its list for a moment.
#[test]
fn a_disable_that_is_refused_loses_nothing() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(2, 100, 100), 256);
    kernel.write(0, Gfn(7), false);
    tracker.harvest_vcpu(0).unwrap();
    let owner = tracker.own_lane(1).unwrap();
    assert!(matches!(tracker.disable(), Err(DisableError::Busy(1))));
    drop(owner);
    assert!(tracker.is_enabled());
    assert_eq!(pages(&tracker), [7]);
}

/// All hot pages are written by one vCPU.
#[test]
fn parked_credits_leave_room_in_every_ring() {
    let hot =
        HotPages::Rule(HotRule { max_gap: 1000, traps: 1, probe_after: 64, max_pages: 100_000, trap_ns: 0 });
    let (kernel, tracker) = tracker(DirtyKind::Ring, TrackerConfig { hot, ..config(4, 2000, 2000) }, 256);
    let mut stuck = 0;
    for _ in 0..200 {
        let mut wrote = 0;
        for page in 0..400 {
            if !kernel.can_run(0) {
                assert_eq!(tracker.ring_full(0).unwrap(), RingExit::DirtyLogFull);
                break;
            }
            kernel.write(0, Gfn(page), false);
            wrote += 1;
        }
        pages(&tracker);
        if wrote == 0 {
            stuck += 1;
        }
    }
    assert_eq!(stuck, 0, "epochs of 200 in which vCPU 0 could not run at all");
}

/// A trigger that exceeds the capacity of all rings together.
#[test]
fn a_trigger_beyond_the_rings_takes_no_credit_of_a_page() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, exact(2, 600, 1000), 256);
    let mut page = 0;
    loop {
        if !kernel.can_run(0) {
            tracker.harvest_vcpu(0).unwrap();
            if tracker.ring_full(0).unwrap() == RingExit::DirtyLogFull {
                break;
            }
        }
        kernel.write(0, Gfn(page), false);
        page += 1;
    }
    assert_eq!(pages(&tracker).len() as u64, page);
}

/// The result of `pending` after pages were fetched.
#[test]
fn pages_that_were_fetched_do_not_count() {
    let mut buffer = [Gfn(0); 200];
    for kind in [DirtyKind::Ring, DirtyKind::ClearLog, DirtyKind::Bitmap] {
        let (kernel, tracker) = tracker(kind, config(1, 1000, 500), 4096);
        (0..60).for_each(|page| kernel.write(0, Gfn(page), false));
        assert_eq!(tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len(), 60);
        assert_eq!(tracker.pending(), 0, "{kind}");
    }
    let hot =
        HotPages::Rule(HotRule { max_gap: 1000, traps: 1, probe_after: 1000, max_pages: 100, trap_ns: 0 });
    let (kernel, tracker) = tracker(DirtyKind::ClearLog, TrackerConfig { hot, ..config(1, 1000, 500) }, 4096);
    (0..60).for_each(|page| kernel.write(0, Gfn(page), false));
    pages(&tracker);
    for _ in 0..10 {
        assert!(tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().is_empty());
    }
    assert_eq!(tracker.pending(), 60, "hot pages count once");
}

/// Hot pages are copied in every epoch and count towards the trigger, so they may not reach it by themselves.
#[test]
fn hot_pages_leave_an_eighth_of_the_trigger() {
    let hot =
        HotPages::Rule(HotRule { max_gap: 1000, traps: 1, probe_after: 1000, max_pages: 1000, trap_ns: 0 });
    let Some(guest) = guest::start(BackendChoice::Ring, TrackerConfig { hot, ..config(1, 200, 100) }) else {
        return;
    };
    assert_eq!(guest.tracker.hot_rule().unwrap().max_pages, 88);
}

/// Only a reader that has read a ring from its start knows where KVM writes next in it.
#[test]
fn a_second_tracker_of_a_vm_is_refused() {
    let Some(mut guest) = guest::start(BackendChoice::Ring, config(1, 4000, 4000)) else { return };
    guest.tracker.enable_stopped().unwrap();
    let mut vcpu = guest.vcpus.remove(0);
    vcpu.set_job(guest::Job { stamp: 1, writes: 100, area: 1 });
    assert_eq!(vcpu.run(), guest::Stop::Done);
    guest.tracker.disable().unwrap();
    let second = guest.second_tracker(&vcpu, guest.backend());
    assert!(matches!(second, Err(NewError::BackendTaken)), "{second:?}");
    let second = guest.second_tracker(&vcpu, guest.backend().probed_again());
    assert!(matches!(second, Err(NewError::RingUsed { vcpu: 0 })), "{second:?}");
}

/// Where no ring shows it: the back end is free again when its tracker is dropped, or was not made.
#[test]
fn a_back_end_has_one_tracker_at_a_time() {
    let Some(guest) = guest::start(BackendChoice::Bitmap, config(1, 100, 100)) else { return };
    let backend = guest.backend().probed_again();
    let small = GlobalLog::new(1, 1);
    let slots = guest.tracker.layout();
    let vcpu = &guest.vcpus[0];
    let tracker = || guest.second_tracker(vcpu, backend.clone());
    assert!(matches!(
        guest.tracker_of(slots, &[vcpu], backend.clone(), small),
        Err(NewError::GlobalLogSize { .. })
    ));
    let first = tracker().unwrap();
    first.enable().unwrap();
    assert!(matches!(tracker(), Err(NewError::BackendTaken)));
    drop(first);
    tracker().unwrap().enable().unwrap();
}

/// Turning its log off does not bring back a slot that the VMM has removed.
#[test]
fn a_slot_that_is_gone_stays_gone() {
    let Some(mut guest) = guest::start(BackendChoice::Ring, config(1, 4000, 4000)) else { return };
    let mut vcpu = guest.vcpus.remove(0);
    guest.tracker.enable_stopped().unwrap();
    vcpu.set_job(guest::Job { stamp: 1, writes: 100, area: 1 });
    assert_eq!(vcpu.run(), guest::Stop::Done);
    guest.tracker.remove_slot(3).unwrap();
    assert!(matches!(guest.tracker.remove_slot(7), Err(RemoveSlotError::Unknown(7))));
    guest.remove_slot();
    guest.tracker.disable().unwrap();
    guest.tracker.enable_stopped().unwrap();
    vcpu.set_job(guest::Job { stamp: 2, writes: 100, area: 1 });
    // The write is an exit to the VMM, or an error of the guest: not memory.
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| vcpu.run()));
    assert!(ended.is_err(), "the guest writes memory that was taken away");
}

/// Entries are minted with the first page of the VM. That page may be gone.
#[test]
fn rings_are_filled_with_a_page_that_is_still_there() {
    let slot = |id, base| MemorySlot { id, base: Gfn(base), pages: 500, host_addr: 0 };
    let layout = MemoryLayout::new(vec![slot(0, 0), slot(1, 500)]).unwrap();
    let global = GlobalLog::new(layout.gfn_space(), 100);
    let (kernel, tracker) =
        FakeKernel::tracker(layout, exact(2, 40, 100), DirtyKind::Ring, 256, global).unwrap();
    tracker.enable_stopped().unwrap();
    tracker.remove_slot(0).unwrap();
    for epoch in 0..3 {
        // More than the first part, so that entries are given away and have to be minted again.
        (600..615).for_each(|page| {
            if !kernel.can_run(0) {
                assert_eq!(tracker.ring_full(0).unwrap(), RingExit::Resume);
            }
            kernel.write(0, Gfn(page), false);
        });
        assert_eq!(pages(&tracker), (600..615).collect::<Vec<_>>(), "epoch {epoch}");
        assert!(tracker.is_exact());
    }
    assert!(tracker.stats().grants > 0);
}

/// Everything that an epoch needs is taken when tracking is enabled: an epoch takes no page fault.
#[test]
fn an_epoch_takes_no_page_fault() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 5000, 5000), 16_384);
    (0..5000).for_each(|page| kernel.write(0, Gfn(page * 4), false));
    let epoch = tracker.stopped().state_saved();
    let before = crate::words::faults();
    let epoch = epoch.harvest().unwrap();
    let taken = crate::words::faults() - before;
    assert_eq!(epoch.rearm().unwrap().pages().len(), 5000);
    // The lists and the bitmap are 13 pages. A fault or two come from code that runs for the first time.
    assert!(taken < 5, "{taken} page faults");
}

/// A fetcher that waits finds nothing to hold and blocks nothing.
#[test]
fn a_waiting_fetcher_does_not_hold_epochs_back() {
    let (_kernel, tracker) = tracker(DirtyKind::Ring, config(2, 1000, 1000), 256);
    let end = std::sync::atomic::AtomicBool::new(false);
    let mut refused = 0;
    std::thread::scope(|scope| {
        let (end, tracker) = (&end, &tracker);
        scope.spawn(move || {
            let mut buffer = [Gfn(0); 8];
            while !end.load(std::sync::atomic::Ordering::Relaxed) {
                drop(tracker.fetch(&mut buffer, Fetch { wait: Some(Duration::from_millis(100)), ..REARM }));
            }
        });
        for _ in 0..2000 {
            std::thread::sleep(Duration::from_micros(50));
            match tracker.stopped().state_saved().harvest() {
                Ok(epoch) => epoch.rearm().unwrap().copied().run(),
                Err(_) => refused += 1,
            }
        }
        end.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // A thread that loses its core in the middle of a check may be in the way for longer than anybody waits.
    assert!(refused <= 20, "{refused} of 2000 epochs were refused");
}

/// Two readers of one ring would give its entries back twice.
#[test]
fn a_vcpu_that_is_given_twice_is_refused() {
    let setup = guest::Setup { vcpus: 1, ..guest::Setup::of(BackendChoice::Ring, config(3, 100, 100)) };
    let Some(guest) = guest::start_with(setup) else { return };
    let vcpu = &guest.vcpus[0];
    let (layout, backend) = (guest.tracker.layout(), guest.backend().probed_again());
    let global = GlobalLog::new(layout.gfn_space(), 64);
    let tracker = guest.tracker_of(layout, &[vcpu, vcpu], backend, global);
    assert!(matches!(tracker, Err(NewError::SameVcpu { vcpu: 1, other: 0 })), "{tracker:?}");
    let added = guest.add_vcpu(vcpu);
    assert!(matches!(added, Err(AddVcpuError::Ring(NewError::SameVcpu { vcpu: 1, other: 0 }))), "{added:?}");
    assert_eq!(guest.add_vcpu(&guest.new_vcpu(1)).unwrap(), 1);
}

/// Touching the ring would give SIGBUS.
#[test]
fn a_vcpu_of_a_vm_without_a_ring_is_refused() {
    let Some(guest) = guest::start(BackendChoice::Ring, config(1, 100, 100)) else { return };
    let Some(other) = guest::start(BackendChoice::Bitmap, config(1, 100, 100)) else { return };
    let tracker = guest.second_tracker(&other.vcpus[0], guest.backend().probed_again());
    assert!(matches!(tracker, Err(NewError::NotThisVm { vcpu: 0 })), "{tracker:?}");
}

/// A migration fetches in one long epoch. A vCPU gets its used part back when its pages are fetched; vCPUs
/// that write nothing do not get it.
#[test]
fn a_vcpu_gets_back_what_fetches_take_of_it() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, exact(2, 400, 400), 4096);
    let mut buffer = [Gfn(0); 400];
    let mut page = 0;
    for round in 0..50 {
        let mut written = 0;
        loop {
            while kernel.can_run(1) {
                kernel.write(1, Gfn(page % PAGES), false);
                (page, written) = (page + 1, written + 1);
            }
            if tracker.ring_full(1).unwrap() == RingExit::DirtyLogFull {
                break;
            }
        }
        assert!(written >= 100, "vCPU 1 may write {written} of 400 pages in round {round}");
        assert!(!tracker.wait_for_room(1, Duration::ZERO).unwrap());
        let fetched = tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len();
        assert_eq!(fetched, written);
        assert!(tracker.wait_for_room(1, Duration::ZERO).unwrap());
        assert!(kernel.room(0) + kernel.room(1) <= 400, "more than the trigger");
    }
}

/// A wait for pages and a wait for room end when they are told to.
#[test]
fn waits_can_be_ended() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 10_000, 10_000), 4096);
    let long = Duration::from_secs(600);
    std::thread::scope(|scope| {
        let (kernel, tracker) = (&kernel, &tracker);
        let fetching = scope.spawn(move || {
            let mut buffer = [Gfn(0); 10];
            let how = Fetch { wait: Some(long), at_least: 5000, ..REARM };
            tracker.fetch(&mut buffer, how).unwrap().rearm().unwrap().len()
        });
        while kernel.can_run(0) {
            kernel.write(0, Gfn(4096 - kernel.room(0)), false);
        }
        let waiting = scope.spawn(move || tracker.wait_for_room(0, long).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!fetching.is_finished() && !waiting.is_finished());
        // As often as both threads need to reach their waits.
        while !(fetching.is_finished() && waiting.is_finished()) {
            tracker.wake_fetchers();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(fetching.join().unwrap() <= 10);
        // There is room if the fetch came first.
        waiting.join().unwrap();
    });
}

/// Pages heat while everything is fetched and no epoch ends, and cool again.
#[test]
fn pages_become_hot_between_fetches() {
    for kind in [DirtyKind::Ring, DirtyKind::ClearLog] {
        let rule = HotRule { max_gap: 4, traps: 2, probe_after: 6, max_pages: 50, trap_ns: 0 };
        let (kernel, tracker) =
            tracker(kind, TrackerConfig { hot: HotPages::Rule(rule), ..config(1, 200, 200) }, 4096);
        let mut buffer = [Gfn(0); 200];
        let mut fetched = 0;
        for _ in 0..5 {
            (0..20).for_each(|page| kernel.write(0, Gfn(page), false));
            fetched += tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len();
            tracker.age().unwrap();
        }
        assert_eq!(tracker.estimate().hot, 20, "{kind}");
        assert_eq!(fetched, 40, "{kind}: hot pages are not fetched");
        let unarmed = kernel.unarmed();
        assert!((0..20).all(|page| unarmed.contains(&Gfn(page))), "{kind}");
        // A probe arms them and makes them be fetched once more, because they may have changed.
        let mut probed = 0;
        for _ in 0..20 {
            tracker.age().unwrap();
            probed += tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len();
        }
        assert_eq!((probed, tracker.estimate().hot), (20, 0), "{kind}");
        assert!(kernel.unarmed().is_empty(), "{kind}");
        kernel.write(0, Gfn(7), false);
        assert_eq!(pages(&tracker), [7], "{kind}");
    }
}

/// Checking a bitmap takes long with much memory, so a wait rests ten times as long after each check:
/// otherwise it took half a processor for an idle VM of 64 GiB.
#[test]
fn a_wait_looks_seldom_where_looking_is_dear() {
    for kind in [DirtyKind::ClearLog, DirtyKind::Bitmap] {
        let (kernel, tracker) = tracker(kind, config(1, 1000, 1000), 256);
        kernel.state().log_takes = Duration::from_millis(2);
        let before = kernel.state().logs;
        let how = Fetch { wait: Some(Duration::from_millis(200)), ..REARM };
        assert!(tracker.fetch(&mut [Gfn(0); 10], how).unwrap().is_empty());
        let looks = kernel.state().logs - before;
        // 200 / (2 + 20), and the last check; without a rest there are about ninety.
        assert!((2..=15).contains(&looks), "{looks} looks ({kind})");
    }
}

/// Counts that are known without a system call, or the answer that they are not known: the same on every back
/// end.
#[test]
fn an_estimate_means_the_same_on_every_back_end() {
    for kind in [DirtyKind::Ring, DirtyKind::ClearLog, DirtyKind::Bitmap] {
        let (kernel, tracker) = tracker(kind, config(1, 1000, 1000), 256);
        (0..30).for_each(|page| kernel.write(0, Gfn(page), false));
        (100..107).for_each(|page| tracker.global().mark(Gfn(page)));
        let estimate = tracker.estimate();
        assert_eq!(estimate.logged, (kind == DirtyKind::Ring).then_some(30), "{kind}");
        assert_eq!((estimate.marked, estimate.hot), (7, 0), "{kind}");
        let mut buffer = [Gfn(0); 100];
        assert_eq!(tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().len(), 37, "{kind}");
        let estimate = tracker.estimate();
        assert_eq!((estimate.logged.unwrap_or(0), estimate.marked), (0, 0), "{kind}");
    }
}

/// A slot that is added as dirty is fetched piece by piece, and the rest counts.
#[test]
fn marks_beyond_the_room_of_a_fetch_stay_and_count() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 100, 100), 256);
    (0..5000).for_each(|page| tracker.global().mark(Gfn(page * 3)));
    let mut buffer = [Gfn(0); 200];
    let mut fetched = std::collections::BTreeSet::new();
    for round in 1..=25 {
        fetched.extend(tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().iter().copied());
        assert_eq!((fetched.len(), tracker.estimate().marked), (round * 200, 5000 - round * 200));
        kernel.write(0, Gfn(1), false);
        assert_eq!(tracker.fetch(&mut buffer[..1], REARM).unwrap().rearm().unwrap(), [Gfn(1)]);
    }
    assert!(pages(&tracker).is_empty());
}

/// On 64-bit Arm KVM writes some pages on behalf of no vCPU, and the VM has a bitmap beside the rings for
/// them.
#[test]
fn pages_that_no_vcpu_wrote_come_with_the_epoch() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(2, 100, 100), 256);
    for _ in 0..3 {
        kernel.write(0, Gfn(3), false);
        [5, 7].into_iter().for_each(|page| kernel.write_without_vcpu(Gfn(page)));
        // Also logged for a vCPU, as an emulated store is.
        kernel.write(1, Gfn(7), true);
        let mut buffer = [Gfn(0); 10];
        let fetched = tracker.fetch(&mut buffer, REARM).unwrap().rearm().unwrap().to_vec();
        assert!(!fetched.contains(&Gfn(5)), "a fetch leaves the bitmap alone");
        kernel.write(0, Gfn(3), false);
        let pages = pages(&tracker);
        assert!(pages.starts_with(&[3, 5]) && pages.len() <= 3, "{pages:?}");
    }
    assert!(pages(&tracker).is_empty());
}
