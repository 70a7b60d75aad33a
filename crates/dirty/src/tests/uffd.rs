//! Write tracking without KVM, on memory of this process.
// UNSAFETY: maps memory and writes it through pointers and system calls, as those who are to be noticed do.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::layout::{Gfn, Layout, Slot};
use crate::source::{HarvestError, Source, Uffd, UffdError};

const PAGE: usize = 4096;
const NONE: [u64; 0] = [];
/// Regions that one scan of the back end returns at most.
const REGIONS: u64 = 4096;

// --- memory to be tracked -----------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq)]
enum Backing {
    Private,
    Shared,
    Huge,
}

/// A mapping of our own.
struct Memory {
    at: *mut u8,
    pages: u64,
    memfd: Option<File>,
}

// SAFETY: plain memory, written as atomic words or by the kernel; reads that compare come when writers are done.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

fn map(at: *mut u8, pages: u64, flags: i32, fd: i32) -> io::Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: at a free address, or (with MAP_FIXED) over a mapping of the caller's own.
    let at = unsafe { libc::mmap(at.cast(), pages as usize * PAGE, access, flags, fd, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
}

/// An address far from where the kernel puts mappings by itself: nothing of a test that runs beside this one comes
/// into a hole that is made there, and no two mappings become one.
fn anywhere() -> *mut u8 {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000_0000_0000);
    std::ptr::with_exposed_provenance_mut(NEXT.fetch_add(1 << 36, Ordering::Relaxed))
}

impl Memory {
    fn new(backing: Backing, pages: u64) -> io::Result<Memory> {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        match backing {
            Backing::Private => Memory::map(pages, anonymous, None),
            Backing::Huge => Memory::map(pages, anonymous | libc::MAP_HUGETLB, None),
            Backing::Shared => {
                let file = memfd();
                file.set_len(pages * PAGE as u64)?;
                Memory::map(pages, libc::MAP_SHARED, Some(file))
            }
        }
    }

    fn map(pages: u64, flags: i32, memfd: Option<File>) -> io::Result<Memory> {
        let fd = memfd.as_ref().map_or(-1, File::as_raw_fd);
        Ok(Memory { at: map(anywhere(), pages, flags | libc::MAP_FIXED_NOREPLACE, fd)?, pages, memfd })
    }

    fn page(&self, page: u64) -> *mut u8 {
        assert!(page < self.pages);
        self.at.wrapping_add(page as usize * PAGE)
    }

    fn word(&self, page: u64, index: usize) -> &AtomicU64 {
        assert!(index < PAGE / 8);
        // SAFETY: an aligned word inside a page of the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.page(page).cast::<u64>().add(index)) }
    }

    fn store(&self, page: u64, value: u64) {
        self.word(page, page as usize % 512).store(value, Ordering::Relaxed);
    }

    fn bytes(&self, page: u64) -> &[u8] {
        // SAFETY: a page of the mapping; whoever calls has told the writers to stop.
        unsafe { std::slice::from_raw_parts(self.page(page), PAGE) }
    }

    fn advise(&self, page: u64, advice: i32) {
        // SAFETY: one page of our own mapping, of which no reference is held.
        assert_eq!(unsafe { libc::madvise(self.page(page).cast(), PAGE, advice) }, 0);
    }

    fn unmap(&self, page: u64, pages: u64) {
        assert!(page + pages <= self.pages);
        // SAFETY: pages of our own mapping that nobody touches any more.
        assert_eq!(unsafe { libc::munmap(self.page(page).cast(), pages as usize * PAGE) }, 0);
    }

    fn slot(&self, id: u32, base: u64) -> Slot {
        Slot { id, base: Gfn(base), pages: self.pages, host_addr: self.at as u64 }
    }

    /// Whether the kernel has any of it registered for write tracking.
    fn is_registered(&self) -> bool {
        let (own, mut inside) = (self.at as u64..self.page(self.pages - 1) as u64 + 1, false);
        fs::read_to_string("/proc/self/smaps").unwrap().lines().any(|line| {
            let word = line.split_whitespace().next().unwrap_or_default();
            if let Some((start, _)) = word.split_once('-') {
                inside = own.contains(&u64::from_str_radix(start, 16).unwrap());
            }
            inside && word == "VmFlags:" && line.contains(" uw")
        })
    }
}

fn memfd() -> File {
    // SAFETY: a new descriptor from a constant name.
    unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC)) }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.unmap(0, self.pages);
    }
}

