//! Sums of a part of a disk, for the base synchronisation.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{Encoder, check_length};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::{DISK_CHUNK, MAX_SUMS, MAX_ZERO_CHUNKS};

/// Bytes of a chunk's sum.
pub const DISK_SUM_LEN: usize = 32;

/// The payload begins with this; the sums follow unless all chunks are zero.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    disk: U16,
    all_zero: U16,
    count: U32,
    first: U64,
}

pub(super) const HEAD_LEN: usize = size_of::<Head>();

/// Sums of the chunks of a part of a disk, the *window*. An empty window asks the standby to make its writes
/// to this disk durable.
///
/// A sum of 32 zero bytes stands for a chunk of zeroes; any other is the BLAKE3 hash of the chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSums<'a> {
    /// The disk.
    pub disk: u16,
    /// First chunk of the window.
    pub first: u64,
    /// Chunks of the window: at most [`MAX_SUMS`], or [`MAX_ZERO_CHUNKS`] if all are zero.
    pub count: u32,
    /// One sum per chunk; `None` if all chunks are zero.
    pub sums: Option<&'a [[u8; DISK_SUM_LEN]]>,
}

impl<'a> DiskSums<'a> {
    pub(super) fn parse(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::DiskSums, payload);
        let head: &Head = fields.fixed()?;
        let (disk, count, first) = (head.disk.get(), head.count.get(), head.first.get());
        check_window(&fields, first, count)?;
        let sums = match head.all_zero.get() {
            1 => None,
            0 if count as usize <= MAX_SUMS => Some(fields.row(count as usize)?),
            0 => return Err(fields.malformed("more sums than a section may have", count.into())),
            other => return Err(fields.malformed("the zero flag is neither 0 nor 1", other.into())),
        };
        fields.end()?;
        Ok(Self { disk, first, count, sums })
    }
}

/// Checks a peer's window before its numbers are used.
pub(super) fn check_window(fields: &Fields<'_>, first: u64, count: u32) -> Result<(), WireError> {
    if count > MAX_ZERO_CHUNKS {
        return Err(fields.malformed("a window of too many chunks", count.into()));
    }
    if first > i64::MAX as u64 / DISK_CHUNK as u64 {
        return Err(fields.malformed("a window beyond every disk, first chunk", first));
    }
    Ok(())
}

impl Encoder {
    /// Appends [`DiskSums`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`] for the window, [`EncodeError::DataLength`] if there is not one sum per
    /// chunk, [`EncodeError::Order`] inside a checkpoint.
    pub fn disk_sums(&mut self, out: &mut Vec<u8>, window: &DiskSums<'_>) -> Result<(), EncodeError> {
        self.outside_checkpoint("disk sums inside a checkpoint")?;
        let DiskSums { disk, first, count, sums } = *window;
        let limit = if sums.is_some() { MAX_SUMS } else { MAX_ZERO_CHUNKS as usize };
        check_length("a window of sums", count as usize, limit)?;
        if let Some(sums) = sums
            && sums.len() != count as usize
        {
            let (expected, found) = (count as usize * DISK_SUM_LEN, sums.len() * DISK_SUM_LEN);
            return Err(EncodeError::DataLength { expected, found });
        }
        let all_zero = u16::from(sums.is_none()).into();
        let head = Head { disk: disk.into(), all_zero, count: count.into(), first: first.into() };
        self.section(out, SectionKind::DiskSums, &[], |out| {
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(sums.unwrap_or_default().as_flattened());
        });
        Ok(())
    }
}
