//! One bit a page: the de-duplication bitmap, so that a page takes one place in an epoch.

use std::io;

use crate::layout::{Gfn, MemorySlot};
use crate::sync::Ordering;
use crate::words::Words;

/// A bitmap over frame numbers that many threads set at once.
pub(crate) struct Bits {
    words: Words,
    pages: u64,
}

fn place(gfn: Gfn) -> (usize, u64) {
    ((gfn.0 / 64) as usize, 1 << (gfn.0 % 64))
}

impl Bits {
    pub(crate) fn reserve(pages: u64) -> io::Result<Bits> {
        Ok(Bits { words: Words::reserve(pages.div_ceil(64) as usize)?, pages })
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Sets the bit; true for the one caller that found it clear.
    ///
    /// A page beyond the bitmap is never claimed.
    pub(crate) fn claim(&self, gfn: Gfn) -> bool {
        let (index, bit) = place(gfn);
        self.words.get(index).is_some_and(|word| word.fetch_or(bit, Ordering::AcqRel) & bit == 0)
    }

    /// Whether the bit is set, ordered against [`Bits::release`] of the same page: if this finds the bit set,
    /// the thread that clears it sees all earlier stores of the caller. A plain load would not do: the stores
    /// could overtake it.
    pub(crate) fn is_claimed(&self, gfn: Gfn) -> bool {
        let (index, bit) = place(gfn);
        self.words.get(index).is_some_and(|word| word.fetch_or(0, Ordering::AcqRel) & bit != 0)
    }

    /// Fetches the place of the bit into the cache.
    #[cfg(not(all(test, loom)))]
    pub(crate) fn prefetch(&self, gfn: Gfn) {
        self.words.prefetch(place(gfn).0);
    }

    /// Whether the bit is set, without any ordering.
    pub(crate) fn peek(&self, gfn: Gfn) -> bool {
        let (index, bit) = place(gfn);
        self.words.get(index).is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Clears the bit; true if it was set.
    pub(crate) fn release(&self, gfn: Gfn) -> bool {
        let (index, bit) = place(gfn);
        self.words.get(index).is_some_and(|word| word.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
    }

    /// Clears the bits of the page and of up to 63 neighbours that share its word. For a caller that clears
    /// all.
    pub(crate) fn release_word(&self, gfn: Gfn) {
        if let Some(word) = self.words.get(place(gfn).0) {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Clears every bit and hands out the pages that were set: O(pages of the VM / 64).
    #[cfg(test)]
    pub(crate) fn release_all(&self, mut sink: impl FnMut(Gfn)) {
        self.release_while(|gfn| {
            sink(gfn);
            true
        });
    }

    /// Clears bits and hands out the pages that were set, until the sink says that a page was the last.
    /// Returns how many later bits are still set: O(pages of the VM / 64).
    pub(crate) fn release_while(&self, mut sink: impl FnMut(Gfn) -> bool) -> usize {
        let (mut wanted, mut left) = (true, 0);
        for (index, word) in self.words.iter().enumerate() {
            let set = word.load(Ordering::Relaxed);
            if set == 0 {
                continue;
            }
            if !wanted {
                left += set.count_ones() as usize;
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 && wanted {
                wanted = sink(Gfn(index as u64 * 64 + u64::from(bits.trailing_zeros())));
                bits &= bits - 1;
            }
            if bits != 0 {
                left += bits.count_ones() as usize;
                word.fetch_or(bits, Ordering::AcqRel);
            }
        }
        left
    }

    /// Clears the bits of a slot's pages, and says how many were set.
    #[cfg(not(all(test, loom)))]
    pub(crate) fn release_slot(&self, slot: &MemorySlot) -> usize {
        let ((first, _), (last, _)) = (place(slot.base), place(Gfn(slot.end() - 1)));
        let mut count = 0;
        for index in first..=last {
            let Some(word) = self.words.get(index) else { break };
            let mut mask = u64::MAX;
            if index == first {
                mask &= u64::MAX << (slot.base.0 % 64);
            }
            if index == last {
                mask &= u64::MAX >> (63 - (slot.end() - 1) % 64);
            }
            count += (word.fetch_and(!mask, Ordering::AcqRel) & mask).count_ones() as usize;
        }
        count
    }

    /// Takes the memory for the bits of a slot's pages, so that no epoch has to.
    pub(crate) fn populate(&self, slot: &MemorySlot) {
        self.words.populate_huge(place(slot.base).0..place(Gfn(slot.end() - 1)).0 + 1);
    }

    /// Forgets everything and gives the memory back.
    pub(crate) fn clear_all(&self) {
        self.words.clear_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn claims_once_and_scans_what_is_set() {
        let bits = Bits::reserve(200).unwrap();
        assert!(bits.claim(Gfn(199)) && !bits.claim(Gfn(199)));
        assert!(bits.claim(Gfn(0)) && bits.claim(Gfn(64)) && bits.claim(Gfn(63)));
        assert!(!bits.claim(Gfn(1 << 40)) && !bits.release(Gfn(1 << 40)));
        assert!(bits.is_claimed(Gfn(63)) && bits.peek(Gfn(63)) && !bits.is_claimed(Gfn(62)));
        assert!(bits.release(Gfn(63)) && !bits.release(Gfn(63)));
        let mut seen = Vec::new();
        bits.release_all(|gfn| seen.push(gfn.0));
        assert_eq!(seen, [0, 64, 199]);
        bits.release_all(|gfn| panic!("{gfn} is set"));
        let slot = |base, pages| MemorySlot { id: 0, base: Gfn(base), pages, host_addr: 0 };
        for (base, pages) in [(0, 1), (3, 60), (3, 61), (63, 2), (64, 64), (10, 180), (199, 1)] {
            (0..200).for_each(|gfn| _ = bits.claim(Gfn(gfn)));
            assert_eq!(bits.release_slot(&slot(base, pages)) as u64, pages);
            let mut left = 0;
            bits.release_all(|gfn| left += u64::from(gfn.0 < base || gfn.0 >= base + pages));
            assert_eq!(left, 200 - pages);
        }
    }
}
