//! How pages are written down.
//!
//! An entry names the frame and the codec; the data of all entries of a section follow behind the entries, in
//! their order. A codec that this release does not know is refused with the section.

mod zero;

pub use zero::squeeze_zero_pages;

use crate::image::{PAGE_SIZE, PageData};

/// Physical addresses of x86-64 have 52 bits, of which a page has 12.
const GFN_BITS: u32 = 40;
const GFN_MASK: u64 = (1 << GFN_BITS) - 1;
/// Where codec and length stand in an entry of version 2, and the codec in one of version 1.
const CODEC_AT: u32 = GFN_BITS;
const LENGTH_AT: u32 = 48;
const OLD_CODEC_AT: u32 = 52;

/// How a page is written down. The numbers are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageCodec {
    /// 4096 bytes as they are.
    Raw = 0,
    /// No bytes; the page is all zero.
    Zero = 1,
}

impl PageCodec {
    fn from_wire(number: u8) -> Option<Self> {
        [Self::Raw, Self::Zero].into_iter().find(|codec| *codec as u8 == number)
    }

    /// Bytes of its data. A codec whose data has not always the same length says here which lengths there
    /// are, at most those of a page.
    fn data_len(self) -> usize {
        match self {
            Self::Raw => PAGE_SIZE,
            Self::Zero => 0,
        }
    }
}

/// One page of a section: its frame, how it is written down, and in how many bytes.
///
/// On the wire a `u64`. Version 2: the GFN in bits 0..40, the codec in 40..48, the length of the data in
/// 48..64. Version 1: the GFN in bits 0..52, the codec above, and no length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry {
    gfn: u64,
    codec: PageCodec,
    length: u16,
}

/// Why a peer's entry is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryError {
    /// This release does not know the codec.
    Codec(u8),
    /// The codec has no data of this length.
    Length(u16),
    /// No guest has such a frame.
    Gfn(u64),
}

impl PageEntry {
    /// A page of which 4096 bytes follow. `gfn` has at most 40 bits.
    pub fn raw(gfn: u64) -> Self {
        Self::new(gfn, PageCodec::Raw)
    }

    /// A page of zeroes.
    pub fn zero(gfn: u64) -> Self {
        Self::new(gfn, PageCodec::Zero)
    }

    fn new(gfn: u64, codec: PageCodec) -> Self {
        debug_assert!(gfn <= GFN_MASK);
        Self { gfn: gfn & GFN_MASK, codec, length: codec.data_len() as u16 }
    }

    /// The guest frame number.
    pub fn gfn(self) -> u64 {
        self.gfn
    }

    /// How the page is written down.
    pub fn codec(self) -> PageCodec {
        self.codec
    }

    /// Bytes of data that belong to this entry.
    pub fn data_len(self) -> usize {
        self.length.into()
    }

    /// The entry in a section of this version.
    pub(crate) fn to_wire(self, version: u16) -> u64 {
        let codec = self.codec as u64;
        match version {
            1 => self.gfn | codec << OLD_CODEC_AT,
            _ => self.gfn | codec << CODEC_AT | u64::from(self.length) << LENGTH_AT,
        }
    }

    pub(crate) fn from_wire(version: u16, word: u64) -> Result<Self, EntryError> {
        let (gfn, number, length) = match version {
            1 => (word & ((1 << OLD_CODEC_AT) - 1), word >> OLD_CODEC_AT, None),
            _ => (word & GFN_MASK, word >> CODEC_AT & 0xff, Some((word >> LENGTH_AT) as u16)),
        };
        if gfn > GFN_MASK {
            return Err(EntryError::Gfn(gfn));
        }
        let number = u8::try_from(number).unwrap_or(u8::MAX);
        let codec = PageCodec::from_wire(number).ok_or(EntryError::Codec(number))?;
        match length {
            Some(length) if usize::from(length) != codec.data_len() => Err(EntryError::Length(length)),
            _ => Ok(Self::new(gfn, codec)),
        }
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
