//! Peculiarities of the running kernel around its dirty log, none of which matters.

use std::collections::BTreeSet;

use vm_memory::{Bytes, GuestAddress};

use super::guest::{self, AREAS, Guest, Job, Stop, Vcpu};
use crate::{BackendChoice, Gfn, HotPages, HotRule, RingExit, TrackerConfig};

/// Every page that is trapped becomes hot.
const ALL_HOT: HotPages =
    HotPages::Rule(HotRule { max_gap: 1000, traps: 1, probe_after: 1000, max_pages: 4000, trap_ns: 0 });

fn config(vcpus: usize) -> TrackerConfig {
    TrackerConfig { max_vcpus: vcpus, max_dirty_pages: 4000, trigger: 4000, ..TrackerConfig::default() }
}

fn run(vcpu: &mut Vcpu, stamp: u64, writes: u64, area: usize) -> Stop {
    vcpu.set_job(Job { stamp, writes, area });
    loop {
        let stop = vcpu.run();
        if stop != Stop::Signal {
            return stop;
        }
    }
}

/// Ends the epoch: all pages, and how many of them are hot.
fn end(guest: &Guest) -> (BTreeSet<Gfn>, usize) {
    let epoch = guest.tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    let pages: BTreeSet<_> = epoch.pages().iter().copied().collect();
    assert_eq!(pages.len(), epoch.pages().len(), "a page is listed twice");
    let hot = epoch.hot().len();
    epoch.copied().run();
    (pages, hot)
}

fn area(index: usize) -> impl Iterator<Item = Gfn> {
    let (base, pages) = AREAS[index];
    (0..pages).map(move |page| Gfn(base / 4096 + page))
}

/// One vCPU stops after exactly as many pages as the trigger, epoch after epoch, whatever the size of its
/// ring.
#[test]
fn an_exact_trigger_stops_one_vcpu_at_the_page() {
    let mut twice = 0;
    for trigger in [1, 7, 41, 177, 500] {
        let Some(mut guest) =
            guest::start(BackendChoice::Ring, TrackerConfig { trigger, exact: true, ..config(1) })
        else {
            return;
        };
        let mut vcpu = guest.vcpus.remove(0);
        guest.tracker.enable_stopped().unwrap();
        assert!(guest.tracker.is_exact());
        for epoch in 1..=10 {
            assert_eq!(run(&mut vcpu, epoch, 100_000, 1), Stop::RingFull);
            assert_eq!(guest.tracker.ring_full(0).unwrap(), RingExit::DirtyLogFull);
            assert!(guest.tracker.should_stop());
            // KVM would say so again until the epoch ends.
            assert_eq!(vcpu.run(), Stop::RingFull);
            // KVM lists a page again if it had to forget that the page is writable, as when memory is short.
            let again = guest.tracker.stats().duplicates;
            let pages = end(&guest).0.len() as u64;
            let again = guest.tracker.stats().duplicates - again;
            assert_eq!(pages + again, trigger as u64, "epoch {epoch}, {again} twice");
            twice += again;
        }
    }
    assert!(twice < 50, "{twice} of 7260 pages were listed twice");
}

/// Hot pages are copied in every epoch, so they count.
#[test]
fn hot_pages_count_in_an_exact_trigger() {
    let hot =
        HotPages::Rule(HotRule { max_gap: 1000, traps: 1, probe_after: 1000, max_pages: 100, trap_ns: 0 });
    let Some(mut guest) =
        guest::start(BackendChoice::Ring, TrackerConfig { trigger: 300, exact: true, hot, ..config(1) })
    else {
        return;
    };
    let mut vcpu = guest.vcpus.remove(0);
    guest.tracker.enable_stopped().unwrap();
    for epoch in 1..=10 {
        assert_eq!(run(&mut vcpu, epoch, 100_000, 1), Stop::RingFull);
        let (pages, hot) = end(&guest);
        assert_eq!((pages.len(), hot), (300, if epoch == 1 { 0 } else { 100 }));
    }
}

/// Several vCPUs share the trigger. They never exceed it, and the unused rest is smaller than their parts.
#[test]
fn an_exact_trigger_is_shared_by_all_vcpus() {
    const TRIGGER: usize = 400;
    for busy in [1, 2, 3] {
        let Some(mut guest) =
            guest::start(BackendChoice::Ring, TrackerConfig { trigger: TRIGGER, exact: true, ..config(3) })
        else {
            return;
        };
        let mut vcpus = std::mem::take(&mut guest.vcpus);
        guest.tracker.enable_stopped().unwrap();
        for epoch in 1..=20 {
            std::thread::scope(|scope| {
                for (index, vcpu) in vcpus.iter_mut().take(busy).enumerate() {
                    let tracker = &guest.tracker;
                    scope.spawn(move || {
                        while run(vcpu, epoch, 100_000, 1) != Stop::RingFull
                            || tracker.ring_full(index).unwrap() == RingExit::Resume
                        {}
                    });
                }
            });
            let entries = guest.tracker.pending();
            assert!(entries <= TRIGGER, "{entries} entries");
            // Each vCPU that wrote nothing has kept a sixth of it.
            let unused = (3 - busy) * TRIGGER / 6;
            assert!(entries + unused + 3 >= TRIGGER, "{entries} entries, {busy} busy");
            assert!(end(&guest).0.len() <= entries);
        }
        assert!(guest.tracker.stats().grants > 20);
    }
}