/// One slot at page 256, and its armed tracker; None, after saying why, where the kernel cannot.
fn track(memory: &Memory) -> Option<(Layout, Uffd)> {
    let layout = Layout::new(vec![memory.slot(3, BASE)]).unwrap();
    let uffd = open(&layout)?;
    uffd.populate();
    uffd.arm_all(&layout).unwrap();
    Some((layout, uffd))
}

const BASE: u64 = 256;

fn open(layout: &Layout) -> Option<Uffd> {
    match Uffd::open(layout) {
        Ok(uffd) => Some(uffd),
        Err(error @ UffdError::Shared(..)) => panic!("{error}"),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn memory(backing: Backing, pages: u64) -> Option<Memory> {
    match Memory::new(backing, pages) {
        Ok(memory) => Some(memory),
        Err(error) => {
            println!("skipped: no memory of kind {backing:?}: {error}");
            None
        }
    }
}

fn take(uffd: &Uffd, layout: &Layout) -> Result<Vec<u64>, HarvestError> {
    let mut pages = Vec::new();
    let taken = uffd.take_shared(layout, &mut |gfn| {
        pages.push(gfn.unwrap().0);
        true
    });
    taken.map(|taken| {
        assert_eq!(taken, pages.len());
        pages
    })
}

/// As `take`, of a single slot at `BASE`.
fn taken(uffd: &Uffd, layout: &Layout) -> Vec<u64> {
    take(uffd, layout).unwrap().into_iter().map(|gfn| gfn - BASE).collect()
}

/// Takes at most `room` pages.
fn take_some(uffd: &Uffd, layout: &Layout, room: usize) -> Vec<u64> {
    let mut pages = Vec::new();
    let taken = uffd.take_shared(layout, &mut |gfn| {
        let fits = pages.len() < room;
        if fits {
            pages.push(gfn.unwrap().0);
        }
        fits
    });
    assert_eq!(taken.unwrap(), pages.len());
    pages
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

// --- system calls that write memory -------------------------------------------------------------------------------

/// A file that reads as 64 bytes of the same.
fn source_of_bytes() -> File {
    let mut file = memfd();
    file.write_all(&[7; 64]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

fn by_read(file: &File, to: *mut u8) {
    // SAFETY: 8 bytes of mapped memory that the caller owns.
    assert_eq!(unsafe { libc::read(file.as_raw_fd(), to.cast(), 8) }, 8);
}

fn by_preadv(file: &File, to: [*mut u8; 2]) {
    let parts = to.map(|to| libc::iovec { iov_base: to.cast(), iov_len: 8 });
    // SAFETY: 8 bytes each of mapped memory that the caller owns.
    assert_eq!(unsafe { libc::preadv(file.as_raw_fd(), parts.as_ptr(), 2, 0) }, 16);
}

fn by_process_vm_writev(to: *mut u8, value: u64) {
    let from = libc::iovec { iov_base: (&raw const value).cast_mut().cast(), iov_len: 8 };
    let to = libc::iovec { iov_base: to.cast(), iov_len: 8 };
    // SAFETY: 8 bytes from a local to mapped memory that the caller owns.
    assert_eq!(unsafe { libc::process_vm_writev(libc::getpid(), &from, 1, &to, 1, 0) }, 8);
}

// --- what is seen -------------------------------------------------------------------------------------------------

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
        // The same value again is a write; a read is none.
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
        assert_eq!((uffd.pending(), uffd.arms_when_taken()), (11, true));
        uffd.begin();
        assert_eq!(uffd.pending(), 0);

        uffd.disarm_all(&layout).unwrap();
        assert!(!memory.is_registered());
        memory.store(120, 8);
        assert!(take(&uffd, &layout).is_err(), "not tracked any more");
    }
}

/// Pages that are given back and come again as zero have changed; those of a memfd keep their contents.
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

/// The documented limits. Should a kernel report one of these some day, it is the documentation that has to change.
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
    std::os::unix::fs::FileExt::write_all_at(file, &[3; 8], 2 * PAGE as u64).unwrap();
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
    let part = Slot { pages: 100, ..memory.slot(1, 0) };
    let layout = Layout::new(vec![part]).unwrap();
    let error = Uffd::open(&layout).unwrap().arm_all(&layout).unwrap_err();
    assert_eq!((error.slot, error.source.raw_os_error()), (1, Some(libc::EINVAL)));
}

/// Transparent huge pages are split by a write, and tracked by small page.
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

// --- the scan -----------------------------------------------------------------------------------------------------

/// More regions than the kernel's own buffer has room for (512), and than ours has.
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
    let layout = Layout::new(vec![high.slot(0, 0x1000), low.slot(1, 0)]).unwrap();
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
            // The rest at once, now and then.
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
    let layout = Layout::new(vec![busy.slot(0, 0), calm.slot(1, 1000)]).unwrap();
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
    // And a take with room finds all that was written by then, in front of and behind the place where it begins.
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
    // Arming what is armed is allowed, and makes it clean.
    memory.store(1, 1);
    uffd.arm_all(&layout).unwrap();
    assert_eq!(taken(&uffd, &layout), NONE);
    memory.store(1, 1);
    assert_eq!(taken(&uffd, &layout), [1]);
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

// --- errors -------------------------------------------------------------------------------------------------------

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
        let (slot, error) = failed_slot(uffd.take_shared(&layout, &mut |gfn| {
            pages.push(gfn.unwrap().0 - BASE);
            true
        }));
        assert_eq!((slot, pages), (3, vec![1, 60]));
        assert_eq!(error.to_string(), "a part of it is not mapped");
        // Mapped again, it is not ours; what was found before it is handed out all the same.
        map(memory.page(20), 2, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1).unwrap();
        memory.store(2, 1);
        memory.store(4, 1);
        let mut pages = Vec::new();
        let (slot, error) = failed_slot(uffd.take_shared(&layout, &mut |gfn| {
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

    let beyond = Slot { id: 5, base: Gfn(0), pages: 1 << 30, host_addr: u64::MAX - 0xfff };
    let memory = Memory::new(Backing::Private, 64).unwrap();
    let layout = Layout::new(vec![memory.slot(3, 1 << 31), beyond]).unwrap();
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
    let layout = Layout::new(vec![good.slot(0, 0), holey.slot(1, 64)]).unwrap();
    let Some(uffd) = open(&layout) else { return };
    assert_eq!(uffd.arm_all(&layout).unwrap_err().slot, 1);
    assert!(!good.is_registered() && !holey.is_registered());
    // Two trackers cannot have the same memory, and the second does not spoil it for the first.
    let layout = Layout::new(vec![good.slot(0, 0)]).unwrap();
    let (first, second) = (Uffd::open(&layout).unwrap(), Uffd::open(&layout).unwrap());
    first.arm_all(&layout).unwrap();
    assert_eq!(second.arm_all(&layout).unwrap_err().source.raw_os_error(), Some(libc::EBUSY));
    good.store(9, 1);
    assert_eq!(take(&first, &layout).unwrap(), [9]);
}

#[test]
fn slots_may_not_share_addresses() {
    let memory = Memory::new(Backing::Private, 64).unwrap();
    let layout = Layout::new(vec![
        memory.slot(4, 0),
        Slot { host_addr: memory.page(63) as u64, ..memory.slot(9, 100) },
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

/// No privilege is needed, with vm.unprivileged_userfaultfd at 0 too: the same test as nobody.
#[test]
fn works_without_privileges() {
    let program = std::env::current_exe().unwrap();
    let test = "tests::uffd::writes_of_every_kind_are_seen_once";
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

// --- against a copy -----------------------------------------------------------------------------------------------

/// Writers that write until told to stop, and a copy made of nothing but the reported pages.
struct Writers<'a> {
    memories: &'a [Memory],
    file: File,
    stamp: AtomicU64,
    stop: AtomicBool,
}

impl Writers<'_> {
    fn write_some(&self, random: &mut Random) {
        for _ in 0..random.below(400) {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let memory = &self.memories[random.below(self.memories.len() as u64) as usize];
            let page = random.below(memory.pages);
            let stamp = self.stamp.fetch_add(1, Ordering::Relaxed);
            // At a place of its own, so that a page that is taken too early differs.
            let place = random.below(512) as usize;
            match random.below(16) {
                0 => by_process_vm_writev(memory.word(page, place).as_ptr().cast(), stamp),
                1 => by_preadv(&self.file, [memory.page(page), memory.page(random.below(memory.pages))]),
                _ => memory.word(page, place).store(stamp, Ordering::Relaxed),
            }
        }
    }
}

/// Runs epochs. Returns the pages reported, and those that had changed and were not. `lose` drops every n-th.
fn epochs(epochs: u64, lose: u64) -> Option<(usize, usize)> {
    let memories = [Memory::new(Backing::Private, 700).unwrap(), Memory::new(Backing::Shared, 900).unwrap()];
    let bases = [0, 0x2000];
    let slots = memories.iter().zip(bases).zip(0..).map(|((memory, base), id)| memory.slot(id, base));
    let layout = Layout::new(slots.collect()).unwrap();
    let uffd = open(&layout)?;
    let writers = Writers {
        memories: &memories,
        file: source_of_bytes(),
        stamp: AtomicU64::new(1),
        stop: AtomicBool::new(false),
    };
    let pages = || {
        memories
            .iter()
            .zip(bases)
            .flat_map(|(memory, base)| (0..memory.pages).map(move |page| (memory, base, page)))
    };
    uffd.populate();
    uffd.arm_all(&layout).unwrap();
    let mut copy: BTreeMap<u64, Vec<u8>> =
        pages().map(|(memory, base, page)| (base + page, memory.bytes(page).to_vec())).collect();
    let (mut reported, mut missed) = (0, 0);
    let mut random = Random(11);
    std::thread::scope(|scope| {
        let (done, is_done) = channel();
        let starts: Vec<_> = (0..2)
            .map(|seed| {
                let (start, starts) = channel::<()>();
                let (done, writers) = (done.clone(), &writers);
                scope.spawn(move || {
                    let mut random = Random(seed);
                    starts.iter().for_each(|()| {
                        writers.write_some(&mut random);
                        done.send(()).unwrap();
                    });
                });
                start
            })
            .collect();
        for _ in 0..epochs {
            writers.stop.store(false, Ordering::Relaxed);
            starts.iter().for_each(|start| start.send(()).unwrap());
            // Takes while they write, some with too little room.
            let mut dirty = BTreeSet::new();
            for _ in 0..random.below(3) {
                std::thread::sleep(Duration::from_micros(random.below(100)));
                dirty.extend(take_some(&uffd, &layout, random.below(200) as usize));
            }
            if random.below(4) == 0 {
                writers.stop.store(true, Ordering::Relaxed);
            }
            starts.iter().for_each(|_| is_done.recv().unwrap());
            dirty.extend(take(&uffd, &layout).unwrap());
            reported += dirty.len();
            for (memory, base, page) in pages() {
                let (gfn, old) = (base + page, copy.get_mut(&(base + page)).unwrap());
                let copied =
                    dirty.contains(&gfn) && (lose == 0 || !(gfn + reported as u64).is_multiple_of(lose));
                if !copied && old != memory.bytes(page) {
                    missed += 1;
                }
                old.copy_from_slice(memory.bytes(page));
            }
        }
        drop(starts);
    });
    uffd.disarm_all(&layout).unwrap();
    println!("{reported} pages in {epochs} epochs, {missed} missed");
    Some((reported, missed))
}

#[test]
fn no_write_of_two_threads_is_missed() {
    let Some((reported, missed)) = epochs(400, 0) else { return };
    assert!(reported > 20_000, "the test has tested nothing");
    assert_eq!(missed, 0);
}

#[test]
fn the_test_notices_a_lost_page() {
    let Some((_, missed)) = epochs(50, 500) else { return };
    assert!(missed > 0);
}

// --- costs --------------------------------------------------------------------------------------------------------

fn median(mut rounds: Vec<Duration>) -> f64 {
    rounds.sort_unstable();
    rounds[rounds.len() / 2].as_secs_f64() * 1e6
}

/// `cargo test --release -p outlive-dirty uffd::costs -- --ignored --nocapture --test-threads=1`
#[test]
#[ignore = "measures"]
fn costs() {
    for (gib, backing) in [(1, Backing::Private), (1, Backing::Shared), (4, Backing::Shared)] {
        let memory = Memory::new(backing, gib << 18).unwrap();
        let layout = Layout::new(vec![memory.slot(3, BASE)]).unwrap();
        let Some(uffd) = open(&layout) else { return };
        uffd.populate();
        for touched in [false, true] {
            if touched {
                (0..memory.pages).for_each(|page| memory.store(page, 1));
            }
            let begin = Instant::now();
            uffd.arm_all(&layout).unwrap();
            let arm = begin.elapsed();
            for written in [0, 1, 100, 1000, 3000] {
                let (mut writes, mut takes) = (Vec::new(), Vec::new());
                for round in 0..31 {
                    let begin = Instant::now();
                    (0..written).for_each(|page| memory.store(page * memory.pages / written, round));
                    writes.push(begin.elapsed());
                    let begin = Instant::now();
                    let taken = uffd.take_shared(&layout, &mut |_| true).unwrap();
                    takes.push(begin.elapsed());
                    assert_eq!(taken as u64, written);
                }
                println!(
                    "{gib} GiB {backing:?} touched {touched}: {written} pages: take {:.0} us, write fault {:.2} us",
                    median(takes),
                    median(writes) / written.max(1) as f64
                );
            }
            let begin = Instant::now();
            uffd.disarm_all(&layout).unwrap();
            println!("  arm_all {arm:?}, disarm_all {:?}", begin.elapsed());
        }
    }
}
