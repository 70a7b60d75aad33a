//! The behaviour at each limit and at each trap of the kernel, one by one.

use std::sync::Arc;

use super::kernel::{FakeKernel, RESERVED, pages};
use crate::{
    DirtyKind, EnableError, Gfn, GlobalLog, HarvestError, HotPages, HotRule, MemoryLayout, MemorySlot,
    NewError, RingExit, Tracker, TrackerConfig, TrackerStats,
};

const PAGES: u64 = 1000;

fn layout() -> MemoryLayout {
    MemoryLayout::new(vec![MemorySlot { id: 0, base: Gfn(0), pages: PAGES, host_addr: 0 }]).unwrap()
}

fn tracker(kind: DirtyKind, config: TrackerConfig, global: usize) -> (FakeKernel, Tracker) {
    let global = GlobalLog::new(PAGES, global);
    let (kernel, tracker) = FakeKernel::tracker(layout(), config, kind, 256, global).unwrap();
    tracker.enable_stopped().unwrap();
    (kernel, tracker)
}

fn config(vcpus: usize, max_dirty_pages: usize) -> TrackerConfig {
    TrackerConfig { max_vcpus: vcpus, max_dirty_pages, trigger: max_dirty_pages, ..TrackerConfig::default() }
}

#[test]
fn the_trigger_counts_all_vcpus_and_the_global_list() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, TrackerConfig { trigger: 6, ..config(2, 10) }, 10);
    (0..2).for_each(|page| kernel.write(0, Gfn(page), false));
    (10..12).for_each(|page| kernel.write(1, Gfn(page), false));
    tracker.global().mark(Gfn(20));
    assert_eq!((tracker.pending(), tracker.should_stop()), (5, false));
    tracker.harvest_vcpu(0).unwrap();
    kernel.write(0, Gfn(3), false);
    assert_eq!((tracker.pending(), tracker.should_stop()), (6, true));
    assert_eq!(pages(&tracker), [0, 1, 3, 10, 11, 20]);
    assert!(!tracker.should_stop());
}

#[test]
fn two_vcpus_report_the_same_pages_once() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(2, 100), 10);
    for vcpu in 0..2 {
        (0..100).for_each(|page| kernel.write(vcpu, Gfn(page), true));
        assert_eq!(tracker.harvest_vcpu(vcpu).unwrap(), 100);
    }
    assert_eq!(pages(&tracker), (0..100).collect::<Vec<_>>());
    assert_eq!(tracker.stats().duplicates, 100);
}

#[test]
fn full_lists_pass_pages_on() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 10), 20);
    // The rest stays in the ring.
    for round in 1..=3 {
        (0..100).for_each(|page| kernel.write(0, Gfn(page * 10), false));
        tracker.harvest_vcpu(0).unwrap();
        tracker.global().mark(Gfn(0));
        tracker.global().mark(Gfn(5));
        assert_eq!(pages(&tracker).len(), 101);
        let TrackerStats { spilled, oversized, searches, duplicates, .. } = tracker.stats();
        assert_eq!([spilled, oversized, searches, duplicates], [round, round, 0, round]);
    }
}

#[test]
fn an_interrupted_reset_write_protects_everything() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 200), 20);
    (0..100).for_each(|page| kernel.write(0, Gfn(page), false));
    kernel.state().interrupt_after = Some(80);
    assert_eq!(pages(&tracker).len(), 100);
    assert_eq!((tracker.stats().full_rearms, kernel.state().resets), (1, 2));
    (0..200).for_each(|page| kernel.write(0, Gfn(page), false));
    assert_eq!(pages(&tracker).len(), 200);
    assert_eq!(tracker.stats().full_rearms, 1);
}

#[test]
fn nothing_dirty_costs_no_system_call() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 10), 10);
    let before = kernel.state().resets;
    assert!(pages(&tracker).is_empty());
    assert_eq!(kernel.state().resets, before);
}

#[test]
fn an_overrun_is_fatal() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(2, 300), 10);
    (0..256 + 20).for_each(|page| kernel.write(1, Gfn(page), false));
    assert!(matches!(tracker.harvest_vcpu(1), Err(HarvestError::Overrun { vcpu: 1 })));
    for _ in 0..2 {
        assert!(matches!(tracker.harvest_vcpu(0), Err(HarvestError::Overrun { vcpu: 1 })));
        let harvest = tracker.stopped().state_saved().harvest();
        assert!(matches!(harvest, Err(HarvestError::Overrun { vcpu: 1 })));
    }
    tracker.disable().unwrap();
    assert!(matches!(tracker.enable(), Err(EnableError::Failed)));
}

#[test]
fn entries_behind_the_soft_limit_are_no_overrun() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 300), 10);
    (0..256 - RESERVED + 5).for_each(|page| kernel.write(0, Gfn(page), false));
    assert!(!kernel.can_run(0));
    assert_eq!(tracker.ring_full(0).unwrap(), RingExit::DirtyLogFull);
    assert_eq!(pages(&tracker).len() as u64, 256 - RESERVED + 5);
    assert!(kernel.can_run(0));
}

