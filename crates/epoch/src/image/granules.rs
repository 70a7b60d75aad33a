//! Pages of which only some parts changed.

use super::page::PAGE_SIZE;

/// Bytes of a granule, the unit of comparison of pages: a cache line.
pub const GRANULE: usize = 64;
/// Bytes of the mask in front of the granules.
pub(crate) const MASK_LEN: usize = size_of::<u64>();
const _: () = assert!(PAGE_SIZE / GRANULE == u64::BITS as usize);

/// The changed granules of a page, with their contents. Overwriting the old page with them, once or more
/// often, gives the new page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granules<'a> {
    mask: u64,
    bytes: &'a [[u8; GRANULE]],
}

impl<'a> Granules<'a> {
    /// Reads the bytes of a section: the mask, then 64 bytes for each bit that is set, the lowest first.
    /// `None` if there are more or fewer.
    pub(crate) fn parse(data: &'a [u8]) -> Option<Self> {
        let (mask, rest) = data.split_first_chunk::<MASK_LEN>()?;
        let mask = u64::from_le_bytes(*mask);
        let (bytes, tail) = rest.as_chunks::<GRANULE>();
        (tail.is_empty() && bytes.len() == mask.count_ones() as usize).then_some(Self { mask, bytes })
    }

    /// The mask: bit n is set for the granule that begins at byte 64 n.
    pub fn mask(&self) -> u64 {
        self.mask
    }

    /// Each granule: at which byte of the page it begins, and its contents.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &'a [u8; GRANULE])> + use<'a> {
        places(self.mask).zip(self.bytes)
    }

    /// Turns the old page into the new one.
    pub fn apply(&self, page: &mut [u8; PAGE_SIZE]) {
        self.iter().for_each(|(at, bytes)| page[at..at + GRANULE].copy_from_slice(bytes));
    }
}

/// Bytes of data of a page with these changed granules.
pub(crate) fn data_len(mask: u64) -> usize {
    MASK_LEN + mask.count_ones() as usize * GRANULE
}

/// The granules that differ, as a mask: bit n is set for the granule that begins at byte 64 n.
pub(crate) fn changed(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE]) -> u64 {
    let pairs = old.as_chunks::<GRANULE>().0.iter().zip(new.as_chunks::<GRANULE>().0);
    // Eight words without a branch, so that the compiler uses vector instructions.
    let differs = |(old, new): (&[u8; GRANULE], &[u8; GRANULE])| {
        let words = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
        words.fold(0, |seen, (old, new)| seen | (u64::from_ne_bytes(*old) ^ u64::from_ne_bytes(*new))) != 0
    };
    pairs.enumerate().fold(0, |mask, (index, pair)| mask | u64::from(differs(pair)) << index)
}

/// Writes the mask and those granules of a page. `to` has [`data_len`] bytes.
pub(crate) fn pack(page: &[u8; PAGE_SIZE], mask: u64, to: &mut [u8]) {
    let (head, rest) = to.split_at_mut(MASK_LEN);
    head.copy_from_slice(&mask.to_le_bytes());
    for (at, to) in places(mask).zip(rest.as_chunks_mut::<GRANULE>().0) {
        to.copy_from_slice(&page[at..at + GRANULE]);
    }
}

/// Brings a page as it was up to date, granule by granule.
pub(crate) fn update(old: &mut [u8; PAGE_SIZE], new: &[u8; PAGE_SIZE], mask: u64) {
    places(mask).for_each(|at| old[at..at + GRANULE].copy_from_slice(&new[at..at + GRANULE]));
}

/// At which bytes of the page these granules begin.
fn places(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let first = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(first * GRANULE)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Compares one byte after the other.
    fn oracle(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE]) -> u64 {
        (0..PAGE_SIZE).filter(|&at| old[at] != new[at]).fold(0, |mask, at| mask | 1 << (at / GRANULE))
    }

    #[test]
    fn one_bit_anywhere_is_found() {
        let old: [u8; PAGE_SIZE] = std::array::from_fn(|at| (at * 31) as u8);
        assert_eq!(changed(&old, &old), 0);
        for at in 0..PAGE_SIZE {
            let mut new = old;
            new[at] ^= 1 << (at % 8);
            assert_eq!(changed(&old, &new), 1 << (at / GRANULE), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn granules_make_of_the_old_page_the_new_one(
            seed: u8,
            writes in proptest::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..200),
        ) {
            let old: [u8; PAGE_SIZE] = std::array::from_fn(|at| (at as u8).wrapping_mul(seed));
            let mut new = old;
            writes.iter().for_each(|(at, byte)| new[*at] = *byte);
            let mask = changed(&old, &new);
            prop_assert_eq!(mask, oracle(&old, &new));
            let mut data = vec![0xee; data_len(mask)];
            pack(&new, mask, &mut data);
            let granules = Granules::parse(&data).unwrap();
            let (mut copy, mut cache) = (old, old);
            granules.apply(&mut copy);
            prop_assert!(copy == new);
            granules.apply(&mut copy);
            prop_assert!(copy == new, "twice");
            update(&mut cache, &new, mask);
            prop_assert!(cache == new);
            prop_assert_eq!(granules.iter().count(), mask.count_ones() as usize);
        }

        #[test]
        fn any_bytes_are_granules_or_none(data in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some(granules) = Granules::parse(&data) {
                let mut page = [0; PAGE_SIZE];
                granules.apply(&mut page);
                prop_assert_eq!(data.len(), data_len(granules.mask));
            }
        }
    }

    #[test]
    fn a_mask_and_its_granules_belong_together() {
        let mut data = vec![0; 8 + 2 * GRANULE];
        for (mask, fits) in [(0u64, false), (1, false), (1 | 1 << 63, true), (7, false), (u64::MAX, false)] {
            data[..8].copy_from_slice(&mask.to_le_bytes());
            assert_eq!(Granules::parse(&data).is_some(), fits, "{mask:#x}");
        }
        assert!(Granules::parse(&[]).is_none() && Granules::parse(&[0; 7]).is_none());
        assert!(Granules::parse(&[0; 8]).is_some(), "nothing has changed");
        assert!(Granules::parse(&[0; 9]).is_none());
    }
}
