//! How pages are written down.
//!
//! An entry names the frame and the codec. The data of all entries of a section follows the entries, in the
//! same order. A section with a codec that this release does not know is refused.
//!
//! # The rule
//!
//! A page may be written as its changed granules, or be left out, only if **the standby's copy of it is what
//! the writer remembers** when the standby applies this checkpoint. That holds because
//!
//! * a standby applies the checkpoints of a connection in order, each whole or not at all, and after one that
//!   it does not apply it applies no other of that connection;
//! * the writer remembers a page when it writes it down, and what it writes down goes to the link before
//!   anything that is written down later, or the connection ends.
//!
//! So a writer belongs to the one thread that writes to a connection. It begins with the connection,
//! remembering nothing, and ends with it. A checkpoint that never reaches that thread (a pause that failed, a
//! part for a link that is gone) has not been remembered. A new base over the same connection makes the
//! writer forget ([`PageWriter::forget`]): base pages are read while the guest runs and are not remembered. A
//! takeover, another standby and protection that begins anew are new connections.
//!
//! The writer compares with the copy of a page that was made in the pause, not with the guest's memory. So a
//! page that the guest writes meanwhile, hot or not, does not matter here: that write is in the next
//! checkpoint. A granule overwrites, so applying one twice does no harm.

mod sent;
#[cfg(test)]
mod tests;
mod writer;
mod zero;

pub use writer::{CodecCounts, PageWriter};
pub use zero::squeeze_zero_pages;

use crate::image::granules::{GRANULE, Granules, MASK_LEN, data_len};
use crate::image::{PAGE_SIZE, PageData};

/// Physical addresses of x86-64 have 52 bits; 12 of them are the place in the page.
const GFN_BITS: u32 = 40;
const GFN_MASK: u64 = (1 << GFN_BITS) - 1;
/// Where codec and length are in an entry of version 2, and the codec in one of version 1.
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
    /// A bit mask and the changed granules of 64 bytes. The mask is a `u64`; its bit n is set if the granule
    /// that begins at byte 64 n follows. The granules follow in ascending order, at most 63: more would be
    /// longer than the page. From version 3 of `Pages` on. Base pages have none: they are written while the
    /// guest runs, to memory whose content nobody knows.
    Granules = 2,
}

/// The first version of `Pages` that may have granules.
const WITH_GRANULES: u16 = 3;

impl PageCodec {
    fn from_wire(version: u16, number: u8) -> Option<Self> {
        let codec = [Self::Raw, Self::Zero, Self::Granules].into_iter().find(|codec| *codec as u8 == number);
        codec.filter(|codec| codec.is_in(version))
    }

    /// Whether entries of this version may have it.
    pub(crate) fn is_in(self, version: u16) -> bool {
        self != Self::Granules || version >= WITH_GRANULES
    }

    /// Whether its data can have this many bytes: at most those of a page.
    fn fits(self, length: usize) -> bool {
        match self {
            Self::Raw => length == PAGE_SIZE,
            Self::Zero => length == 0,
            Self::Granules => {
                let granules = length.checked_sub(MASK_LEN);
                length <= PAGE_SIZE && granules.is_some_and(|bytes| bytes.is_multiple_of(GRANULE))
            }
        }
    }
}

/// One page of a section: its frame, how it is written down, and in how many bytes.
///
/// On the wire a `u64`. Versions 2 and 3: the GFN in bits 0..40, the codec in 40..48, the length of the data in
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
    /// No guest has this frame.
    Gfn(u64),
}

impl PageEntry {
    /// A page whose 4096 bytes follow. `gfn` has at most 40 bits.
    pub fn raw(gfn: u64) -> Self {
        Self::new(gfn, PageCodec::Raw, PAGE_SIZE)
    }

    /// A page of zeroes.
    pub fn zero(gfn: u64) -> Self {
        Self::new(gfn, PageCodec::Zero, 0)
    }

    /// A page whose granules of this mask follow the mask itself; not all of them.
    pub fn granules(gfn: u64, mask: u64) -> Self {
        Self::new(gfn, PageCodec::Granules, data_len(mask))
    }

    fn new(gfn: u64, codec: PageCodec, length: usize) -> Self {
        debug_assert!(gfn <= GFN_MASK && codec.fits(length));
        Self { gfn: gfn & GFN_MASK, codec, length: length as u16 }
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
        let codec = PageCodec::from_wire(version, number).ok_or(EntryError::Codec(number))?;
        let length = match length {
            Some(length) => length,
            None if codec == PageCodec::Raw => PAGE_SIZE as u16,
            None => 0,
        };
        if codec.fits(length.into()) {
            Ok(Self { gfn, codec, length })
        } else {
            Err(EntryError::Length(length))
        }
    }
}

/// Whether the data of an entry, which has the right length, is what its codec writes. Call [`with_data`]
/// only after this.
pub(crate) fn is_sound(entry: PageEntry, data: &[u8]) -> bool {
    entry.codec != PageCodec::Granules || Granules::parse(data).is_some()
}

/// Joins entries with their data. They must have been checked against each other.
pub(crate) fn with_data<'a>(
    entries: impl Iterator<Item = PageEntry> + 'a,
    mut data: &'a [u8],
) -> impl Iterator<Item = (u64, PageData<'a>)> + 'a {
    entries.map_while(move |entry| {
        let (of_page, rest) = data.split_at_checked(entry.data_len())?;
        data = rest;
        let page = match entry.codec() {
            PageCodec::Zero => PageData::Zero,
            PageCodec::Raw => PageData::Raw(of_page.first_chunk()?),
            PageCodec::Granules => PageData::Granules(Granules::parse(of_page)?),
        };
        Some((entry.gfn(), page))
    })
}
