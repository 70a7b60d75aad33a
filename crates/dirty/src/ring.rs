//! The dirty ring that KVM keeps for a vCPU (Documentation/virt/kvm/api.rst, 8.29).
// UNSAFETY: the ring is memory shared with the kernel, mapped and viewed here as atomics.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};

use crate::layout::PAGE_SIZE;

/// KVM_DIRTY_GFN_F_DIRTY: KVM has filled the entry.
pub(crate) const DIRTY: u32 = 1;
/// KVM_DIRTY_GFN_F_RESET: user space is done with it and KVM may free it and trap its page again.
pub(crate) const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`, as memory that two sides write.
#[repr(C)]
pub(crate) struct Entry {
    pub(crate) flags: AtomicU32,
    pub(crate) slot: AtomicU32,
    pub(crate) offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());

/// The mapped entries of a ring.
pub(crate) struct Mapping {
    base: NonNull<Entry>,
    entries: u32,
}

impl Mapping {
    /// Maps the ring of a vCPU. `entries` is what the ring was enabled with: KVM maps less without complaint.
    pub(crate) fn of_vcpu(vcpu: BorrowedFd<'_>, entries: u32) -> io::Result<Mapping> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        Self::map(libc::MAP_SHARED, vcpu.as_raw_fd(), offset as libc::off_t, entries)
    }

    /// A ring without a kernel.
    #[cfg(test)]
    pub(crate) fn anonymous(entries: u32) -> io::Result<Mapping> {
        Self::map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0, entries)
    }

    fn map(flags: i32, fd: i32, offset: libc::off_t, entries: u32) -> io::Result<Mapping> {
        assert!(entries.is_power_of_two(), "a ring has a power of two of entries");
        let (bytes, prot) = (entries as usize * size_of::<Entry>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { base: NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?, entries })
    }

    pub(crate) fn entry(&self, position: u64) -> &Entry {
        let index = position as usize & (self.entries as usize - 1);
        // SAFETY: the index is below `entries`, all of which are mapped until `self` is dropped; both sides use
        // them as atomics only (KVM with smp_wmb, acquire and release).
        unsafe { self.base.add(index).as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.entries as usize * size_of::<Entry>()) };
    }
}

// SAFETY: the memory is reached as atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// The ring has come round: KVM has written over entries nobody had read.
#[derive(Debug)]
pub(crate) struct Overrun;

/// A ring and how far it has been read. Positions count from the start of the VM and never wrap.
pub(crate) struct Ring {
    entries: std::sync::Arc<Mapping>,
    /// First position not handed back to KVM by a reset.
    freed: AtomicU64,
    /// First position not taken.
    taken: AtomicU64,
    /// First position not seen by `pending`.
    peeked: AtomicU64,
    /// `taken` at the beginning of the epoch.
    began: AtomicU64,
}

impl Ring {
    pub(crate) fn new(entries: std::sync::Arc<Mapping>) -> Ring {
        let at_start = || AtomicU64::new(0);
        Ring { entries, freed: at_start(), taken: at_start(), peeked: at_start(), began: at_start() }
    }

    fn is_dirty(&self, position: u64) -> bool {
        self.entries.entry(position).flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK == DIRTY
    }

    /// Where the ring is full: KVM must not have come this far.
    fn limit(&self) -> u64 {
        self.freed.load(Ordering::Acquire) + u64::from(self.entries.entries)
    }

    /// Hands out (slot, offset) of every new entry, in order, and marks it for reset. One thread at a time.
    ///
    /// An overrun shows as a ring without any entry that is free or marked for reset: KVM stops the vCPU at the
    /// soft limit, at least 64 entries earlier, so a full ring is no accident. The pages are handed out even so.
    pub(crate) fn take(&self, mut sink: impl FnMut(u32, u64)) -> Result<usize, Overrun> {
        let (start, limit) = (self.taken.load(Ordering::Relaxed), self.limit());
        let mut position = start;
        while position < limit && self.is_dirty(position) {
            let entry = self.entries.entry(position);
            sink(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            entry.flags.store(RESET, Ordering::Release);
            position += 1;
        }
        self.taken.store(position, Ordering::Release);
        if position == limit { Err(Overrun) } else { Ok((position - start) as usize) }
    }

    /// Entries since the epoch began, taken or not. Any thread, any time; looks at each entry once.
    pub(crate) fn pending(&self) -> usize {
        let limit = self.limit();
        let seen = self.peeked.load(Ordering::Relaxed).max(self.taken.load(Ordering::Acquire));
        let mut position = seen;
        while position < limit && self.is_dirty(position) {
            position += 1;
        }
        if position != seen {
            self.peeked.fetch_max(position, Ordering::Relaxed);
        }
        position.saturating_sub(self.began.load(Ordering::Relaxed)) as usize
    }

    /// Whether the ring holds nothing at all, so that KVM has no reason to call it full.
    pub(crate) fn is_empty(&self) -> bool {
        let taken = self.taken.load(Ordering::Acquire);
        taken == self.freed.load(Ordering::Acquire) && !self.is_dirty(taken)
    }

    /// Entries taken and not freed.
    pub(crate) fn unfreed(&self) -> u64 {
        self.taken.load(Ordering::Acquire) - self.freed.load(Ordering::Acquire)
    }

    /// KVM has freed every entry that was taken.
    pub(crate) fn all_freed(&self) {
        self.freed.store(self.taken.load(Ordering::Acquire), Ordering::Release);
    }

    /// A new epoch begins.
    pub(crate) fn begin(&self) {
        self.began.store(self.taken.load(Ordering::Acquire), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn push(mapping: &Mapping, position: u64, slot: u32, offset: u64) {
        let entry = mapping.entry(position);
        entry.slot.store(slot, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        entry.flags.store(DIRTY, Ordering::Release);
    }

    fn taken(ring: &Ring) -> Vec<u64> {
        let mut offsets = Vec::new();
        ring.take(|_, offset| offsets.push(offset)).unwrap();
        offsets
    }

    #[test]
    fn takes_in_order_stops_at_a_gap_and_marks_for_reset() {
        let mapping = Arc::new(Mapping::anonymous(256).unwrap());
        let ring = Ring::new(mapping.clone());
        assert!(ring.is_empty());
        push(&mapping, 0, 0, 5);
        push(&mapping, 1, 0, 6);
        push(&mapping, 3, 0, 8);
        assert!(!ring.is_empty());
        assert_eq!(ring.pending(), 2);
        assert_eq!(taken(&ring), [5, 6]);
        assert_eq!(mapping.entry(1).flags.load(Ordering::Relaxed), RESET);
        assert_eq!(
            mapping.entry(3).flags.load(Ordering::Relaxed),
            DIRTY,
            "an unseen entry is never given back"
        );
        push(&mapping, 2, 0, 7);
        assert_eq!((ring.pending(), ring.unfreed()), (4, 2));
        assert_eq!(taken(&ring), [7, 8]);
        assert!(!ring.is_empty(), "taken is not free");
        ring.all_freed();
        ring.begin();
        assert_eq!(ring.pending(), 0);
    }

    #[test]
    fn a_full_ring_is_an_overrun() {
        let mapping = Arc::new(Mapping::anonymous(256).unwrap());
        let ring = Ring::new(mapping.clone());
        (0..255).for_each(|position| push(&mapping, position, 0, position));
        assert_eq!(taken(&ring).len(), 255);
        push(&mapping, 255, 0, 255);
        assert_eq!(ring.pending(), 256);
        assert!(ring.take(|_, _| ()).is_err());
    }
}
