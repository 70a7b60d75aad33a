//! The global list: pages dirtied by anyone but a vCPU.

use std::fmt;
use std::sync::Arc;

use crate::bits::Bits;
#[cfg(not(all(test, loom)))]
use crate::layout::MemorySlot;
use crate::layout::{Gfn, MemoryLayout, PAGE_SIZE};
use crate::sync::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::words::Words;

/// The bits of [`GlobalLog::state`].
const RECORDS: usize = 1;
const WATCHED: usize = 2;

/// Pages that were written outside any vCPU, by device models, `io_uring` and other kernel writes, and pages
/// that did not fit into the list of a vCPU.
///
/// Marking is lock-free, from any thread, and records only while a [`crate::Tracker`] is enabled; otherwise
/// it is one load. **Mark after the write**, not before it: then a mark that has returned is in the next
/// harvest together with the bytes it stands for, even if the harvest runs on another thread at the same
/// time.
///
/// # How it works
///
/// A bitmap holds the truth, one bit a page; the list holds hints where bits are set, so that a harvest need
/// not search. A harvest believes a hint only if its bit is still set. Every set bit has a hint, or the list
/// was full (`overflow`), or its marker is still at work (`in_flight`); in the two latter cases the harvest
/// searches the whole bitmap. So the list may lose and repeat hints at its limits, but never a page.
pub struct GlobalLog {
    /// What a mark must do; 0: nothing.
    state: AtomicUsize,
    /// Something was marked while the log was watched.
    written: AtomicBool,
    bits: Bits,
    /// Frame number + 1, or 0 for an empty place.
    hints: Words,
    capacity: usize,
    /// Places handed out since the last harvest; goes beyond the capacity.
    tail: AtomicUsize,
    in_flight: AtomicUsize,
    overflow: AtomicBool,
    /// A tracker harvests this log.
    taken: AtomicBool,
    beyond: AtomicU64,
    scans: AtomicU64,
}

impl GlobalLog {
    /// A log over frame numbers below `pages_of_gfn_space` ([`crate::MemoryLayout::gfn_space`]) that lists up
    /// to `capacity` pages an epoch. More pages cost time in the harvest but are not lost.
    ///
    /// # Panics
    /// If the address space for the bitmap (one bit a page) cannot be reserved.
    pub fn new(pages_of_gfn_space: u64, capacity: usize) -> Arc<GlobalLog> {
        Arc::new(Self::build(pages_of_gfn_space, capacity))
    }

    /// Like [`GlobalLog::new`], over guest physical ranges (address and length in bytes, as `vm-memory` takes
    /// them): for a log that is made before the memory whose writes it will record.
    ///
    /// # Panics
    /// As [`GlobalLog::new`].
    pub fn for_ranges(ranges: &[(u64, u64)], capacity: usize) -> Arc<GlobalLog> {
        let end = |&(gpa, bytes): &(u64, u64)| gpa.saturating_add(bytes).div_ceil(PAGE_SIZE);
        Self::new(ranges.iter().map(end).max().unwrap_or(0), capacity)
    }

    pub(crate) fn build(pages: u64, capacity: usize) -> GlobalLog {
        GlobalLog {
            state: AtomicUsize::new(0),
            written: AtomicBool::new(false),
            bits: Bits::reserve(pages).expect("address space for the bitmap of the global dirty list"),
            hints: Words::reserve(capacity).expect("address space for the global dirty list"),
            capacity,
            tail: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            overflow: AtomicBool::new(false),
            taken: AtomicBool::new(false),
            beyond: AtomicU64::new(0),
            scans: AtomicU64::new(0),
        }
    }

    /// Records that a page has been written.
    pub fn mark(&self, gfn: Gfn) {
        if self.must_note() {
            self.record(gfn);
        }
    }