/// Two vCPUs write the same pages, and each ring may hold them all.
#[test]
fn pages_of_two_vcpus_come_once() {
    let Some(mut guest) = guest::start(BackendChoice::Ring, config(2)) else { return };
    let mut vcpus = std::mem::take(&mut guest.vcpus);
    guest.tracker.enable_stopped().unwrap();
    for epoch in 1..=20 {
        std::thread::scope(|scope| {
            for (index, vcpu) in vcpus.iter_mut().enumerate() {
                let tracker = &guest.tracker;
                scope.spawn(move || {
                    assert_eq!(run(vcpu, epoch, 20_000, 0), Stop::Done);
                    tracker.harvest_vcpu(index).unwrap();
                });
            }
        });
        let pages = end(&guest).0;
        assert!(area(0).all(|gfn| pages.contains(&gfn)));
        // And at the program's first read, the page of the program; AMD's nested walk writes the three pages
        // of the page tables.
        assert!(pages.len() as u64 <= AREAS[0].1 + 4, "{pages:?}");
    }
    // The number depends on how the vCPUs were scheduled; `limits` has a case where it is all of them.
    println!("{} pages were in both rings", guest.tracker.stats().duplicates);
}

/// The slot of hot pages goes while ring entries are parked for them: the entries are reset later, for a slot
/// that is gone, and the rest of memory is tracked as before.
#[test]
fn a_slot_that_is_gone_leaves_its_entries_behind() {
    let Some(mut guest) = guest::start(BackendChoice::Ring, TrackerConfig { hot: ALL_HOT, ..config(1) })
    else {
        return;
    };
    let mut vcpu = guest.vcpus.remove(0);
    guest.tracker.enable_stopped().unwrap();
    for epoch in 1..=2 {
        run(&mut vcpu, epoch, 20_000, 1);
        end(&guest);
    }
    let parked = guest.tracker.stats().credits;
    assert!(parked >= AREAS[1].1, "{parked} parked");
    guest.remove_slot();
    guest.tracker.remove_slot(3).unwrap();
    for epoch in 3..=6 {
        run(&mut vcpu, epoch, 20_000, 0);
        let (pages, _) = end(&guest);
        assert!(area(0).all(|gfn| pages.contains(&gfn)));
    }
    // All parked entries go back: KVM counts the entries of a slot that is gone, too.
    guest.tracker.disable().unwrap();
    assert_eq!(guest.tracker.stats().credits, 0);
}

/// Entries of a slot that goes before they are harvested.
#[test]
fn entries_of_a_slot_that_is_gone_are_reset() {
    let Some(mut guest) = guest::start(BackendChoice::Ring, config(1)) else { return };
    let mut vcpu = guest.vcpus.remove(0);
    guest.tracker.enable_stopped().unwrap();
    run(&mut vcpu, 1, 2000, 1);
    guest.remove_slot();
    guest.tracker.remove_slot(3).unwrap();
    end(&guest);
    for epoch in 2..=4 {
        run(&mut vcpu, epoch, 20_000, 0);
        let pages = end(&guest).0;
        assert!(area(0).all(|gfn| pages.contains(&gfn)), "epoch {epoch}");
    }
}

/// KVM maps a page writable at its first read and reports it: once, not again, and never the other way round.
#[test]
fn the_first_read_of_a_page_may_be_reported_and_later_ones_are_not() {
    for choice in [BackendChoice::Ring, BackendChoice::ClearLog, BackendChoice::Bitmap] {
        let Some(mut guest) = guest::start(choice, config(1)) else { return };
        let mut vcpu = guest.vcpus.remove(0);
        // Existing memory that KVM has not mapped.
        area(0).for_each(|gfn| guest.memory.write_obj(1u64, GuestAddress(gfn.gpa())).unwrap());
        guest.tracker.enable_stopped().unwrap();
        let mut reported = 0;
        for epoch in 0..6 {
            assert_eq!(vcpu.read_all(0), Stop::Done);
            let pages = end(&guest).0;
            let of_area = area(0).filter(|gfn| pages.contains(gfn)).count();
            println!("{choice:?} epoch {epoch}: {of_area} pages that were only read");
            reported += of_area;
        }
        assert!(reported as u64 <= AREAS[0].1, "a page that is only read is reported again and again");
    }
}
