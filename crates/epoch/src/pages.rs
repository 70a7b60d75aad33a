//! Pages on the wire: entries, codecs, and the search for pages of zeroes.

use crate::error::WireError;
use crate::fields::Fields;
use crate::section::Kind;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// Most pages of one `Pages` or `BasePages` section.
pub const MAX_PAGES_PER_SECTION: usize = 256;

/// Fixed fields before the entries: tag u64, count u32, bytes of data u32.
pub(crate) const PAGES_FIXED: usize = 16;

const GFN_BITS: u32 = 52;
const GFN_MASK: u64 = (1 << GFN_BITS) - 1;

/// How a page is written down. Each codec knows the length of its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageCodec {
    /// 4096 bytes as they are.
    Raw = 0,
    /// No bytes; the page is all zero.
    Zero = 1,
}

/// One page of a section: the GFN in the low 52 bits, the codec in the 12 above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry(u64);

impl PageEntry {
    /// A page of which 4096 bytes follow. The upper 12 bits of `gfn` must be zero.
    pub fn raw(gfn: u64) -> Self {
        Self::new(gfn, PageCodec::Raw)
    }

    /// A page of zeroes.
    pub fn zero(gfn: u64) -> Self {
        Self::new(gfn, PageCodec::Zero)
    }

    fn new(gfn: u64, codec: PageCodec) -> Self {
        debug_assert!(gfn <= GFN_MASK);
        Self(gfn & GFN_MASK | (codec as u64) << GFN_BITS)
    }

    /// The guest frame number.
    pub fn gfn(self) -> u64 {
        self.0 & GFN_MASK
    }

    /// How the page is written down.
    pub fn codec(self) -> PageCodec {
        // Made by `new` or checked by `from_wire`: no other value exists.
        if self.0 >> GFN_BITS == PageCodec::Zero as u64 { PageCodec::Zero } else { PageCodec::Raw }
    }

    /// Bytes of data that belong to this entry.
    pub fn data_len(self) -> usize {
        match self.codec() {
            PageCodec::Raw => PAGE_SIZE,
            PageCodec::Zero => 0,
        }
    }

    pub(crate) fn to_wire(self) -> u64 {
        self.0
    }

    fn from_wire(word: u64) -> Option<Self> {
        (word >> GFN_BITS <= PageCodec::Zero as u64).then_some(Self(word))
    }
}

/// The content of a page that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageData<'a> {
    /// These bytes.
    Raw(&'a [u8; PAGE_SIZE]),
    /// All zero.
    Zero,
}

impl PageData<'_> {
    /// Writes the page to `target`.
    pub fn copy_to(self, target: &mut [u8; PAGE_SIZE]) {
        match self {
            Self::Raw(bytes) => target.copy_from_slice(bytes),
            Self::Zero => target.fill(0),
        }
    }
}

/// The checked payload of a `Pages` or `BasePages` section.
///
/// `u64` checkpoint number (`Pages`) or round (`BasePages`), `u32` count, `u32` bytes of data, `count`
/// entries of `u64`, the data of the entries in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages<'a> {
    /// The checkpoint's number, or the round of the base synchronisation.
    pub tag: u64,
    entries: &'a [u8],
    data: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Checks a payload: count, codecs, and that there are exactly as many bytes as the entries need.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn parse(kind: Kind, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(kind, payload);
        let tag = fields.u64()?;
        let count = fields.u32()? as usize;
        if count > MAX_PAGES_PER_SECTION {
            return Err(fields.malformed("more pages than a section may have", count as u64));
        }
        let data_len = fields.u32()?;
        let entries = fields.bytes(count * 8)?;
        let mut needed = 0;
        for word in words(entries) {
            match PageEntry::from_wire(word) {
                Some(entry) => needed += entry.data_len(),
                None => return Err(fields.malformed("a page has an unknown codec, entry", word)),
            }
        }
        if needed != data_len as usize {
            return Err(
                fields.malformed("the entries do not add up to the data's length", u64::from(data_len))
            );
        }
        let data = fields.bytes(needed)?;
        fields.end()?;
        Ok(Self { tag, entries, data })
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.entries.len() / 8
    }

    /// Whether the section has no page.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in their order.
    pub fn entries(&self) -> impl Iterator<Item = PageEntry> + 'a {
        words(self.entries).map(PageEntry)
    }

    /// The bytes of all raw pages, one after another.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Every page with its content.
    pub fn iter(&self) -> impl Iterator<Item = (u64, PageData<'a>)> + 'a {
        with_data(self.entries(), self.data)
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes))
}

/// Joins entries with their data. The two must have been checked against each other.
pub(crate) fn with_data<'a>(
    entries: impl Iterator<Item = PageEntry> + 'a,
    data: &'a [u8],
) -> impl Iterator<Item = (u64, PageData<'a>)> + 'a {
    let mut pages = data.as_chunks::<PAGE_SIZE>().0.iter();
    entries.map_while(move |entry| match entry.codec() {
        PageCodec::Zero => Some((entry.gfn(), PageData::Zero)),
        PageCodec::Raw => pages.next().map(|bytes| (entry.gfn(), PageData::Raw(bytes))),
    })
}

/// Whether all bytes are zero. Looks at 64 bytes a step and stops at the first that are not.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, tail) = bytes.as_chunks::<64>();
    // Without a branch inside the block, so that the compiler uses vector instructions.
    blocks.iter().all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
        && tail.iter().all(|byte| *byte == 0)
}

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
