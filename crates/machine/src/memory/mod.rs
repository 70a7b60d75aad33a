//! Guest memory: its layout, its mapping, and the only code that touches it by raw pointers.
//!
//! x86 reserves the gigabyte below 4 GiB for devices, so memory of more than 3 GiB is split: the
//! part below [`HOLE_START`] and the rest from [`HOLE_END`] on.

// UNSAFETY: pages are copied between guest memory and staging by raw pointers with
// non-temporal stores, and `mmap` regions are handed to KVM by address.
#![allow(unsafe_code)]

mod copy;
mod hash;
mod lock;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use outlive_dirty::{Gfn, GlobalLog, MemorySlot, RegionLog};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::map::{HOLE_END, HOLE_START, Range};

pub use copy::is_zero_page;
pub(crate) use copy::{Stores, copy_page, finish_copies};
pub use hash::{TouchedPages, page_sum};
pub use lock::{LockError, lock_memory};

/// Bytes in a page, on the guest's side and on the wire.
pub const PAGE_SIZE: usize = 4096;
/// The least memory with which the payload guest boots, in bytes.
pub const MIN_MEMORY: u64 = 32 << 20;

/// How many bytes a boot image may have.
const FIRMWARE_MAX: u64 = 4 << 30;

/// Of an entry of `/proc/self/pagemap`: present, or swapped out.
const KNOWN: u64 = 0b11 << 62;

/// Guest memory whose writes by device models are logged for the next checkpoint (invariant 4).
pub type GuestMemory = GuestMemoryMmap<RegionLog>;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not one that a guest can have.
    #[error(
        "guest memory cannot have {}: it must be a multiple of 1 MiB, from 32 MiB to 64 TiB{}", amount(*.0), meant(*.0)
    )]
    Size(u64),
    /// More than any kernel and initrd need.
    #[error("a boot image of {0} bytes is too large: the limit is 4 GiB")]
    Firmware(u64),
    /// `mmap` refused.
    #[error("cannot reserve {bytes} bytes of guest memory: {source}")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What the kernel said.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The regions do not form a memory.
    #[error("guest memory regions do not fit together: {0}")]
    Regions(String),
}

/// As a person would write it: in the largest unit that it is a whole number of.
fn amount(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let whole = |(shift, _): &&(u32, &str)| bytes > 0 && bytes.trailing_zeros() >= *shift;
    match units.iter().find(whole) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

/// A number that was probably one of MiB.
fn meant(bytes: u64) -> String {
    if (32..1 << 20).contains(&bytes) { format!("; did you mean {bytes}M?") } else { String::new() }
}

/// The ranges of a guest with `bytes` of memory, whole pages each.
///
/// # Errors
/// [`MemoryError::Size`] when `bytes` is below [`MIN_MEMORY`] or no multiple of 1 MiB.
pub fn ranges(bytes: u64) -> Result<Vec<Range>, MemoryError> {
    if bytes < MIN_MEMORY || !bytes.is_multiple_of(1 << 20) || bytes > 1 << 46 {
        return Err(MemoryError::Size(bytes));
    }
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![Range { base: 0, len: low }];
    if bytes > low {
        ranges.push(Range { base: HOLE_END, len: bytes - low });
    }
    Ok(ranges)
}

/// The region behind a guest's memory that holds what it boots from: at a multiple of 2 MiB, and never in the
/// device window.
fn firmware_range(ranges: &[Range], bytes: u64) -> Option<Range> {
    const ALIGN: u64 = 2 << 20;
    let last = ranges.last().filter(|_| bytes > 0)?;
    let (end, len) = ((last.base + last.len).next_multiple_of(ALIGN), bytes.next_multiple_of(ALIGN));
    let below = end < HOLE_START && end + len <= HOLE_START;
    Some(Range { base: if below { end } else { end.max(HOLE_END) }, len })
}

#[derive(Clone, Copy)]
struct Mapped {
    base: u64,
    pages: u64,
    host: *mut u8,
}

/// Keeps guest memory out of core dumps of this process: it contains the guest's secrets, and writing the
/// dump would keep the link open, so a standby would learn of the end late.
pub(crate) fn keep_out_of_dumps(at: *mut u8, bytes: usize) {
    // SAFETY: advice about our own mapping; its contents do not change.
    if unsafe { libc::madvise(at.cast(), bytes, libc::MADV_DONTDUMP) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "a core dump may contain the guest's \
        memory");
    }
}

