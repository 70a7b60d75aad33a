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
    /// Maps the ring of a vCPU. `entries` is the number that the ring was enabled with: KVM maps less without
    /// complaint.
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
        // SAFETY: the index is below `entries`, all of which are mapped until `self` is dropped; both sides
        // use them as atomics only (KVM with smp_wmb, acquire and release).
        unsafe { self.base.add(index).as_ref() }
    }
}

impl Mapping {
    /// Whether there is a ring behind the mapping. KVM maps this offset of any vCPU; if its VM has no ring,
    /// or a smaller one, touching it gives SIGBUS, but a read by the kernel gives EFAULT instead.
    pub(crate) fn is_backed(&self) -> bool {
        let mut last = [0u8; size_of::<Entry>()];
        let local = libc::iovec { iov_base: last.as_mut_ptr().cast(), iov_len: last.len() };
        let place = std::ptr::from_ref(self.entry(u64::from(self.entries) - 1)).cast_mut();
        let remote = libc::iovec { iov_base: place.cast(), iov_len: last.len() };
        // SAFETY: `last` is writable and as long as it says; the other address is only looked at by the
        // kernel, which reports what it cannot read.
        let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        // Forbidden (by a seccomp filter): this cannot be found out.
        read >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT)
    }

    /// Whether nobody has read KVM's entries: its first entry is still as KVM made it.
    pub(crate) fn is_unread(&self) -> bool {
        self.entry(0).flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK == DIRTY
    }

    /// Whether both are mappings of one ring: a mark in the last entry of this one appears in the other. Nobody
    /// has read this ring, so KVM, which stops the vCPU earlier, has not written that entry.
    pub(crate) fn is_same(&self, other: &Mapping) -> bool {
        // No page has this offset.
        const MARK: u64 = u64::MAX;
        let here = &self.entry(u64::from(self.entries) - 1).offset;
        let there = &other.entry(u64::from(other.entries) - 1).offset;
        let before = here.swap(MARK, Ordering::SeqCst);
        let is_same = there.load(Ordering::SeqCst) == MARK;
        here.store(before, Ordering::SeqCst);
        is_same
    }

    /// Whether KVM has written entries: the first ones are not as KVM makes them. (The very first page of
    /// slot 0 alone leaves no trace.)
    pub(crate) fn is_used(&self) -> bool {
        (0..4.min(self.entries.into())).any(|position| {
            let entry = self.entry(position);
            let (flags, slot) = (entry.flags.load(Ordering::Acquire), entry.slot.load(Ordering::Relaxed));
            flags != 0 || slot != 0 || entry.offset.load(Ordering::Relaxed) != 0
        })
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

/// The ring has wrapped: KVM has overwritten entries that nobody had read.
#[derive(Debug)]
pub(crate) struct Overrun;

/// Entries that KVM keeps free behind the soft limit, at which it stops the vCPU (virt/kvm/dirty_ring.c,
/// kvm_dirty_ring_get_rsvd_entries; KVM_DIRTY_RING_RSVD_ENTRIES).
pub(crate) const RESERVED: u64 = 64;
/// This many more with page modification logging of Intel processors (kvm_cpu_dirty_log_size).
pub(crate) const RESERVED_FOR_PML: u64 = 512;

/// A slot that no VM has (KVM_USER_MEM_SLOTS is 32764): the reset of such an entry frees it and arms no page.
/// Never a wild offset instead: before 6.1.175, 6.12.91 and May 2026 one near 2^64 passed KVM's check
/// (CVE-2026-52969).
const NO_SLOT: u32 = 0xffff;

/// How many entries a hint is ahead: this many cache misses are under way at once.
const AHEAD: u64 = 12;

/// The truth of KVM's report that a ring is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fullness {
    /// It is full.
    Full,
    /// It is not full, but may have been a moment ago.
    NotNow,
    /// It was not full when KVM said so before, and nothing has changed.
    Never,
}

/// A ring and how far it has been read. Positions count from the start of the VM and never wrap.
///
/// Entries between `freed` and `taken` are *held*: read, and not given back. Each is a credit, because KVM
/// takes slot and offset from the entry when it resets it: the thread that gives it back may write any page
/// into it, and KVM arms that page.
pub(crate) struct Ring {
    entries: std::sync::Arc<Mapping>,
    /// Entries that KVM leaves free behind its soft limit.
    reserved: u64,
    /// First position not handed back to KVM by a reset.
    freed: AtomicU64,
    /// First position not marked for a reset. Equal to `freed` except between marking and reset.
    marked: AtomicU64,
    /// First position not taken.
    taken: AtomicU64,
    /// First position not seen by `pending`.
    peeked: AtomicU64,
    /// `taken` at the beginning of the epoch.
    began: AtomicU64,
    /// 1 + `freed` when KVM last called the ring full and it was not.
    not_full_at: AtomicU64,
}

