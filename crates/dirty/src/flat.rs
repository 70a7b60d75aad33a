//! The one contiguous list of the pages of an epoch.
// UNSAFETY: turns the words of the list into a slice of frame numbers, under the rule below.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::layout::Gfn;
use crate::words::Words;

/// The pages of the epoch, each once. There is room for every page of the VM, reserved as address space;
/// memory is taken in advance for the number the caller expects.
///
/// Rule: only the thread that holds the open epoch appends and clears, and never while a slice is lent.
pub(crate) struct Flat {
    pages: Words,
    len: AtomicUsize,
}

impl Flat {
    pub(crate) fn reserve(pages_of_vm: u64) -> io::Result<Flat> {
        Ok(Flat { pages: Words::reserve(pages_of_vm as usize)?, len: AtomicUsize::new(0) })
    }

    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Appends a page that is not in the list.
    pub(crate) fn push(&self, gfn: Gfn) {
        let len = self.len.load(Ordering::Relaxed);
        self.pages[len].store(gfn.0, Ordering::Relaxed);
        self.len.store(len + 1, Ordering::Release);
    }

    /// Appends pages that are not in the list.
    pub(crate) fn extend(&self, pages: &[AtomicU64]) {
        let len = self.len.load(Ordering::Relaxed);
        for (place, page) in self.pages[len..len + pages.len()].iter().zip(pages) {
            place.store(page.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.len.store(len + pages.len(), Ordering::Release);
    }

    pub(crate) fn clear(&self) {
        self.len.store(0, Ordering::Release);
    }

    /// Forgets the pages from this place onwards.
    pub(crate) fn truncate(&self, len: usize) {
        self.len.store(len.min(self.len()), Ordering::Release);
    }

    /// The pages.
    ///
    /// # Safety
    /// Nobody appends or gives memory back while the slice lives.
    pub(crate) unsafe fn slice(&self) -> &[Gfn] {
        let len = self.len();
        // SAFETY: nobody stores meanwhile, by the contract.
        let words = unsafe { self.pages.plain(0..len) };
        // SAFETY: Gfn is a transparent u64; the same borrow.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
    }

    pub(crate) fn for_each(&self, sink: impl FnMut(Gfn)) {
        self.for_first(self.len(), sink);
    }

    pub(crate) fn for_first(&self, count: usize, mut sink: impl FnMut(Gfn)) {
        self.pages[..count.min(self.len())].iter().for_each(|page| sink(Gfn(page.load(Ordering::Relaxed))));
    }

    /// Forgets pages, and says how many of the first `count` are left.
    pub(crate) fn retain(&self, count: usize, mut keep: impl FnMut(Gfn) -> bool) -> usize {
        let (mut len, mut left) = (0, 0);
        for place in 0..self.len() {
            let page = self.pages[place].load(Ordering::Relaxed);
            if keep(Gfn(page)) {
                self.pages[len].store(page, Ordering::Relaxed);
                len += 1;
                left += usize::from(place < count);
            }
        }
        self.truncate(len);
        left
    }

    pub(crate) fn populate(&self, pages: usize) {
        self.pages.populate(0..pages);
    }

    /// Empties the list and gives its memory back.
    pub(crate) fn clear_all(&self) {
        self.clear();
        self.pages.clear_all();
    }
}
