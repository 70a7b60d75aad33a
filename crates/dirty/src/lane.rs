//! The list of one vCPU, and the right to write it.

use std::io;

use crate::layout::Gfn;
use crate::sync::{AtomicBool, AtomicUsize, Ordering};
use crate::words::Words;

/// Pages that one vCPU dirtied, in the order of its first writes. Written by one thread at a time, without
/// locks.
pub(crate) struct Lane {
    pages: Words,
    capacity: usize,
    len: AtomicUsize,
    owned: AtomicBool,
    /// Traps of the vCPU since they were last taken.
    traps: AtomicUsize,
}

impl Lane {
    pub(crate) fn reserve(capacity: usize) -> io::Result<Lane> {
        let (len, owned) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Lane { pages: Words::reserve(capacity)?, capacity, len, owned, traps: AtomicUsize::new(0) })
    }

    /// Counts traps of the vCPU.
    #[cfg(not(all(test, loom)))]
    pub(crate) fn count_traps(&self, traps: usize) {
        self.traps.fetch_add(traps, Ordering::Relaxed);
    }

    /// Traps of the vCPU since the last call.
    #[cfg(not(all(test, loom)))]
    pub(crate) fn take_traps(&self) -> usize {
        self.traps.swap(0, Ordering::Relaxed)
    }

    /// Becomes the one writer, or returns None while another thread is: nobody ever waits here.
    pub(crate) fn own(&self) -> Option<Owner<'_>> {
        let owned = self.owned.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        owned.is_ok().then(|| Owner { lane: self })
    }

    /// Takes the memory of the list.
    pub(crate) fn populate(&self) {
        self.pages.populate(0..self.pages.len());
    }
}

/// The right to write a lane.
pub(crate) struct Owner<'a> {
    lane: &'a Lane,
}

impl Owner<'_> {
    pub(crate) fn is_full(&self) -> bool {
        self.lane.len.load(Ordering::Relaxed) >= self.lane.capacity
    }

    /// Appends a page. The caller has checked that the list is not full.
    pub(crate) fn push(&self, gfn: Gfn) {
        let len = self.lane.len.load(Ordering::Relaxed);
        self.lane.pages[len].store(gfn.0, Ordering::Relaxed);
        self.lane.len.store(len + 1, Ordering::Relaxed);
    }

    /// Takes the last page out.
    pub(crate) fn pop(&self) -> Option<Gfn> {
        let last = self.lane.len.load(Ordering::Relaxed).checked_sub(1)?;
        self.lane.len.store(last, Ordering::Relaxed);
        Some(Gfn(self.lane.pages[last].load(Ordering::Relaxed)))
    }

    /// Hands out the pages in order and empties the list.
    pub(crate) fn drain(&self, mut sink: impl FnMut(Gfn)) {
        let len = self.lane.len.load(Ordering::Relaxed);
        for page in &self.lane.pages[..len] {
            sink(Gfn(page.load(Ordering::Relaxed)));
        }
        self.lane.len.store(0, Ordering::Relaxed);
    }

    /// Forgets pages.
    #[cfg(not(all(test, loom)))]
    pub(crate) fn retain(&self, mut keep: impl FnMut(Gfn) -> bool) {
        let mut len = 0;
        for place in 0..self.lane.len.load(Ordering::Relaxed) {
            let page = self.lane.pages[place].load(Ordering::Relaxed);
            if keep(Gfn(page)) {
                self.lane.pages[len].store(page, Ordering::Relaxed);
                len += 1;
            }
        }
        self.lane.len.store(len, Ordering::Relaxed);
    }

    /// Empties the list and gives its memory back.
    pub(crate) fn clear_all(&self) {
        self.lane.len.store(0, Ordering::Relaxed);
        self.lane.pages.clear_all();
    }
}

impl Drop for Owner<'_> {
    fn drop(&mut self) {
        self.lane.owned.store(false, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn has_one_owner_and_keeps_order() {
        let lane = Lane::reserve(2).unwrap();
        let owner = lane.own().unwrap();
        assert!(lane.own().is_none());
        assert!(lane.own().is_none(), "a failed try must not set the list free");
        owner.push(Gfn(9));
        assert!(!owner.is_full());
        owner.push(Gfn(3));
        assert!(owner.is_full());
        drop(owner);
        let owner = lane.own().unwrap();
        let mut pages = Vec::new();
        owner.drain(|gfn| pages.push(gfn.0));
        assert_eq!(pages, [9, 3]);
        owner.drain(|gfn| panic!("{gfn} again"));
        owner.push(Gfn(5));
        assert_eq!((owner.pop(), owner.pop()), (Some(Gfn(5)), None));
    }
}