impl Ring {
    pub(crate) fn new(entries: std::sync::Arc<Mapping>, reserved: u64) -> Ring {
        let at_start = || AtomicU64::new(0);
        Ring {
            entries,
            reserved,
            freed: at_start(),
            marked: at_start(),
            taken: at_start(),
            peeked: at_start(),
            began: at_start(),
            not_full_at: at_start(),
        }
    }

    fn is_dirty(&self, position: u64) -> bool {
        self.entries.entry(position).flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK == DIRTY
    }

    /// Where the ring is full: KVM cannot have come this far. It grows when entries are marked, before KVM
    /// frees them, so a thread that has read KVM's entry in a freed place finds it grown.
    fn limit(&self) -> u64 {
        self.marked.load(Ordering::Acquire) + u64::from(self.entries.entries)
    }

    /// Unread entries at which KVM stops the vCPU, if none are held.
    pub(crate) fn soft_limit(&self) -> u64 {
        u64::from(self.entries.entries).saturating_sub(self.reserved)
    }

    /// Hands out (slot, offset) of every new entry, in order, until the sink refuses one: that entry stays.
    /// One thread at a time.
    ///
    /// An overrun shows as a ring without any entry that is free or marked for reset: KVM stops the vCPU at
    /// the soft limit, at least 64 entries earlier, so a full ring is no accident. The pages are handed out
    /// even so.
    ///
    /// The hint gets the contents of an entry some places ahead: a future entry, or anything else.
    pub(crate) fn take(
        &self,
        hint: impl Fn(u32, u64),
        mut sink: impl FnMut(u32, u64) -> bool,
    ) -> Result<usize, Overrun> {
        let (start, mut limit) = (self.taken.load(Ordering::Relaxed), self.limit());
        let mut position = start;
        loop {
            if position == limit {
                limit = self.limit();
            }
            if position == limit || !self.is_dirty(position) {
                break;
            }
            let entry = self.entries.entry(position);
            let ahead = self.entries.entry(position + AHEAD);
            hint(ahead.slot.load(Ordering::Relaxed), ahead.offset.load(Ordering::Relaxed));
            if !sink(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed)) {
                break;
            }
            position += 1;
        }
        // Release: the thread that gives entries back, perhaps another one, sees them read.
        self.taken.store(position, Ordering::Release);
        if position == limit { Err(Overrun) } else { Ok((position - start) as usize) }
    }

    /// Entries since the epoch began, taken or not. Any thread, any time; reads each entry once.
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

    /// Judges KVM's report that the ring is full. The soft limit is not known exactly everywhere, so this is
    /// generous: it only has to recognise a ring that KVM calls full although it is empty. That may happen
    /// once: another thread has given entries back since KVM said so.
    pub(crate) fn fullness(&self) -> Fullness {
        let freed = self.freed.load(Ordering::Acquire);
        let limit = self.limit();
        let mut end = self.taken.load(Ordering::Acquire).max(self.peeked.load(Ordering::Relaxed));
        while end < limit && self.is_dirty(end) {
            end += 1;
        }
        let used = end.saturating_sub(freed);
        if used > 0 && used + RESERVED + RESERVED_FOR_PML >= self.entries.entries.into() {
            Fullness::Full
        } else if self.not_full_at.swap(freed + 1, Ordering::Relaxed) == freed + 1 {
            Fullness::Never
        } else {
            Fullness::NotNow
        }
    }

    /// Whether both read one ring of KVM. Nobody has read this one.
    pub(crate) fn is_same(&self, other: &Ring) -> bool {
        self.entries.is_same(&other.entries)
    }

    /// Whether KVM lets the vCPU write another entry.
    pub(crate) fn has_room(&self) -> bool {
        let freed = self.freed.load(Ordering::Acquire);
        let limit = self.limit();
        let mut end = self.taken.load(Ordering::Acquire).max(self.peeked.load(Ordering::Relaxed));
        while end < limit && self.is_dirty(end) {
            end += 1;
        }
        end.saturating_sub(freed) < self.soft_limit()
    }

    /// Whether KVM has written entries that were not taken.
    pub(crate) fn has_new(&self) -> bool {
        self.is_dirty(self.taken.load(Ordering::Acquire))
    }

    /// Entries taken and not given back.
    pub(crate) fn held(&self) -> u64 {
        // In this order: what is marked later was taken later.
        let marked = self.marked.load(Ordering::Acquire);
        self.taken.load(Ordering::Acquire) - marked
    }

    /// Marks the `count` oldest held entries for the next reset, each rewritten to the given (slot, offset),
    /// or to no page. One thread at a time; call [`Ring::all_freed`] after the reset.
    ///
    /// In order, because KVM's reset stops at the first entry that is not marked.
    pub(crate) fn give_back(&self, count: u64, mut page: impl FnMut() -> Option<(u32, u64)>) {
        let start = self.marked.load(Ordering::Relaxed);
        let end = start + count;
        // An entry that KVM has not written must never be marked: KVM's reset index would overtake the other
        // one, and it would call the ring full forever.
        assert!(end <= self.taken.load(Ordering::Acquire), "an entry is given back that was not taken");
        for position in start..end {
            let entry = self.entries.entry(position);
            let (slot, offset) = page().unwrap_or((NO_SLOT, 0));
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(offset, Ordering::Relaxed);
            // KVM reads the flags with acquire and then the page.
            entry.flags.store(RESET, Ordering::Release);
        }
        // Before the reset: see `limit`.
        self.marked.store(end, Ordering::Release);
    }

    /// KVM has freed every entry that was marked.
    pub(crate) fn all_freed(&self) {
        self.freed.store(self.marked.load(Ordering::Relaxed), Ordering::Release);
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
        ring.take(
            |_, _| (),
            |_, offset| {
                offsets.push(offset);
                true
            },
        )
        .unwrap();
        offsets
    }

    fn flags(mapping: &Mapping, position: u64) -> u32 {
        mapping.entry(position).flags.load(Ordering::Relaxed)
    }

    #[test]
    fn a_ring_knows_its_other_mapping() {
        let [one, two] = [0; 2].map(|_| Arc::new(Mapping::anonymous(256).unwrap()));
        let [first, again, other] = [&one, &one, &two].map(|of| Ring::new(of.clone(), 64));
        assert!(first.is_same(&again) && !first.is_same(&other) && !other.is_same(&first));
        assert!(!one.is_used() && one.entry(255).offset.load(Ordering::Relaxed) == 0, "the mark is gone");
    }

    #[test]
    fn takes_in_order_and_stops_at_a_gap() {
        let mapping = Arc::new(Mapping::anonymous(256).unwrap());
        let ring = Ring::new(mapping.clone(), 64);
        assert_eq!([ring.fullness(), ring.fullness()], [Fullness::NotNow, Fullness::Never]);
        push(&mapping, 0, 0, 5);
        push(&mapping, 1, 0, 6);
        push(&mapping, 3, 0, 8);
        assert_eq!(ring.pending(), 2);
        assert_eq!(taken(&ring), [5, 6]);
        push(&mapping, 2, 0, 7);
        assert_eq!((ring.pending(), ring.held()), (4, 2));
        assert_eq!(ring.take(|_, _| (), |_, _| false).unwrap(), 0, "the sink has no room");
        assert_eq!(taken(&ring), [7, 8]);
        ring.begin();
        assert_eq!(ring.pending(), 0);
    }

    #[test]
    fn gives_the_oldest_back_with_other_pages_in_them() {
        let mapping = Arc::new(Mapping::anonymous(256).unwrap());
        let ring = Ring::new(mapping.clone(), 64);
        (0..3).for_each(|position| push(&mapping, position, 1, 10 + position));
        assert_eq!(taken(&ring).len(), 3);
        let mut pages = [Some((4, 99)), None].into_iter();
        ring.give_back(2, || pages.next().unwrap());
        let entry = |position| {
            let entry = mapping.entry(position);
            (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed))
        };
        assert_eq!([entry(0), entry(1), entry(2)], [(4, 99), (NO_SLOT, 0), (1, 12)]);
        assert_eq!([0, 1, 2, 3].map(|position| flags(&mapping, position)), [RESET, RESET, DIRTY, 0]);
        assert_eq!(ring.held(), 1);
        ring.all_freed();
        assert_eq!(ring.limit(), 2 + 256);
    }

    #[test]
    #[should_panic = "not taken"]
    fn never_gives_back_what_it_has_not_seen() {
        let ring = Ring::new(Arc::new(Mapping::anonymous(256).unwrap()), 64);
        ring.give_back(1, || None);
    }

    /// Another thread gives entries back, KVM frees and fills them, all within one `take`.
    #[test]
    fn a_ring_that_is_freed_meanwhile_is_not_overrun() {
        let mapping = Arc::new(Mapping::anonymous(256).unwrap());
        let ring = Ring::new(mapping.clone(), 64);
        (0..100).for_each(|position| push(&mapping, position, 0, position));
        assert_eq!(taken(&ring).len(), 100);
        (100..192).for_each(|position| push(&mapping, position, 0, position));
        let mut first = true;
        let took = ring.take(
            |_, _| (),
            |_, _| {
                if std::mem::take(&mut first) {
                    ring.give_back(100, || None);
                    (0..100).for_each(|position| mapping.entry(position).flags.store(0, Ordering::Release));
                    (192..292).for_each(|position| push(&mapping, position, 0, position));
                }
                true
            },
        );
        assert_eq!(took.unwrap(), 192);
    }

    #[test]
    fn a_full_ring_is_an_overrun() {
        let mapping = Arc::new(Mapping::anonymous(256).unwrap());
        let ring = Ring::new(mapping.clone(), 64);
        (0..255).for_each(|position| push(&mapping, position, 0, position));
        assert_eq!(taken(&ring).len(), 255);
        push(&mapping, 255, 0, 255);
        assert_eq!(ring.pending(), 256);
        assert!(ring.take(|_, _| (), |_, _| true).is_err());
    }
}