/// The memory of one VM, in both of its views: `vm-memory` for device models and boot code, raw
/// pages for checkpoint and restore.
pub struct Ram {
    memory: GuestMemory,
    log: Arc<GlobalLog>,
    mapped: Vec<Mapped>,
    bytes: u64,
    firmware: Option<Range>,
}

// SAFETY: `mapped` points into the regions that `memory` owns and keeps mapped for as long as the
// `Ram` lives; every access through the pointers is a copy whose races the callers exclude (see
// `read_page` and `write_page`).
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// Reserves `bytes` of guest memory, not yet populated. Up to `log_capacity` pages written by
    /// device models in one epoch are listed; more are still found, only more slowly.
    ///
    /// # Errors
    /// [`MemoryError`] for impossible sizes and when the address space is refused.
    pub fn new(bytes: u64, log_capacity: usize) -> Result<Self, MemoryError> {
        Self::with_firmware(bytes, 0, log_capacity)
    }

    /// Like [`new`](Self::new), with a region of `firmware_bytes` behind the memory that no memory map names.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_firmware(bytes: u64, firmware_bytes: u64, log_capacity: usize) -> Result<Self, MemoryError> {
        let mut ranges = ranges(bytes)?;
        if firmware_bytes > FIRMWARE_MAX {
            return Err(MemoryError::Firmware(firmware_bytes));
        }
        let firmware = firmware_range(&ranges, firmware_bytes);
        ranges.extend(firmware);
        let end = ranges.last().map_or(0, |r| r.base + r.len);
        let log = GlobalLog::new(end / PAGE_SIZE as u64, log_capacity);
        let mut regions = Vec::new();
        let mut mapped = Vec::new();
        for range in &ranges {
            let bitmap = RegionLog::new(log.clone(), Gfn(range.base / PAGE_SIZE as u64));
            let region = MmapRegionBuilder::new_with_bitmap(range.len as usize, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                .build()
                .map_err(|source| MemoryError::Map { bytes: range.len, source })?;
            keep_out_of_dumps(region.as_ptr(), region.size());
            mapped.push(Mapped {
                base: range.base / PAGE_SIZE as u64,
                pages: range.len / PAGE_SIZE as u64,
                host: region.as_ptr(),
            });
            let region = GuestRegionMmap::new(region, GuestAddress(range.base))
                .ok_or_else(|| MemoryError::Regions("address overflow".into()))?;
            regions.push(region);
        }
        let memory = GuestMemory::from_regions(regions).map_err(|e| MemoryError::Regions(e.to_string()))?;
        Ok(Self { memory, log, mapped, bytes, firmware })
    }

    /// The `vm-memory` view; writes through it are logged.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The log of writes made outside vCPUs.
    pub fn log(&self) -> &Arc<GlobalLog> {
        &self.log
    }

    /// Size of the guest's memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is the memory of a VM with so many bytes, and so many to boot from.
    pub fn is_of(&self, bytes: u64, firmware_bytes: u64) -> bool {
        let same =
            || ranges(bytes).is_ok_and(|ranges| self.firmware == firmware_range(&ranges, firmware_bytes));
        self.bytes == bytes && same()
    }

    /// Number of pages of the VM: those of its memory and of its boot image, if it has one.
    pub fn pages(&self) -> u64 {
        self.mapped.iter().map(|m| m.pages).sum()
    }

    /// The region that holds what the VM boots from.
    pub(crate) fn firmware(&self) -> Option<Range> {
        self.firmware
    }

    /// The KVM memory slots, one for each range, with host addresses.
    pub fn slots(&self) -> Vec<MemorySlot> {
        let slot = |(id, m): (usize, &Mapped)| MemorySlot {
            id: id as u32,
            base: Gfn(m.base),
            pages: m.pages,
            host_addr: m.host as u64,
        };
        self.mapped.iter().enumerate().map(slot).collect()
    }

    /// Every GFN of the guest in ascending order.
    pub fn gfns(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.mapped.iter().flat_map(|m| (m.base..m.base + m.pages).map(Gfn))
    }

    /// The GFNs of pages that have ever been touched, in ascending order. All others are zero, and have been
    /// since the machine was made. Read from `/proc/self/pagemap`, where bit 63 says present and bit 62
    /// swapped out (Linux, Documentation/admin-guide/mm/pagemap.rst); 8 bytes a page, so a terabyte takes 2
    /// GiB of reading and no fault.
    ///
    /// # Errors
    /// The operating system's; then take [`gfns`](Self::gfns).
    pub fn touched(&self) -> std::io::Result<Vec<Gfn>> {
        const CHUNK: u64 = 64 << 10;
        let pagemap = std::fs::File::open("/proc/self/pagemap")?;
        let mut entries = vec![0u8; CHUNK as usize * 8];
        let mut touched = Vec::new();
        for m in &self.mapped {
            let first = m.host as u64 / PAGE_SIZE as u64;
            for start in (0..m.pages).step_by(CHUNK as usize) {
                let count = (m.pages - start).min(CHUNK);
                let bytes = &mut entries[..count as usize * 8];
                pagemap.read_exact_at(bytes, (first + start) * 8)?;
                let (words, _) = bytes.as_chunks::<8>();
                let known = |(i, word): (usize, &[u8; 8])| {
                    (u64::from_ne_bytes(*word) & KNOWN != 0).then_some(Gfn(m.base + start + i as u64))
                };
                touched.extend(words.iter().enumerate().filter_map(known));
            }
        }
        Ok(touched)
    }

    /// Reads the entries of the pages from `first` on. Returns false if the guest has not all of them, or the
    /// system does not tell.
    fn read_pagemap(&self, pagemap: &std::fs::File, first: Gfn, entries: &mut [u8]) -> bool {
        let count = entries.len() as u64 / 8;
        let last = first.0.checked_add(count - 1).map(Gfn);
        let (Some(begin), Some(end)) = (self.host(first), last.and_then(|last| self.host(last))) else {
            return false;
        };
        // Both are in one mapping, or their distance would be another one.
        let together = (end as usize).wrapping_sub(begin as usize) == (count as usize - 1) * PAGE_SIZE;
        together && pagemap.read_exact_at(entries, begin as u64 / PAGE_SIZE as u64 * 8).is_ok()
    }

    /// Whether the guest has this page.
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.host(gfn).is_some()
    }

    fn host(&self, gfn: Gfn) -> Option<*mut u8> {
        let m = self.mapped.iter().find(|m| gfn.0 >= m.base && gfn.0 - m.base < m.pages)?;
        // SAFETY: the page lies inside the mapping, checked by the line above.
        Some(unsafe { m.host.add((gfn.0 - m.base) as usize * PAGE_SIZE) })
    }

    /// Copies a page of the guest into `to`. Returns false when the guest has no such page.
    ///
    /// While vCPUs run, the copy may mix old and new bytes. Only base synchronisation may do that, because it
    /// sends every page again that is written after its rearm.
    pub fn read_page(&self, gfn: Gfn, to: &mut [u8; PAGE_SIZE]) -> bool {
        let Some(host) = self.host(gfn) else { return false };
        // SAFETY: `host` is a whole mapped page and `to` a whole page of ours.
        unsafe { copy_page(host, to.as_mut_ptr(), Stores::Cached) };
        true
    }

    /// Copies a page of the guest to `to`, which need not be initialised. Returns false when the guest has no
    /// such page. After streaming stores [`finish_copies`] must follow.
    ///
    /// # Safety
    /// `to` must be valid for writes of a page, and no one else may touch it.
    pub(crate) unsafe fn read_page_to(&self, gfn: Gfn, to: *mut u8, stores: Stores) -> bool {
        let Some(host) = self.host(gfn) else { return false };
        // SAFETY: `host` is a whole mapped page; the caller vouches for `to`.
        unsafe { copy_page(host, to, stores) };
        true
    }

    /// Overwrites a page of a VM that is not running (a standby, or a VM being restored). The write
    /// is not logged. Returns false when the guest has no such page.
    pub fn write_page(&self, gfn: Gfn, from: &[u8; PAGE_SIZE]) -> bool {
        let Some(host) = self.host(gfn) else { return false };
        // SAFETY: `host` is a whole mapped page. No vCPU runs, so only the standby's applier writes.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host, PAGE_SIZE) };
        true
    }

    /// Overwrites a part of a page of a VM that is not running, as [`write_page`](Self::write_page) does all of
    /// it. Returns false when the guest has no such page or the part is not within it.
    pub fn write_part(&self, gfn: Gfn, at: usize, from: &[u8]) -> bool {
        let Some(host) = self.host(gfn) else { return false };
        if at > PAGE_SIZE || from.len() > PAGE_SIZE - at {
            return false;
        }
        // SAFETY: `host` is a whole mapped page, and the part is within it. No vCPU runs, so only the standby's
        // applier writes.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host.add(at), from.len()) };
        true
    }

    /// Fills a page of a VM that is not running with zeros, without populating it if it is already
    /// zero. Returns false when the guest has no such page.
    pub fn zero_page(&self, gfn: Gfn) -> bool {
        let Some(host) = self.host(gfn) else { return false };
        // SAFETY: `host` is a whole mapped page that no one writes at this time.
        unsafe {
            if !is_zero_page(&*host.cast::<[u8; PAGE_SIZE]>()) {
                std::ptr::write_bytes(host, 0, PAGE_SIZE);
            }
        }
        true
    }
}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ram").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn a_part_is_within_its_page() {
        let ram = Ram::new(64 << 20, 64).unwrap();
        assert!(ram.write_page(Gfn(3), &[1; PAGE_SIZE]) && ram.write_page(Gfn(4), &[2; PAGE_SIZE]));
        assert!(ram.write_part(Gfn(3), PAGE_SIZE - 64, &[7; 64]) && ram.write_part(Gfn(3), 0, &[8; 3]));
        for (at, length) in [(PAGE_SIZE - 63, 64), (PAGE_SIZE + 1, 0), (usize::MAX, 64), (0, PAGE_SIZE + 1)] {
            assert!(!ram.write_part(Gfn(3), at, &vec![9; length]), "{at} {length}");
        }
        assert!(!ram.write_part(Gfn(1 << 30), 0, &[9]));
        let mut page = [0; PAGE_SIZE];
        assert!(ram.read_page(Gfn(3), &mut page));
        let expected = |at| {
            if at < 3 {
                8
            } else if at < PAGE_SIZE - 64 {
                1
            } else {
                7
            }
        };
        assert!(page.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        assert!(ram.read_page(Gfn(4), &mut page) && page == [2; PAGE_SIZE]);
    }

    #[test]
    fn memory_above_three_gib_is_split_by_the_hole() {
        assert_eq!(ranges(256 << 20).unwrap(), [Range { base: 0, len: 256 << 20 }]);
        assert_eq!(
            ranges(4 << 30).unwrap(),
            [Range { base: 0, len: HOLE_START }, Range { base: HOLE_END, len: 1 << 30 }]
        );
    }

    #[test]
    fn the_boot_image_is_behind_the_memory_and_beside_the_devices() {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        let place = |memory| firmware_range(&ranges(memory).unwrap(), 3 * MIB).unwrap();
        assert_eq!(place(256 * MIB), Range { base: 256 * MIB, len: 4 * MIB });
        assert_eq!(place(257 * MIB).base, 258 * MIB);
        assert_eq!(place(3 * GIB).base, HOLE_END);
        assert_eq!(place(3 * GIB - MIB).base, HOLE_END);
        assert_eq!(place(3 * GIB - 4 * MIB).base, 3 * GIB - 4 * MIB);
        assert_eq!(place(5 * GIB).base, 6 * GIB);
        assert_eq!(firmware_range(&ranges(GIB).unwrap(), 0), None);
        let ram = Ram::with_firmware(64 * MIB, 3 * MIB, 64).unwrap();
        assert_eq!((ram.bytes(), ram.pages()), (64 * MIB, 68 * 256));
        assert!(ram.contains(Gfn(67 * 256)) && !ram.contains(Gfn(68 * 256)));
        assert!(matches!(Ram::with_firmware(64 * MIB, u64::MAX, 64), Err(MemoryError::Firmware(_))));
    }

    #[test]
    fn only_touched_pages_are_listed_as_touched() {
        let ram = Ram::new(HOLE_START + (64 << 20), 64).unwrap();
        let written = [0, 5, 255, 70_000, HOLE_START / 4096 - 1, HOLE_END / 4096, HOLE_END / 4096 + 16_383];
        for gfn in written {
            assert!(ram.write_page(Gfn(gfn), &[1; PAGE_SIZE]));
        }
        let touched = ram.touched().unwrap();
        assert!(written.iter().all(|gfn| touched.contains(&Gfn(*gfn))));
        // Huge pages may bring neighbours along, but not everything.
        assert!(touched.len() <= written.len() * 512, "{}", touched.len());
        assert!(touched.is_sorted());
    }

    /// `VmFlags` of the mapping that `at` lies in; the kernel may have joined it with a neighbour of its
    /// kind.
    fn flags_of(at: u64) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let holds = |line: &str| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some((number(start)?..number(end)?).contains(&at))
        };
        let rest = smaps.lines().skip_while(|line| holds(line) != Some(true));
        let flags = rest.into_iter().find_map(|line| line.strip_prefix("VmFlags:")).expect("a mapping");
        flags.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn memory_of_the_guest_is_in_no_dump() {
        let ram = Ram::new(HOLE_START + (64 << 20), 64).unwrap();
        for slot in ram.slots() {
            // "do not dump" (Documentation/filesystems/proc.rst).
            assert!(flags_of(slot.host_addr).contains(&"dd".to_owned()), "{slot:?}");
        }
        let outgoing = crate::outgoing::Outgoing::new(300, 0).unwrap();
        assert!(flags_of(outgoing.page_bytes().as_ptr() as u64).contains(&"dd".to_owned()));
    }

    #[test]
    fn odd_sizes_are_refused() {
        for bytes in [0, 4096, MIN_MEMORY - 1, MIN_MEMORY + 4096, u64::MAX] {
            assert!(matches!(ranges(bytes), Err(MemoryError::Size(_))), "{bytes}");
        }
    }

    #[test]
    fn pages_on_both_sides_of_the_hole_are_reached() {
        let ram = Ram::new(HOLE_START + (64 << 20), 64).unwrap();
        let mut page = [0u8; PAGE_SIZE];
        for gpa in [0, HOLE_START - 4096, HOLE_END, HOLE_END + (64 << 20) - 4096] {
            let gfn = Gfn(gpa / 4096);
            assert!(ram.write_page(gfn, &[7; PAGE_SIZE]));
            assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(gpa + 4095)).unwrap(), 7);
            assert!(ram.read_page(gfn, &mut page));
            assert_eq!(page, [7; PAGE_SIZE]);
            assert!(ram.zero_page(gfn));
        }
        for gpa in [HOLE_START, HOLE_END - 4096, HOLE_END + (64 << 20)] {
            assert!(!ram.contains(Gfn(gpa / 4096)), "{gpa:x}");
        }
        assert!(!ram.contains(Gfn(u64::MAX)));
    }
}
