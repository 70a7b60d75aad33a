//! The sums of one checkpoint, from the samples of its epoch and the pages that the checkpoint has itself.

use outlive_dirty::Gfn;
use outlive_epoch::AuditSpan;
use outlive_machine::{PAGE_SIZE, page_sum};

use super::MOST;

/// The sums; see the module. One is used for checkpoint after checkpoint, so that none of them allocates.
pub(crate) struct Picked {
    /// By page, each once.
    sums: Vec<(u64, u64)>,
    spans: Vec<AuditSpan>,
}

impl Picked {
    /// Nothing, with room for all that a checkpoint may have.
    pub(crate) fn new() -> Self {
        Self { sums: Vec::with_capacity(MOST), spans: Vec::with_capacity(MOST) }
    }

    /// Begins anew, with these pages and their sums as they were read in the epoch. A page that is there twice was read
    /// twice; if it was written between, it is in the checkpoint, which has the last word.
    pub(super) fn begin(&mut self, sums: impl Iterator<Item = (u64, u64)>) {
        self.clear();
        self.sums.extend(sums);
        self.sums.sort_unstable();
        self.sums.dedup_by_key(|(gfn, _)| *gfn);
    }

    /// There is nothing to compare.
    pub(crate) fn clear(&mut self) {
        self.sums.clear();
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

    /// The sums as the checkpoint carries them; none if there is nothing to compare.
    pub(crate) fn spans(&mut self) -> &[AuditSpan] {
        let block = |gfn: u64| gfn - gfn % AuditSpan::PAGES;
        let of = |pages: &[(u64, u64)]| {
            let first = block(pages[0].0);
            let (mask, sum) = pages.iter().fold((0, 0u64), |(mask, sum), (gfn, page)| {
                (mask | 1 << (gfn - first), sum.wrapping_add(*page))
            });
            AuditSpan { first, mask, sum }
        };
        self.spans.clear();
        self.spans.extend(self.sums.chunk_by(|a, b| block(a.0) == block(b.0)).map(of));
        &self.spans
    }
}