    /// Records that `len` bytes from guest physical address `gpa` have been written: the one function for
    /// writes through raw pointers and by the kernel (`io_uring`, `readv`). Call it after they are complete.
    pub fn mark_range(&self, gpa: u64, len: u64) {
        if len == 0 || !self.must_note() {
            return;
        }
        let last = gpa.saturating_add(len - 1) / PAGE_SIZE;
        let end = self.bits.pages();
        for gfn in gpa / PAGE_SIZE..=last.min(end.saturating_sub(1)) {
            self.record(Gfn(gfn));
        }
        if last >= end {
            self.beyond.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether a mark must be recorded. Notes for [`watch`](Self::watch) that there was one.
    fn must_note(&self) -> bool {
        let state = self.state.load(Ordering::Acquire);
        if state & WATCHED != 0 {
            self.written.store(true, Ordering::Release);
        }
        state & RECORDS != 0
    }

    /// From now on [`is_unwritten`](Self::is_unwritten) says whether anything at all was marked, whether or not a
    /// tracker is enabled: for a VM that stands still, and whose memory must be proven to be the same later.
    pub fn watch(&self) {
        self.written.store(false, Ordering::Release);
        self.state.fetch_or(WATCHED, Ordering::AcqRel);
    }

    /// Ends [`watch`](Self::watch).
    pub fn unwatch(&self) {
        self.state.fetch_and(!WATCHED, Ordering::AcqRel);
    }

    /// Whether the log is watched, and nothing was marked since. A writer that has not returned may still come: ask
    /// when none is left.
    pub fn is_unwritten(&self) -> bool {
        self.state.load(Ordering::Acquire) & WATCHED != 0 && !self.written.load(Ordering::Acquire)
    }

    /// Whether the page is marked and not yet harvested.
    pub fn is_marked(&self, gfn: Gfn) -> bool {
        self.bits.peek(gfn)
    }

    /// Whether marks are recorded, that is, a tracker is enabled.
    pub fn is_enabled(&self) -> bool {
        self.state.load(Ordering::Acquire) & RECORDS != 0
    }

    /// Frame numbers that the log covers.
    pub fn gfn_space(&self) -> u64 {
        self.bits.pages()
    }

    /// Marks beyond the frame numbers of the log. They are ignored; a VMM that makes any has a bug.
    pub fn ignored(&self) -> u64 {
        self.beyond.load(Ordering::Relaxed)
    }

    /// Pages marked since the last harvest.
    pub(crate) fn pending(&self) -> usize {
        self.tail.load(Ordering::Relaxed)
    }

    /// Harvests that had to search the bitmap.
    pub(crate) fn scans(&self) -> u64 {
        self.scans.load(Ordering::Relaxed)
    }

    /// Records a page whether or not the log is enabled.
    pub(crate) fn record(&self, gfn: Gfn) {
        if gfn.0 >= self.bits.pages() {
            self.beyond.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.bits.is_claimed(gfn) {
            return;
        }
        // Announced before the bit is set: a thread that finds the bit set and returns leaves the harvest a
        // hint, namely this one.
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        if self.bits.claim(gfn) {
            let place = self.tail.fetch_add(1, Ordering::AcqRel);
            // A hint in our place belongs to a marker that a harvest overtook, or we are that marker.
            let lost_hint =
                place >= self.capacity || self.hints[place].swap(gfn.0 + 1, Ordering::AcqRel) != 0;
            if lost_hint {
                self.overflow.store(true, Ordering::Release);
            }
        }
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    /// Takes every page whose mark had returned when this began, each once. One thread at a time.
    pub(crate) fn drain(&self, mut sink: impl FnMut(Gfn)) {
        self.drain_while(|gfn| {
            sink(gfn);
            true
        });
    }

    /// The same, until the sink says that a page was the last: the rest stays marked, and counts.
    pub(crate) fn drain_while(&self, mut sink: impl FnMut(Gfn) -> bool) {
        // A marker under way may have set a bit that made another one return, and have no hint yet.
        let mut search = self.in_flight.load(Ordering::Acquire) != 0;
        let handed_out = self.tail.swap(0, Ordering::AcqRel);
        let mut left = handed_out;
        for hint in &self.hints[..handed_out.min(self.capacity)] {
            let page = hint.swap(0, Ordering::AcqRel).checked_sub(1).map(Gfn);
            left -= usize::from(page.is_some());
            match page {
                Some(gfn) if self.bits.release(gfn) => {
                    if !sink(gfn) {
                        // The next harvest searches: empty places, and places full of these hints, tell it
                        // nothing.
                        self.overflow.store(true, Ordering::Release);
                        self.tail.fetch_add(left, Ordering::AcqRel);
                        return;
                    }
                }
                Some(_) => (),
                // Its marker has set the bit but not written the hint yet, which would come where no harvest
                // reads any more.
                None => search = true,
            }
        }
        // Asked again: a marker that came meanwhile may have put its hint over one that was not read yet.
        // Either it is seen in flight here, or its overflow flag is seen below.
        search |= self.in_flight.load(Ordering::Acquire) != 0;
        search |= self.overflow.swap(false, Ordering::AcqRel) || handed_out > self.capacity;
        if search {
            self.scans.fetch_add(1, Ordering::Relaxed);
            let left = self.bits.release_while(sink);
            if left > 0 {
                self.overflow.store(true, Ordering::Release);
                self.tail.fetch_add(left, Ordering::AcqRel);
            }
        }
    }

    /// Becomes the log of a tracker; false if it is that of another one.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn give_back(&self) {
        self.taken.store(false, Ordering::Release);
    }

    /// Takes memory and begins to record, with nothing marked.
    pub(crate) fn enable(&self, layout: &MemoryLayout) {
        self.drain(|_| ());
        self.bits.clear_all();
        layout.slots().iter().for_each(|slot| self.bits.populate(slot));
        self.hints.populate(0..self.capacity);
        self.state.fetch_or(RECORDS, Ordering::AcqRel);
    }

    /// Takes the memory for a slot that comes later.
    #[cfg(not(all(test, loom)))]
    pub(crate) fn populate(&self, slot: &MemorySlot) {
        self.bits.populate(slot);
    }

    /// Forgets the marks of a slot. Its hints stay, and are not believed.
    #[cfg(not(all(test, loom)))]
    pub(crate) fn forget(&self, slot: &MemorySlot) {
        self.bits.release_slot(slot);
    }

    /// Stops recording, forgets all marks and gives the memory back.
    pub(crate) fn disable(&self) {
        self.state.fetch_and(!RECORDS, Ordering::AcqRel);
        self.drain(|_| ());
        self.hints.clear_all();
        self.bits.clear_all();
    }
}

impl fmt::Debug for GlobalLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GlobalLog")
            .field("gfn_space", &self.bits.pages())
            .field("capacity", &self.capacity)
            .field("enabled", &self.is_enabled())
            .field("pending", &self.pending())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn layout() -> MemoryLayout {
        MemoryLayout::new(vec![crate::MemorySlot { id: 0, base: Gfn(0), pages: 64, host_addr: 0 }]).unwrap()
    }

    fn drained(log: &GlobalLog) -> Vec<u64> {
        let mut pages = Vec::new();
        log.drain(|gfn| pages.push(gfn.0));
        pages
    }

    #[test]
    fn a_watched_log_knows_of_each_mark_whether_it_records_or_not() {
        let log = GlobalLog::new(64, 8);
        assert!(!log.is_unwritten(), "nobody watches");
        log.watch();
        assert!(log.is_unwritten());
        log.mark(Gfn(3));
        assert!(!log.is_unwritten() && drained(&log).is_empty());
        log.watch();
        assert!(log.is_unwritten());
        log.mark_range(4096, 0);
        assert!(log.is_unwritten(), "nothing was written");
        log.mark_range(4096, 1);
        assert!(!log.is_unwritten());
        log.enable(&layout());
        log.watch();
        log.disable();
        assert!(log.is_unwritten(), "it outlives the tracker");
        log.enable(&layout());
        log.mark(Gfn(5));
        assert!(!log.is_unwritten() && drained(&log) == [5]);
        log.unwatch();
        log.watch();
        assert!(log.is_unwritten());
        log.unwatch();
        assert!(!log.is_unwritten());
    }

    #[test]
    fn records_only_while_enabled_and_each_page_once() {
        let log = GlobalLog::new(100, 8);
        log.mark(Gfn(5));
        log.mark_range(0, 4096);
        assert!(drained(&log).is_empty());
        log.enable(&layout());
        log.mark_range(0xfff, 2);
        log.mark(Gfn(1));
        log.mark_range(0x5000, 0);
        assert_eq!(log.pending(), 2);
        assert!(log.is_marked(Gfn(0)) && !log.is_marked(Gfn(5)));
        assert_eq!(drained(&log), [0, 1]);
        assert!(drained(&log).is_empty());
        log.mark(Gfn(1));
        assert_eq!(drained(&log), [1]);
        log.mark(Gfn(1));
        log.disable();
        log.enable(&layout());
        assert!(drained(&log).is_empty());
        assert_eq!(log.scans(), 0);
    }

    #[test]
    fn beyond_its_pages_it_counts_and_ignores() {
        let log = GlobalLog::new(100, 8);
        log.enable(&layout());
        log.mark(Gfn(100));
        log.mark_range(99 * 4096, u64::MAX);
        log.mark_range(u64::MAX - 10, 100);
        assert_eq!(drained(&log), [99]);
        assert_eq!(log.ignored(), 3);
    }

    #[test]
    fn a_full_list_loses_no_page() {
        let log = GlobalLog::new(1000, 2);
        log.enable(&layout());
        for round in 1..4 {
            (0..100).rev().for_each(|gfn| log.mark(Gfn(gfn * 10)));
            assert_eq!(log.pending(), 100);
            let mut pages = drained(&log);
            pages.sort_unstable();
            assert_eq!(pages, (0..100).map(|gfn| gfn * 10).collect::<Vec<_>>());
            assert_eq!(log.scans(), round);
        }
        log.mark(Gfn(3));
        assert_eq!(drained(&log), [3]);
        assert_eq!(log.scans(), 3);
    }

    #[test]
    fn covers_ranges_to_their_last_byte() {
        let log = GlobalLog::for_ranges(&[(0, 0x10_0000), (0x1_0000_0000, 0x2001)], 8);
        assert_eq!(log.gfn_space(), 0x10_0003);
        assert_eq!(GlobalLog::for_ranges(&[], 8).gfn_space(), 0);
    }

    #[test]
    fn what_is_not_wanted_yet_stays_marked_and_counts() {
        for capacity in [0, 5, 300] {
            let log = GlobalLog::new(1000, capacity);
            log.enable(&layout());
            (0..200).rev().for_each(|gfn| log.mark(Gfn(gfn * 5)));
            let mut pages = Vec::new();
            for round in 1..=20 {
                let mut room = 10;
                log.drain_while(|gfn| {
                    pages.push(gfn.0);
                    room -= 1;
                    room > 0
                });
                assert_eq!((pages.len(), log.pending()), (round * 10, 200 - round * 10), "{capacity}");
            }
            pages.sort_unstable();
            assert_eq!(pages, (0..200).map(|gfn| gfn * 5).collect::<Vec<_>>());
            assert!(drained(&log).is_empty());
        }
    }

    #[test]
    fn no_capacity_at_all_is_a_bitmap() {
        let log = GlobalLog::new(64, 0);
        log.enable(&layout());
        log.mark(Gfn(63));
        assert_eq!(drained(&log), [63]);
        assert!(drained(&log).is_empty());
    }
}
