//! A page, and the search for pages of zeroes.

use super::granules::Granules;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// The content of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageData<'a> {
    /// These bytes.
    Raw(&'a [u8; PAGE_SIZE]),
    /// All zero.
    Zero,
    /// The page of the previous checkpoint, except for these granules.
    Granules(Granules<'a>),
}

/// Whether all bytes are zero. Compares 64 bytes per step and stops at the first block that is not zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, tail) = bytes.as_chunks::<64>();
    // No branch inside the block, so that the compiler uses vector instructions.
    blocks.iter().all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
        && tail.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_makes_a_page_not_zero() {
        let mut page = [0u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
        assert!(is_zero(&[]) && is_zero(&[0; 65]) && !is_zero(&[0, 1]));
    }
}