#[test]
fn a_full_ring_with_nothing_in_it_is_an_overrun() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 100), 10);
    kernel.write(0, Gfn(1), false);
    assert_eq!(tracker.ring_full(0).unwrap(), RingExit::DirtyLogFull);
    tracker.harvest_vcpu(0).unwrap();
    assert_eq!(tracker.ring_full(0).unwrap(), RingExit::DirtyLogFull);
    pages(&tracker);
    // The first time, the ring may have been freed meanwhile.
    assert_eq!(tracker.ring_full(0).unwrap(), RingExit::Resume);
    assert!(matches!(tracker.ring_full(0), Err(HarvestError::Overrun { vcpu: 0 })));
    assert!(matches!(tracker.harvest_vcpu(0), Err(HarvestError::Overrun { vcpu: 0 })));
}

#[test]
fn disabling_empties_full_rings() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 100), 10);
    (0..256 - RESERVED).for_each(|page| kernel.write(0, Gfn(page), false));
    assert!(!kernel.can_run(0));
    tracker.disable().unwrap();
    assert!(kernel.can_run(0));
    kernel.write(0, Gfn(7), false);
    tracker.enable_stopped().unwrap();
    assert!(pages(&tracker).is_empty());
    kernel.write(0, Gfn(7), false);
    assert_eq!(pages(&tracker), [7]);
}

#[test]
fn all_dirty_means_all() {
    for kind in [DirtyKind::Ring, DirtyKind::Bitmap] {
        let (kernel, tracker) = tracker(kind, config(1, 10), 10);
        kernel.write(0, Gfn(3), false);
        tracker.all_dirty();
        assert_eq!(pages(&tracker), (0..PAGES).collect::<Vec<_>>());
        assert!(pages(&tracker).is_empty());
    }
}

#[test]
fn a_part_holds_the_epoch_back() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 100), 10);
    (0..10).for_each(|page| kernel.write(0, Gfn(page), false));
    let epoch = tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    let part = tracker.part(1, 2).unwrap();
    assert!(tracker.part(2, 2).is_none());
    std::thread::scope(|scope| {
        let ending = scope.spawn(|| epoch.copied().run());
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(!ending.is_finished());
        assert_eq!(part.iter().map(|gfn| gfn.0).collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
        drop(part);
    });
    assert!(tracker.part(0, 1).is_none());
}

#[test]
fn what_is_written_after_the_harvest_is_of_the_next_epoch() {
    let (kernel, tracker) = tracker(DirtyKind::Ring, config(1, 100), 10);
    kernel.write(0, Gfn(1), false);
    tracker.global().mark(Gfn(2));
    let epoch = tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    assert_eq!(epoch.pages(), [Gfn(1), Gfn(2)]);
    // Both have been copied; a vCPU ioctl and a late device write them again.
    let epoch = epoch.copied();
    kernel.write(0, Gfn(1), false);
    tracker.global().mark(Gfn(2));
    assert_eq!(tracker.harvest_vcpu(0).unwrap(), 0);
    epoch.run();
    assert_eq!(tracker.pending(), 2);
    assert_eq!(pages(&tracker), [1, 2]);
    assert!(pages(&tracker).is_empty());
}

#[test]
fn disable_and_enable_wait_for_the_epoch() {
    let (_kernel, tracker) = tracker(DirtyKind::Ring, config(1, 100), 10);
    let epoch = tracker.stopped();
    assert!(tracker.disable().is_err());
    assert!(matches!(tracker.enable(), Err(EnableError::EpochOpen)));
    drop(epoch);
    assert!(matches!(tracker.enable(), Err(EnableError::Already)));
    tracker.disable().unwrap();
    let epoch = tracker.stopped().state_saved().harvest();
    assert!(matches!(epoch, Err(HarvestError::NotEnabled)));
}

/// A call of another thread that excludes epochs is waited for, and a second epoch is not.
#[test]
fn the_end_of_an_epoch_waits_for_what_ends_by_itself() {
    let (_, tracker) = tracker(DirtyKind::Ring, config(1, 10), 10);
    let token = tracker.own_token().unwrap();
    assert!(tracker.try_stopped().is_none());
    std::thread::scope(|scope| {
        let ending = scope.spawn(|| pages(&tracker).len());
        std::thread::sleep(std::time::Duration::from_millis(20));
        drop(token);
        assert_eq!(ending.join().expect("it waits"), 0);
    });
    let epoch = tracker.stopped();
    assert!(tracker.try_stopped().is_none());
    let second = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(tracker.stopped())));
    assert_eq!(second.unwrap_err().downcast_ref(), Some(&"one epoch at a time"));
    drop(epoch);
    pages(&tracker);
}

