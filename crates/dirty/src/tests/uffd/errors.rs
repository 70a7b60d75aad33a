//! Memory that cannot be tracked, or no longer; and nothing is left behind.

use std::fs;
use std::io;

use super::{BASE, Backing, Memory, map, open, take, taken, track};
use crate::layout::{Gfn, MemoryLayout, MemorySlot};
use crate::source::{HarvestError, Source, Uffd, UffdError};

fn failed_slot<T: std::fmt::Debug>(result: Result<T, HarvestError>) -> (u32, io::Error) {
    match result {
        Err(HarvestError::GetDirtyLog { slot, source }) => (slot, source),
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_that_is_unmapped_is_an_error() {
    for backing in [Backing::Private, Backing::Shared] {
        let memory = Memory::new(backing, 64).unwrap();
        let Some((layout, uffd)) = track(&memory) else { return };
        memory.store(1, 1);
        memory.store(60, 1);
        memory.unmap(20, 2);
        let mut pages = Vec::new();
        let (slot, error) = failed_slot(uffd.take_armed(&layout, true, &mut |gfn| {
            pages.push(gfn.unwrap().0 - BASE);
            true
        }));
        assert_eq!((slot, pages), (3, vec![1, 60]));
        assert_eq!(error.to_string(), "a part of it is not mapped");
        // Mapped again, it is not ours; pages that were found before are handed out all the same.
        map(memory.page(20), 2, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1).unwrap();
        memory.store(2, 1);
        memory.store(4, 1);
        let mut pages = Vec::new();
        let (slot, error) = failed_slot(uffd.take_armed(&layout, true, &mut |gfn| {
            pages.push(gfn.unwrap().0 - BASE);
            true
        }));
        assert_eq!((slot, pages, error.raw_os_error()), (3, vec![2, 4], Some(libc::EPERM)));
        uffd.disarm_all(&layout).unwrap();
        assert!(!memory.is_registered());
        // From here on it is one mapping again.
        uffd.arm_all(&layout).unwrap();
        memory.store(21, 1);
        assert_eq!(taken(&uffd, &layout), [21]);
    }
}

#[test]
fn memory_that_is_gone_is_an_error() {
    let memory = Memory::new(Backing::Private, 64).unwrap();
    let Some((layout, uffd)) = track(&memory) else { return };
    memory.store(1, 1);
    memory.unmap(0, 64);
    assert_eq!(failed_slot(take(&uffd, &layout)).1.to_string(), "a part of it is not mapped");
    // There is nothing left to disarm.
    uffd.disarm_all(&layout).unwrap();
    assert_eq!(uffd.arm_all(&layout).unwrap_err().slot, 3);

    let beyond = MemorySlot { id: 5, base: Gfn(0), pages: 1 << 30, host_addr: u64::MAX - 0xfff };
    let memory = Memory::new(Backing::Private, 64).unwrap();
    let layout = MemoryLayout::new(vec![memory.slot(3, 1 << 31), beyond]).unwrap();
    let uffd = Uffd::open(&layout).unwrap();
    let error = uffd.arm_all(&layout).unwrap_err();
    assert_eq!((error.slot, error.source.raw_os_error()), (5, Some(libc::EINVAL)));
    assert!(!memory.is_registered());
    assert!(take(&uffd, &layout).is_err());
}

#[test]
fn what_cannot_be_armed_is_left_alone() {
    let (good, holey) =
        (Memory::new(Backing::Private, 64).unwrap(), Memory::new(Backing::Private, 64).unwrap());
    holey.unmap(10, 1);
    let layout = MemoryLayout::new(vec![good.slot(0, 0), holey.slot(1, 64)]).unwrap();
    let Some(uffd) = open(&layout) else { return };
    assert_eq!(uffd.arm_all(&layout).unwrap_err().slot, 1);
    assert!(!good.is_registered() && !holey.is_registered());
    // Two trackers cannot have the same memory, and the second does not spoil it for the first.
    let layout = MemoryLayout::new(vec![good.slot(0, 0)]).unwrap();
    let (first, second) = (Uffd::open(&layout).unwrap(), Uffd::open(&layout).unwrap());
    first.arm_all(&layout).unwrap();
    assert_eq!(second.arm_all(&layout).unwrap_err().source.raw_os_error(), Some(libc::EBUSY));
    good.store(9, 1);
    assert_eq!(take(&first, &layout).unwrap(), [9]);
}

#[test]
fn slots_may_not_share_addresses() {
    let memory = Memory::new(Backing::Private, 64).unwrap();
    let layout = MemoryLayout::new(vec![
        memory.slot(4, 0),
        MemorySlot { host_addr: memory.page(63) as u64, ..memory.slot(9, 100) },
    ]);
    let error = Uffd::open(&layout.unwrap()).err().unwrap();
    assert_eq!(error.to_string(), "memory slots 4 and 9 have the same host addresses");
}

#[test]
fn each_reason_is_one_line_and_says_what_to_do() {
    let of = |code| UffdError::from_open(io::Error::from_raw_os_error(code)).to_string();
    assert_eq!(of(libc::ENOSYS), "this kernel has no userfaultfd");
    assert!(of(libc::EPERM).contains("give access to /dev/userfaultfd"));
    assert!(of(libc::EINVAL).contains("Linux 6.7"));
    assert_eq!(of(libc::EMFILE), "cannot make a userfaultfd");
    assert!(
        [libc::ENOSYS, libc::EPERM, libc::EINVAL, libc::EMFILE].iter().all(|&code| !of(code).contains('\n'))
    );
}

#[test]
fn a_hundred_times_on_and_off_leaks_nothing() {
    let fds = || fs::read_dir("/proc/self/fd").unwrap().count();
    let mappings = || fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let memory = Memory::new(Backing::Shared, 64).unwrap();
    let Some((layout, uffd)) = track(&memory) else { return };
    let before = (fds(), mappings());
    for round in 0..100 {
        let page = round % 64;
        memory.store(page, round);
        assert_eq!(taken(&uffd, &layout), [page]);
        memory.store(page, round);
        uffd.disarm_all(&layout).unwrap();
        assert!(!memory.is_registered());
        uffd.arm_all(&layout).unwrap();
    }
    uffd.disarm_all(&layout).unwrap();
    for _ in 0..100 {
        let (layout, uffd) = track(&memory).unwrap();
        memory.store(1, 1);
        assert_eq!(taken(&uffd, &layout), [1]);
        // Dropped while armed: the kernel lets go of the memory with the descriptor.
    }
    assert!(!memory.is_registered());
    memory.store(1, 2);
    let after = (fds(), mappings());
    // Other tests run beside this one.
    assert!(after.0 < before.0 + 90 && after.1 < before.1 + 90, "{before:?} {after:?}");
}
