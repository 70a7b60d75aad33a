//! Copies of the pages that change again and again, as they were last sent.

use std::collections::TryReserveError;

use crate::image::PAGE_SIZE;

/// How many places a page can have.
const WAYS: usize = 8;
/// Bytes of memory that are taken in one step.
const STEP: usize = 1 << 20;
/// No frame has this number.
const NONE: u64 = u64::MAX;

/// Copies of pages as they were last sent. Their number is fixed from the start.
///
/// The pages are in sets of eight by their GFN. A new page replaces the least recently used page of its set.
pub(super) struct SentPages {
    /// For each set, the GFN of each page and where its copy is, the most recently used first.
    places: Vec<(u64, u32)>,
    /// 4096 bytes for each place.
    copies: Vec<u8>,
    sets: usize,
}

impl SentPages {
    /// Room for at least `pages` copies, and at most twice as many. When this returns the memory is
    /// populated, not only promised; `between` is called repeatedly while it is taken.
    pub(super) fn new(pages: usize, mut between: impl FnMut()) -> Result<Self, TryReserveError> {
        let sets = pages.div_ceil(WAYS).next_power_of_two();
        let count = sets * WAYS;
        let (mut places, mut copies) = (Vec::new(), Vec::new());
        places.try_reserve_exact(count)?;
        places.extend((0..count).map(|place| (NONE, place as u32)));
        copies.try_reserve_exact(count * PAGE_SIZE)?;
        while copies.len() < count * PAGE_SIZE {
            // Not zero: the allocator would only promise pages of zeroes.
            copies.resize((copies.len() + STEP).min(count * PAGE_SIZE), 0xff);
            between();
        }
        Ok(Self { places, copies, sets })
    }

    /// The copy of the page, if there is one.
    pub(super) fn get(&mut self, gfn: u64) -> Option<&mut [u8; PAGE_SIZE]> {
        let first = self.set_of(gfn);
        let set = &mut self.places[first..first + WAYS];
        let way = set.iter().position(|(page, _)| *page == gfn)?;
        set[..=way].rotate_right(1);
        Some(self.copy(first))
    }

    /// A place for a page that has none. It still holds another page's bytes.
    pub(super) fn insert(&mut self, gfn: u64) -> &mut [u8; PAGE_SIZE] {
        let first = self.set_of(gfn);
        let set = &mut self.places[first..first + WAYS];
        set.rotate_right(1);
        set[0].0 = gfn;
        self.copy(first)
    }

    /// Drops all copies.
    pub(super) fn forget(&mut self) {
        self.places.iter_mut().for_each(|place| place.0 = NONE);
    }

    /// The first place of the page's set. Pages spread over the sets, whatever their distance.
    fn set_of(&self, gfn: u64) -> usize {
        let mixed = gfn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ mixed >> 32) as usize & (self.sets - 1)) * WAYS
    }

    fn copy(&mut self, place: usize) -> &mut [u8; PAGE_SIZE] {
        let at = self.places[place].1 as usize * PAGE_SIZE;
        self.copies[at..].first_chunk_mut().expect("there is a copy for each place")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pages_that_fit_are_all_there() {
        let mut sent = SentPages::new(4096, || ()).unwrap();
        assert_eq!(sent.copies.len(), 4096 * PAGE_SIZE);
        for distance in [1, 7, 512, 4096] {
            sent.forget();
            (0..2048).for_each(|page| sent.insert(page * distance).fill(page as u8));
            let found = (0..2048).filter(|page| sent.get(page * distance).is_some()).count();
            assert!(found > 2000, "{found} of 2048 pages at a distance of {distance}");
        }
        sent.forget();
        assert!((0..2048).all(|page| sent.get(page).is_none()));
    }

    proptest! {
        /// A copy always belongs to its page, whatever comes and goes.
        #[test]
        fn a_copy_is_never_that_of_another_page(
            steps in proptest::collection::vec((0..60u64, any::<u8>()), 1..400),
        ) {
            let mut sent = SentPages::new(16, || ()).unwrap();
            let mut last = HashMap::new();
            for (gfn, byte) in steps {
                match sent.get(gfn) {
                    Some(copy) => {
                        prop_assert!(copy.iter().all(|it| Some(it) == last.get(&gfn)), "page {gfn}");
                        copy.fill(byte);
                    }
                    None => sent.insert(gfn).fill(byte),
                }
                last.insert(gfn, byte);
                prop_assert!(sent.get(gfn).is_some());
            }
        }
    }
}
