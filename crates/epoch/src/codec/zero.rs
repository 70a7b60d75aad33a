//! Pages of zeroes.

use super::PageEntry;
use crate::image::{PAGE_SIZE, is_zero};

/// Prepares pages that were copied out of guest memory for sending: appends one entry per GFN to `entries`
/// and moves the pages that are not all zero together at the start of `pages`. Returns the bytes of data that
/// remain.
///
/// `pages` has 4096 bytes per GFN, in the same order. Nothing is allocated if `entries` has the capacity.
///
/// # Panics
/// If `pages` has another length.
pub fn squeeze_zero_pages(gfns: &[u64], pages: &mut [u8], entries: &mut Vec<PageEntry>) -> usize {
    assert_eq!(pages.len(), gfns.len() * PAGE_SIZE, "one page per GFN");
    let mut kept = 0;
    for (index, gfn) in gfns.iter().enumerate() {
        let page = index * PAGE_SIZE..(index + 1) * PAGE_SIZE;
        if is_zero(&pages[page.clone()]) {
            entries.push(PageEntry::zero(*gfn));
        } else {
            entries.push(PageEntry::raw(*gfn));
            if page.start != kept {
                pages.copy_within(page, kept);
            }
            kept += PAGE_SIZE;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squeezing_keeps_the_other_pages_in_order() {
        let gfns = [7, 8, 9, 10];
        let mut pages = vec![0; 4 * PAGE_SIZE];
        pages[PAGE_SIZE + 5] = 0x11;
        pages[3 * PAGE_SIZE] = 0x22;
        let mut entries = Vec::with_capacity(4);
        let kept = squeeze_zero_pages(&gfns, &mut pages, &mut entries);
        assert_eq!(kept, 2 * PAGE_SIZE);
        let expected = [PageEntry::zero(7), PageEntry::raw(8), PageEntry::zero(9), PageEntry::raw(10)];
        assert_eq!(entries, expected);
        assert_eq!((pages[5], pages[PAGE_SIZE]), (0x11, 0x22));
    }
}
