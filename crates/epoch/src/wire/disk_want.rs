//! Which chunks of a window of sums the standby wants.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::disk_sums::check_window;
use super::encoder::{Encoder, check_length};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::MAX_SUMS;

/// The payload begins with this; then the position in the window of each wanted chunk follows, a `u16`.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    disk: U16,
    wanted: U16,
    count: U32,
    first: U64,
}

pub(super) const HEAD_LEN: usize = size_of::<Head>();

/// Which chunks of a window the standby wants. It answers every [`DiskSums`](super::DiskSums) with one, in
/// order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWant {
    /// The disk.
    pub disk: u16,
    /// First chunk of the window.
    pub first: u64,
    /// Chunks of the window.
    pub count: u32,
    /// Positions in the window, ascending, at most [`MAX_SUMS`].
    pub wanted: Vec<u16>,
}

impl DiskWant {
    pub(super) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::DiskWant, payload);
        let head: &Head = fields.fixed()?;
        let (count, first) = (head.count.get(), head.first.get());
        check_window(&fields, first, count)?;
        let length = usize::from(head.wanted.get());
        if length > MAX_SUMS {
            return Err(fields.malformed("more chunks wanted than a window has", length as u64));
        }
        let mut wanted = Vec::with_capacity(length);
        for at in fields.row::<U16>(length)? {
            let at = at.get();
            if u32::from(at) >= count || wanted.last().is_some_and(|last| *last >= at) {
                return Err(fields.malformed("a wanted chunk is out of order or its window", at.into()));
            }
            wanted.push(at);
        }
        fields.end()?;
        Ok(Self { disk: head.disk.get(), first, count, wanted })
    }
}

impl Encoder {
    /// Appends [`DiskWant`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`].
    pub fn disk_want(&mut self, out: &mut Vec<u8>, want: &DiskWant) -> Result<(), EncodeError> {
        check_length("the list of wanted chunks", want.wanted.len(), MAX_SUMS)?;
        let wanted = (want.wanted.len() as u16).into();
        let head =
            Head { disk: want.disk.into(), wanted, count: want.count.into(), first: want.first.into() };
        self.section(out, SectionKind::DiskWant, &[], |out| {
            out.extend_from_slice(head.as_bytes());
            want.wanted.iter().for_each(|at| out.extend_from_slice(&at.to_le_bytes()));
        });
        Ok(())
    }
}
