//! The sums of one checkpoint, from the samples of its epoch and the pages that the checkpoint has itself.

use outlive_dirty::Gfn;
use outlive_epoch::AuditSpan;
use outlive_machine::{PAGE_SIZE, page_sum};

/// The sums; see the module.
pub(crate) struct Picked {
    /// By page, each once.
    sums: Vec<(u64, u64)>,
}

impl Picked {
    /// Of these pages with their sums as they were read in the epoch. A page that is there twice was read twice; if
    /// it was written between, it is in the checkpoint, which has the last word.
    pub(super) fn new(mut sums: Vec<(u64, u64)>) -> Self {
        sums.sort_unstable();
        sums.dedup_by_key(|(gfn, _)| *gfn);
        Self { sums }
    }

    /// Whether there is nothing to compare.
    pub(crate) fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// The checkpoint has these pages, with these contents, one after the other: what was read of them says nothing.
    pub(crate) fn captured(&mut self, gfns: &[Gfn], contents: &[u8]) {
        let (Some((first, _)), Some((last, _))) = (self.sums.first(), self.sums.last()) else { return };
        let range = *first..=*last;
        let (pages, _) = contents.as_chunks::<PAGE_SIZE>();
        for (gfn, page) in gfns.iter().zip(pages) {
            // The pages of an epoch's samples are neighbours, so this spares nearly all of the search.
            if range.contains(&gfn.0)
                && let Ok(at) = self.sums.binary_search_by_key(&gfn.0, |(gfn, _)| *gfn)
            {
                self.sums[at].1 = page_sum(*gfn, page);
            }
        }
    }

    /// The sums as the checkpoint carries them.
    pub(crate) fn spans(&self) -> Vec<AuditSpan> {
        let block = |gfn: u64| gfn - gfn % AuditSpan::PAGES;
        let of = |pages: &[(u64, u64)]| {
            let first = block(pages[0].0);
            let (mask, sum) = pages.iter().fold((0, 0u64), |(mask, sum), (gfn, page)| {
                (mask | 1 << (gfn - first), sum.wrapping_add(*page))
            });
            AuditSpan { first, mask, sum }
        };
        self.sums.chunk_by(|a, b| block(a.0) == block(b.0)).map(of).collect()
    }
}
