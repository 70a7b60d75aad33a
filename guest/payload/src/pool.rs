//! The RAM that is neither image, stack nor heap: pages for the WORK load.

use crate::abi::BootInfo;
use crate::logic::work::{Arena, Page};

const PAGE: u64 = 4096;
/// Write counters in one page.
const COUNTERS: u64 = PAGE / 4;

/// All pool pages, from the end of the heap to the end of low RAM and then high RAM, numbered through.
#[derive(Clone, Copy)]
pub struct Pool {
    low_start: u64,
    low_pages: u64,
    high_pages: u64,
}

impl Pool {
    /// The pool of a machine whose heap ends at `heap_end` (a page boundary).
    ///
    /// # Safety
    /// Nothing else uses the RAM that `info` describes from `heap_end` on.
    pub unsafe fn new(info: &BootInfo, heap_end: u64) -> Self {
        Self {
            low_start: heap_end,
            low_pages: info.low_bytes.saturating_sub(heap_end) / PAGE,
            high_pages: info.high_bytes / PAGE,
        }
    }

    /// Pages of each of `workers` equal parts, counters included.
    fn part(&self, workers: u64) -> u64 {
        (self.low_pages + self.high_pages) / workers
    }

    /// Work pages of each of `workers` equal parts.
    pub fn pages_per_worker(&self, workers: u64) -> u64 {
        self.part(workers) * COUNTERS / (COUNTERS + 1)
    }

    /// Part `index` of `workers`.
    ///
    /// # Safety
    /// Each part is made at most once.
    pub unsafe fn arena(&self, index: u64, workers: u64) -> PoolArena {
        let pages = self.pages_per_worker(workers);
        let first = index * self.part(workers);
        PoolArena { pool: *self, first, first_page: first + self.part(workers) - pages, pages }
    }

    fn address(&self, index: u64) -> u64 {
        assert!(index < self.low_pages + self.high_pages, "pool page out of range");
        match index.checked_sub(self.low_pages) {
            None => self.low_start + index * PAGE,
            Some(index) => crate::abi::HIGH_RAM_ADDR + index * PAGE,
        }
    }
}

/// The part of one worker: counters first, then pages.
pub struct PoolArena {
    pool: Pool,
    first: u64,
    first_page: u64,
    pages: u64,
}

impl Arena for PoolArena {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn page(&mut self, index: u64) -> &mut Page {
        assert!(index < self.pages, "work page out of range");
        let address = self.pool.address(self.first_page + index);
        // SAFETY: a whole aligned page of RAM (`Pool::new`), of this part alone (`Pool::arena`); `&mut self`
        // keeps the references of one part apart. Any content is a valid `Page`.
        unsafe { &mut *(address as *mut Page) }
    }

    fn counter(&mut self, index: u64) -> &mut u32 {
        assert!(index < self.pages, "work page out of range");
        let address = self.pool.address(self.first + index / COUNTERS) + index % COUNTERS * 4;
        // SAFETY: as in `page`; `pages_per_worker` leaves enough pages in front for all counters.
        unsafe { &mut *(address as *mut u32) }
    }
}
