//! Which writes are seen, and which are not.
// UNSAFETY: advises and protects memory of its own.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::Ordering;

use super::{
    Backing, Memory, NONE, PAGE, by_preadv, by_process_vm_writev, by_read, map, memory, source_of_bytes,
    take, taken, track,
};
use crate::layout::{MemoryLayout, MemorySlot};
use crate::source::{Source, Uffd};

#[test]
fn writes_of_every_kind_are_seen_once() {
    for backing in [Backing::Private, Backing::Shared] {
        let memory = Memory::new(backing, 4096).unwrap();
        // Some of it exists before it is tracked.
        (100..200).for_each(|page| memory.store(page, 1));
        let Some((layout, uffd)) = track(&memory) else { return };
        assert!(memory.is_registered());
        assert_eq!(taken(&uffd, &layout), NONE, "{backing:?}: clean after arm_all");

        for page in [0, 99, 100, 150, 4095] {
            memory.store(page, 2);
        }
        assert_eq!(taken(&uffd, &layout), [0, 99, 100, 150, 4095]);
        assert_eq!(taken(&uffd, &layout), NONE);
        // Writing the same value again is a write; reading is not.
        memory.store(150, 2);
        assert_eq!(
            memory.word(151, 0).load(Ordering::Relaxed) + memory.word(9, 0).load(Ordering::Relaxed),
            0
        );
        assert_eq!(taken(&uffd, &layout), [150]);

        let file = source_of_bytes();
        by_read(&file, memory.page(120));
        by_preadv(&file, [memory.page(130), memory.page(3000)]);
        by_process_vm_writev(memory.page(140), 1);
        by_process_vm_writev(memory.page(3001), 1);
        assert_eq!(taken(&uffd, &layout), [120, 130, 140, 3000, 3001], "{backing:?}: by the kernel");
        assert_eq!((memory.bytes(120)[0], memory.bytes(3000)[7], memory.bytes(3001)[0]), (7, 7, 1));

        uffd.disarm_all(&layout).unwrap();
        assert!(!memory.is_registered());
        memory.store(120, 8);
        assert!(take(&uffd, &layout).is_err(), "not tracked any more");
    }
}

/// Pages that are given back and return as zero have changed; pages of a memfd keep their contents.
#[test]
fn pages_given_back() {
    for (backing, expected) in [(Backing::Private, &[5][..]), (Backing::Shared, &[])] {
        let memory = Memory::new(backing, 64).unwrap();
        (0..64).for_each(|page| memory.store(page, 1));
        let Some((layout, uffd)) = track(&memory) else { return };
        memory.advise(5, libc::MADV_DONTNEED);
        assert_eq!(taken(&uffd, &layout), expected, "{backing:?}");
        memory.store(5, 2);
        assert_eq!(taken(&uffd, &layout), [5], "{backing:?}");
    }
}

/// The documented limits. If a kernel reports one of these some day, the documentation has to change.
#[test]
fn writes_past_the_mapping_are_not_seen() {
    let memory = Memory::new(Backing::Shared, 64).unwrap();
    (0..64).for_each(|page| memory.store(page, 1));
    let Some((layout, uffd)) = track(&memory) else { return };
    let file = memory.memfd.as_ref().unwrap();
    let other = Memory::map(64, libc::MAP_SHARED, file.try_clone().ok()).unwrap();
    other.store(1, 2);
    assert_eq!(memory.word(1, 1).load(Ordering::Relaxed), 2);
    assert_eq!(taken(&uffd, &layout), NONE, "a store to another mapping");
    file.write_all_at(&[3; 8], 2 * PAGE as u64).unwrap();
    assert_eq!(memory.bytes(2)[0], 3);
    assert_eq!(taken(&uffd, &layout), NONE, "pwrite to the memfd");
    memory.advise(3, libc::MADV_REMOVE);
    assert_eq!(taken(&uffd, &layout), NONE, "a hole punched");
    // After it the page is tracked as before.
    memory.store(3, 2);
    assert_eq!(taken(&uffd, &layout), [3]);
}

#[test]
fn a_huge_page_of_hugetlb_is_dirty_as_a_whole() {
    let Some(memory) = memory(Backing::Huge, 1024) else { return };
    let Some((layout, uffd)) = track(&memory) else { return };
    assert_eq!(taken(&uffd, &layout), NONE);
    memory.store(700, 1);
    assert_eq!(taken(&uffd, &layout), (512..1024).collect::<Vec<_>>());
    assert_eq!(taken(&uffd, &layout), NONE);
    let part = MemorySlot { pages: 100, ..memory.slot(1, 0) };
    let layout = MemoryLayout::new(vec![part]).unwrap();
    let error = Uffd::open(&layout).unwrap().arm_all(&layout).unwrap_err();
    assert_eq!((error.slot, error.source.raw_os_error()), (1, Some(libc::EINVAL)));
}

/// A write splits transparent huge pages, and they are tracked by small page.
#[test]
fn a_transparent_huge_page_is_not() {
    let memory = Memory::new(Backing::Private, 4096).unwrap();
    // SAFETY: our own mapping; the advice changes no contents.
    unsafe { libc::madvise(memory.at.cast(), 4096 * PAGE, libc::MADV_HUGEPAGE) };
    (0..4096).for_each(|page| memory.store(page, 1));
    let Some((layout, uffd)) = track(&memory) else { return };
    assert_eq!(taken(&uffd, &layout), NONE);
    for _ in 0..2 {
        memory.store(1000, 2);
        memory.store(3000, 2);
        assert_eq!(taken(&uffd, &layout), [1000, 3000]);
    }
}

/// No privilege is needed, even with vm.unprivileged_userfaultfd at 0: the same test as nobody.
#[test]
fn works_without_privileges() {
    if track(&Memory::new(Backing::Private, 1).unwrap()).is_none() {
        return;
    }
    let program = std::env::current_exe().unwrap();
    let test = "tests::uffd::seen::writes_of_every_kind_are_seen_once";
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]).uid(65534).gid(65534).current_dir("/");
    match command.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
            assert!(!said.contains("skipped"), "{said}");
        }
        Err(error) => println!("skipped: cannot run as nobody: {error}"),
    }
}

#[test]
fn one_slot_of_many_mappings() {
    let memory = Memory::new(Backing::Private, 256).unwrap();
    let shared = Memory::new(Backing::Shared, 64).unwrap();
    let fd = shared.memfd.as_ref().unwrap().as_raw_fd();
    map(memory.page(64), 64, libc::MAP_SHARED | libc::MAP_FIXED, fd).unwrap();
    let allow = |access| {
        // SAFETY: pages of our own, which nobody writes while they are read only.
        assert_eq!(unsafe { libc::mprotect(memory.page(200).cast(), 8 * PAGE, access) }, 0);
    };
    allow(libc::PROT_READ);
    let Some((layout, uffd)) = track(&memory) else { return };
    assert_eq!(taken(&uffd, &layout), NONE);
    let written: Vec<_> = (0..256).filter(|page| !(200..208).contains(page)).collect();
    written.iter().for_each(|&page| memory.store(page, 1));
    assert_eq!(taken(&uffd, &layout), written);
    allow(libc::PROT_READ | libc::PROT_WRITE);
    memory.store(203, 1);
    assert_eq!(taken(&uffd, &layout), [203]);
    uffd.disarm_all(&layout).unwrap();
}
