//! The contents of a work page: 16 words spread evenly, each computed from the page's number, its write
//! counter and the word's place. So a mix of two versions, or another page's content, is found wherever it
//! was torn.

/// 64-bit words of a page.
pub const PAGE_WORDS: usize = 512;
/// Distance of the pattern words: one every 256 bytes.
const STRIDE: usize = 32;

/// One page of memory.
pub type Page = [u64; PAGE_WORDS];

/// The fault of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It holds an older version: a write was lost.
    Stale,
    /// Its words do not belong together.
    Torn,
}

/// Writes version `count` of page `number`.
pub fn fill(page: &mut Page, number: u64, count: u32) {
    for place in (0..PAGE_WORDS).step_by(STRIDE) {
        page[place] = word(number, count, place);
    }
}

/// Compares a page with version `count`; version 0 was never written and may hold anything.
pub fn check(page: &Page, number: u64, count: u32) -> Result<(), Flaw> {
    let matches =
        |count| (0..PAGE_WORDS).step_by(STRIDE).all(|place| page[place] == word(number, count, place));
    if count == 0 || matches(count) {
        return Ok(());
    }
    // The first word carries the version in clear, so an old one can be told from a mixture.
    let found = (page[0] ^ mix(number)) as u32;
    if found < count && matches(found) { Err(Flaw::Stale) } else { Err(Flaw::Torn) }
}

fn word(number: u64, count: u32, place: usize) -> u64 {
    if place == 0 {
        (mix(number) & !u64::from(u32::MAX)) | u64::from(count ^ mix(number) as u32)
    } else {
        mix(number ^ u64::from(count).rotate_left(32) ^ (place as u64).rotate_left(20))
    }
}

/// The finaliser of SplitMix64.
fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn finds_stale_and_torn_pages(number in 0_u64..1 << 40, count in 2_u32.., older in 1_u32.., cut in 1_usize..512) {
            prop_assume!(older < count);
            let mut old = [0; PAGE_WORDS];
            let mut new = [0; PAGE_WORDS];
            fill(&mut old, number, older);
            fill(&mut new, number, count);
            prop_assert_eq!(check(&new, number, count), Ok(()));
            prop_assert_eq!(check(&old, number, count), Err(Flaw::Stale));
            prop_assert!(check(&new, number + 1, count).is_err(), "another page");
            // Every cut in front of the last pattern word leaves a mixture.
            let mut torn = new;
            torn[cut..].copy_from_slice(&old[cut..]);
            let mixed = cut <= PAGE_WORDS - STRIDE;
            prop_assert_eq!(check(&torn, number, count), if mixed { Err(Flaw::Torn) } else { Ok(()) });
            torn[..cut].copy_from_slice(&old[..cut]);
            torn[cut..].copy_from_slice(&new[cut..]);
            prop_assert_eq!(check(&torn, number, count), Err(if mixed { Flaw::Torn } else { Flaw::Stale }));
        }

        #[test]
        fn finds_a_flipped_bit(number in any::<u32>(), count in 1_u32.., place in 0_usize..16, bit in 0_u32..64) {
            let mut page = [0; PAGE_WORDS];
            fill(&mut page, number.into(), count);
            page[place * STRIDE] ^= 1 << bit;
            prop_assert!(check(&page, number.into(), count).is_err());
        }
    }
}