/// Without rings, KVM's report that one is full means nothing, and tracking goes on.
#[test]
fn without_rings_no_ring_is_full() {
    for kind in [DirtyKind::ClearLog, DirtyKind::Bitmap] {
        let (kernel, tracker) = tracker(kind, config(2, 10), 10);
        for _ in 0..3 {
            assert_eq!(tracker.ring_full(1).unwrap(), RingExit::Resume);
        }
        kernel.write(1, Gfn(7), false);
        assert_eq!(pages(&tracker), [7]);
        let panics = |call: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err();
        assert!(panics(&|| drop(tracker.ring_full(2))));
        assert!(panics(&|| drop(tracker.wait_for_room(2, Default::default()))));
    }
}

/// In a first copy each page that is reported is sent, changed or not.
#[test]
fn no_page_becomes_hot_while_that_is_switched_off() {
    let rule = HotRule { max_gap: 4, traps: 2, probe_after: 6, max_pages: 50, trap_ns: 0 };
    for kind in [DirtyKind::Ring, DirtyKind::ClearLog] {
        let (kernel, tracker) =
            tracker(kind, TrackerConfig { hot: HotPages::Rule(rule), ..config(1, 50) }, 50);
        let epochs = |count| {
            (0..count).for_each(|_| {
                (0..20).for_each(|page| kernel.write(0, Gfn(page), false));
                assert_eq!(pages(&tracker).len(), 20, "{kind}");
            })
        };
        tracker.set_heating(false);
        epochs(10);
        assert_eq!((tracker.estimate().hot, pages(&tracker).len()), (0, 0), "{kind}");
        tracker.set_heating(true);
        epochs(3);
        assert_eq!(tracker.estimate().hot, 20, "{kind}");
        // It holds for pages that are not hot yet.
        tracker.set_heating(false);
        epochs(2);
        assert_eq!(tracker.estimate().hot, 20, "{kind}");
    }
}

/// The wrong order: a slot goes from KVM while a fetch, an epoch or the set of hot pages has pages of it. No
/// harvest succeeds until the tracker is told, and then tracking goes on.
#[test]
fn a_slot_that_goes_too_early_does_not_end_tracking() {
    let slot = |id: u32| MemorySlot { id, base: Gfn(u64::from(id) * 100), pages: 100, host_addr: 0 };
    let rule = HotRule { max_gap: 4, traps: 1, probe_after: 2, max_pages: 50, trap_ns: 0 };
    for case in ["fetched", "epoch", "hot"] {
        let hot = if case == "hot" { HotPages::Rule(rule) } else { HotPages::Off };
        let config = TrackerConfig { max_slots: 2, hot, ..config(1, 50) };
        let layout = MemoryLayout::new(vec![slot(0), slot(1)]).unwrap();
        let global = GlobalLog::new(200, 10);
        let (kernel, tracker) =
            FakeKernel::tracker(layout, config, DirtyKind::ClearLog, 256, global).unwrap();
        tracker.enable().unwrap();
        [3, 103].into_iter().for_each(|page| kernel.write(0, Gfn(page), false));
        let mut buffer = [Gfn(0); 10];
        match case {
            "fetched" => {
                let fetched = tracker.fetch(&mut buffer, Default::default()).unwrap();
                kernel.remove_slot(1);
                assert_eq!(fetched.rearm().unwrap().len(), 2);
            }
            "epoch" => {
                let epoch = tracker.stopped().state_saved().harvest().unwrap();
                kernel.remove_slot(1);
                epoch.rearm().unwrap().copied().run();
            }
            _ => {
                pages(&tracker);
                assert_eq!(tracker.hot_list().len(), 2);
                kernel.remove_slot(1);
                (0..6).for_each(|_| tracker.age().unwrap());
                assert_eq!(tracker.hot_list(), []);
            }
        }
        kernel.write(0, Gfn(5), false);
        let harvest = tracker.stopped().state_saved().harvest();
        assert!(matches!(harvest, Err(HarvestError::GetDirtyLog { slot: 1, .. })), "{case}");
        tracker.remove_slot(1).unwrap();
        let pages = pages(&tracker);
        assert!(pages.contains(&5) && pages.iter().all(|&page| page < 100), "{case}: {pages:?}");
        tracker.disable().unwrap();
        tracker.enable().unwrap();
    }
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let build = |config, global: &Arc<GlobalLog>| {
        FakeKernel::tracker(layout(), config, DirtyKind::Bitmap, 256, global.clone())
            .map(|(_, tracker)| tracker)
    };
    let global = GlobalLog::new(PAGES, 1);
    assert!(matches!(build(config(0, 1), &global), Err(NewError::NoVcpus)));
    assert!(matches!(build(config(1, 0), &global), Err(NewError::Trigger { .. })));
    let trigger = TrackerConfig { trigger: 11, ..config(1, 10) };
    assert!(matches!(build(trigger, &global), Err(NewError::Trigger { .. })));
    assert!(matches!(build(config(1, 1), &GlobalLog::new(10, 1)), Err(NewError::GlobalLogSize { .. })));
    let first = build(config(1, 1), &global).unwrap();
    assert!(matches!(build(config(1, 1), &global), Err(NewError::GlobalLogTaken)));
    drop(first);
    build(config(1, 1), &global).unwrap();
}
