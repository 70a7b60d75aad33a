//! How pages are written down.
//!
//! An entry names the frame and the codec; the data of all entries of a section follow behind the entries, in
//! their order. A codec that this release does not know is refused with the section.

mod zero;

pub use zero::squeeze_zero_pages;

use crate::image::{PAGE_SIZE, PageData};

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

    pub(crate) fn from_wire(word: u64) -> Option<Self> {
        (word >> GFN_BITS <= PageCodec::Zero as u64).then_some(Self(word))
    }
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
