//! Takes with more or with less room than pages.

use std::collections::BTreeSet;

use super::{Backing, Memory, NONE, REGIONS, Random, open, take, take_some, taken, track};
use crate::layout::MemoryLayout;
use crate::source::Source;

/// More regions than fit into the kernel's own buffer (512), and than into ours.
#[test]
fn any_number_of_regions_comes_in_one_take() {
    let memory = Memory::new(Backing::Shared, 3 * REGIONS).unwrap();
    let Some((layout, uffd)) = track(&memory) else { return };
    let around = |count: u64| [count - 1, count, count + 1];
    for count in [around(512), around(1024), around(REGIONS), [1000, 1, REGIONS * 3 / 2]].as_flattened() {
        let written: Vec<_> = (0..*count).map(|index| index * 2).collect();
        written.iter().for_each(|&page| memory.store(page, *count));
        assert_eq!(taken(&uffd, &layout), written, "{count} regions");
        assert_eq!(taken(&uffd, &layout), NONE, "{count} regions");
    }
    (0..memory.pages).for_each(|page| memory.store(page, 1));
    assert_eq!(taken(&uffd, &layout).len() as u64, memory.pages, "a single region");
}

#[test]
fn a_sink_without_room_loses_nothing() {
    let (low, high) =
        (Memory::new(Backing::Private, 2048).unwrap(), Memory::new(Backing::Shared, 10_000).unwrap());
    let layout = MemoryLayout::new(vec![high.slot(0, 0x1000), low.slot(1, 0)]).unwrap();
    let Some(uffd) = open(&layout) else { return };
    uffd.arm_all(&layout).unwrap();
    let mut random = Random(3);
    for round in 1..60 {
        let mut written = BTreeSet::new();
        for _ in 0..random.below(9000) {
            let (memory, base) = if random.below(3) == 0 { (&low, 0) } else { (&high, 0x1000) };
            let page = random.below(memory.pages);
            memory.store(page, round);
            written.insert(base + page);
        }
        let mut seen = Vec::new();
        loop {
            let room = random.below(3000) as usize;
            let some = take_some(&uffd, &layout, room);
            seen.extend_from_slice(&some);
            // From time to time, the rest at once.
            if some.len() < room || random.below(8) == 0 {
                seen.extend(take(&uffd, &layout).unwrap());
                break;
            }
        }
        let unique: BTreeSet<_> = seen.iter().copied().collect();
        assert_eq!(seen.len(), unique.len(), "a page came twice");
        assert_eq!(unique, written);
    }
}

#[test]
fn a_slot_that_is_always_written_does_not_keep_the_next_one_out() {
    let (busy, calm) =
        (Memory::new(Backing::Private, 512).unwrap(), Memory::new(Backing::Private, 8).unwrap());
    let layout = MemoryLayout::new(vec![busy.slot(0, 0), calm.slot(1, 1000)]).unwrap();
    let Some(uffd) = open(&layout) else { return };
    uffd.arm_all(&layout).unwrap();
    calm.store(7, 1);
    let mut calls = 0;
    loop {
        (0..512).for_each(|page| busy.store(page, 1));
        calls += 1;
        if take_some(&uffd, &layout, 100).contains(&1007) {
            break;
        }
        assert!(calls < 20);
    }
    // A take with room finds all earlier writes, before and after the place where it begins.
    (0..512).for_each(|page| busy.store(page, 2));
    let all: BTreeSet<_> = take(&uffd, &layout).unwrap().into_iter().collect();
    assert_eq!(all, (0..512).collect());
}

#[test]
fn leftovers_are_forgotten_when_tracking_begins_anew() {
    let memory = Memory::new(Backing::Shared, 64).unwrap();
    let Some((layout, uffd)) = track(&memory) else { return };
    (0..64).step_by(2).for_each(|page| memory.store(page, 1));
    assert_eq!(take_some(&uffd, &layout, 1).len(), 1);
    uffd.disarm_all(&layout).unwrap();
    uffd.arm_all(&layout).unwrap();
    assert_eq!(taken(&uffd, &layout), NONE);
    // Arming a page that is armed is allowed, and makes it clean.
    memory.store(1, 1);
    uffd.arm_all(&layout).unwrap();
    assert_eq!(taken(&uffd, &layout), NONE);
    memory.store(1, 1);
    assert_eq!(taken(&uffd, &layout), [1]);
}
