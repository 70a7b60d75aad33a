//! The search of a dirty bitmap.

use crate::layout::{Gfn, MemorySlot};

/// Words read together: most of a bitmap is empty, and a few vector instructions recognise a whole empty
/// block.
const BLOCK: usize = 16;

/// Hands out the pages whose bit is set, in order, until the sink refuses one. Returns how many it took.
///
/// A bit past the end of the slot is no page; KVM sets none.
pub(super) fn scan(words: &[u64], slot: &MemorySlot, sink: &mut dyn FnMut(Option<Gfn>) -> bool) -> usize {
    let mut found = 0;
    for (block, words) in words.chunks(BLOCK).enumerate() {
        if words.iter().fold(0, |all, word| all | word) == 0 {
            continue;
        }
        for (index, mut word) in words.iter().copied().enumerate() {
            while word != 0 {
                let offset = (block * BLOCK + index) as u64 * 64 + u64::from(word.trailing_zeros());
                if !sink((offset < slot.pages).then(|| Gfn(slot.base.0 + offset))) {
                    return found;
                }
                found += 1;
                word &= word - 1;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn finds_what_a_bit_by_bit_search_finds(
            bits in proptest::collection::btree_set(0..5000u64, 0..200),
            pages in 4800..5000u64,
            room in 0..250usize,
        ) {
            let slot = MemorySlot { id: 0, base: Gfn(1000), pages, host_addr: 0 };
            let mut words = vec![0u64; 79];
            bits.iter().for_each(|bit| words[(bit / 64) as usize] |= 1 << (bit % 64));
            let expected: Vec<_> =
                bits.iter().map(|&bit| (bit < pages).then_some(Gfn(1000 + bit))).take(room).collect();
            let mut found = Vec::new();
            let count = scan(&words, &slot, &mut |page| {
                let fits = found.len() < room;
                if fits {
                    found.push(page);
                }
                fits
            });
            prop_assert_eq!(count, found.len());
            prop_assert_eq!(found, expected);
        }
    }
}
