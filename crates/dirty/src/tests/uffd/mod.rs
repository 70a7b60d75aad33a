//! Write tracking without KVM, on memory of this process.
// UNSAFETY: maps memory and writes it through pointers and system calls, as those who are to be noticed do.
#![allow(unsafe_code)]

mod costs;
mod errors;
mod scan;
mod seen;
mod stamps;

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::layout::{Gfn, MemoryLayout, MemorySlot};
use crate::source::{HarvestError, Source, Uffd, UffdError};

pub(super) const PAGE: usize = 4096;
pub(super) const NONE: [u64; 0] = [];
/// Regions that one scan of the back end returns at most.
pub(super) const REGIONS: u64 = 4096;

// --- memory to be tracked
// -----------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Backing {
    Private,
    Shared,
    Huge,
}

/// A mapping of our own.
pub(super) struct Memory {
    pub(super) at: *mut u8,
    pub(super) pages: u64,
    pub(super) memfd: Option<File>,
}

// SAFETY: plain memory, written as atomic words or by the kernel; reads that compare come when writers are
// done.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

pub(super) fn map(at: *mut u8, pages: u64, flags: i32, fd: i32) -> io::Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: at a free address, or (with MAP_FIXED) over a mapping of the caller's own.
    let at = unsafe { libc::mmap(at.cast(), pages as usize * PAGE, access, flags, fd, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
}

/// An address far from the kernel's own choices for mappings: nothing of a parallel test gets into a hole
/// that is made there, and no two mappings become one.
pub(super) fn anywhere() -> *mut u8 {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000_0000_0000);
    std::ptr::with_exposed_provenance_mut(NEXT.fetch_add(1 << 36, Ordering::Relaxed))
}

impl Memory {
    pub(super) fn new(backing: Backing, pages: u64) -> io::Result<Memory> {
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

    pub(super) fn map(pages: u64, flags: i32, memfd: Option<File>) -> io::Result<Memory> {
        let fd = memfd.as_ref().map_or(-1, File::as_raw_fd);
        Ok(Memory { at: map(anywhere(), pages, flags | libc::MAP_FIXED_NOREPLACE, fd)?, pages, memfd })
    }

    pub(super) fn page(&self, page: u64) -> *mut u8 {
        assert!(page < self.pages);
        self.at.wrapping_add(page as usize * PAGE)
    }

    pub(super) fn word(&self, page: u64, index: usize) -> &AtomicU64 {
        assert!(index < PAGE / 8);
        // SAFETY: an aligned word inside a page of the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.page(page).cast::<u64>().add(index)) }
    }

    pub(super) fn store(&self, page: u64, value: u64) {
        self.word(page, page as usize % 512).store(value, Ordering::Relaxed);
    }

    pub(super) fn bytes(&self, page: u64) -> &[u8] {
        // SAFETY: a page of the mapping; whoever calls has told the writers to stop.
        unsafe { std::slice::from_raw_parts(self.page(page), PAGE) }
    }

    pub(super) fn advise(&self, page: u64, advice: i32) {
        // SAFETY: one page of our own mapping, of which no reference is held.
        assert_eq!(unsafe { libc::madvise(self.page(page).cast(), PAGE, advice) }, 0);
    }

    pub(super) fn unmap(&self, page: u64, pages: u64) {
        assert!(page + pages <= self.pages);
        // SAFETY: pages of our own mapping that nobody touches any more.
        assert_eq!(unsafe { libc::munmap(self.page(page).cast(), pages as usize * PAGE) }, 0);
    }

    pub(super) fn slot(&self, id: u32, base: u64) -> MemorySlot {
        MemorySlot { id, base: Gfn(base), pages: self.pages, host_addr: self.at as u64 }
    }

    /// Whether the kernel has any of it registered for write tracking.
    pub(super) fn is_registered(&self) -> bool {
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

pub(super) fn memfd() -> File {
    // SAFETY: a new descriptor from a constant name.
    unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC)) }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.unmap(0, self.pages);
    }
}

/// One slot at page 256, and its armed tracker; None, after saying why, if the kernel cannot do it.
pub(super) fn track(memory: &Memory) -> Option<(MemoryLayout, Uffd)> {
    let layout = MemoryLayout::new(vec![memory.slot(3, BASE)]).unwrap();
    let uffd = open(&layout)?;
    uffd.populate(0);
    uffd.arm_all(&layout).unwrap();
    Some((layout, uffd))
}

pub(super) const BASE: u64 = 256;

pub(super) fn open(layout: &MemoryLayout) -> Option<Uffd> {
    match Uffd::open(layout) {
        Ok(uffd) => Some(uffd),
        Err(error @ UffdError::Shared(..)) => panic!("{error}"),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

pub(super) fn memory(backing: Backing, pages: u64) -> Option<Memory> {
    match Memory::new(backing, pages) {
        Ok(memory) => Some(memory),
        Err(error) => {
            println!("skipped: no memory of kind {backing:?}: {error}");
            None
        }
    }
}

pub(super) fn take(uffd: &Uffd, layout: &MemoryLayout) -> Result<Vec<u64>, HarvestError> {
    let mut pages = Vec::new();
    let taken = uffd.take_armed(layout, true, &mut |gfn| {
        pages.push(gfn.unwrap().0);
        true
    });
    taken.map(|taken| {
        assert_eq!(taken, pages.len());
        pages
    })
}

/// As `take`, of a single slot at `BASE`.
pub(super) fn taken(uffd: &Uffd, layout: &MemoryLayout) -> Vec<u64> {
    take(uffd, layout).unwrap().into_iter().map(|gfn| gfn - BASE).collect()
}

/// Takes at most `room` pages.
pub(super) fn take_some(uffd: &Uffd, layout: &MemoryLayout, room: usize) -> Vec<u64> {
    let mut pages = Vec::new();
    let taken = uffd.take_armed(layout, true, &mut |gfn| {
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
pub(super) struct Random(u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

// --- system calls that write memory
// -------------------------------------------------------------------------------

/// A file of 64 equal bytes.
pub(super) fn source_of_bytes() -> File {
    let mut file = memfd();
    file.write_all(&[7; 64]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

pub(super) fn by_read(file: &File, to: *mut u8) {
    // SAFETY: 8 bytes of mapped memory that the caller owns.
    assert_eq!(unsafe { libc::read(file.as_raw_fd(), to.cast(), 8) }, 8);
}

pub(super) fn by_preadv(file: &File, to: [*mut u8; 2]) {
    let parts = to.map(|to| libc::iovec { iov_base: to.cast(), iov_len: 8 });
    // SAFETY: 8 bytes each of mapped memory that the caller owns.
    assert_eq!(unsafe { libc::preadv(file.as_raw_fd(), parts.as_ptr(), 2, 0) }, 16);
}

pub(super) fn by_process_vm_writev(to: *mut u8, value: u64) {
    let from = libc::iovec { iov_base: (&raw const value).cast_mut().cast(), iov_len: 8 };
    let to = libc::iovec { iov_base: to.cast(), iov_len: 8 };
    // SAFETY: 8 bytes from a local to mapped memory that the caller owns.
    assert_eq!(unsafe { libc::process_vm_writev(libc::getpid(), &from, 1, &to, 1, 0) }, 8);
}
