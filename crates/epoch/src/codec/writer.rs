//! Writes the pages of checkpoints down, each in the fewest bytes. [`codec`](super) says by which rule it may
//! do so.

use std::collections::TryReserveError;

use super::PageEntry;
use super::sent::SentPages;
use crate::image::granules::{changed, data_len, pack, update};
use crate::image::{PAGE_SIZE, is_zero};

/// With more changed granules than this a page is written raw: granules would save little, and the standby
/// copies a whole page faster.
const MOST_GRANULES: u32 = 48;

/// How many pages were written down in each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CodecCounts {
    /// Pages that were written raw.
    pub raw: u64,
    /// Pages of zeroes.
    pub zero: u64,
    /// Pages written as granules only.
    pub granules: u64,
    /// Bytes of those pages: masks and granules.
    pub granule_bytes: u64,
    /// Pages that were left out because nothing in them changed.
    pub unchanged: u64,
}

/// Writes down the pages of checkpoints, and remembers what it wrote. See [the rule](super).
pub struct PageWriter {
    /// None: every page is raw or zero.
    sent: Option<SentPages>,
    counts: CodecCounts,
}

impl PageWriter {
    /// A writer that remembers nothing: every page is raw or zero.
    pub fn plain() -> Self {
        Self { sent: None, counts: CodecCounts::default() }
    }

    /// A writer that remembers at least `pages` pages. It takes its memory, somewhat more than the pages
    /// need, now. That may take a while, so `between` is called after each MiB.
    ///
    /// # Errors
    /// When there is not so much memory.
    pub fn remembering(pages: usize, between: impl FnMut()) -> Result<Self, TryReserveError> {
        Ok(Self { sent: Some(SentPages::new(pages, between)?), ..Self::plain() })
    }

    /// Writes down the page that is in `pages` from byte `from` on. The data goes to the same buffer, from
    /// byte `to` on; `to` must not be behind `from`. What was in between is lost.
    ///
    /// `None`: leave the page out, because the standby has it.
    ///
    /// # Panics
    /// If the buffer has no page there, or `to` is behind `from`.
    pub fn write(&mut self, gfn: u64, pages: &mut [u8], from: usize, to: usize) -> Option<PageEntry> {
        assert!(to <= from, "the data of a page would overwrite the next one");
        let page: &[u8; PAGE_SIZE] = pages[from..].first_chunk().expect("a whole page");
        let copy = self.sent.as_mut().and_then(|sent| sent.get(gfn));
        let counts = &mut self.counts;
        if let Some(copy) = copy {
            let mask = changed(copy, page);
            if mask == 0 {
                counts.unchanged += 1;
                return None;
            }
            update(copy, page, mask);
            if is_zero(page) {
                counts.zero += 1;
                return Some(PageEntry::zero(gfn));
            }
            if mask.count_ones() <= MOST_GRANULES {
                let length = data_len(mask);
                counts.granules += 1;
                counts.granule_bytes += length as u64;
                pack(copy, mask, &mut pages[to..to + length]);
                return Some(PageEntry::granules(gfn, mask));
            }
        } else if is_zero(page) {
            // Not remembered: the place is better used by a page that is written for the first time.
            counts.zero += 1;
            return Some(PageEntry::zero(gfn));
        } else if let Some(sent) = &mut self.sent {
            *sent.insert(gfn) = *page;
        }
        counts.raw += 1;
        if to < from {
            pages.copy_within(from..from + PAGE_SIZE, to);
        }
        Some(PageEntry::raw(gfn))
    }

    /// Forgets all pages: what comes next depends on nothing before.
    pub fn forget(&mut self) {
        self.sent.iter_mut().for_each(SentPages::forget);
    }

    /// Counts since the last call.
    pub fn take_counts(&mut self) -> CodecCounts {
        std::mem::take(&mut self.counts)
    }
}
