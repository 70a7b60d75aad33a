//! One state section of the open checkpoint.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{Encoder, check_length};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::{StateKind, StateSection};

/// The payload begins with this; the bytes of the state follow.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    checkpoint: U64,
    kind: U16,
    version: U16,
    index: U16,
    zero: U16,
}

pub(super) const HEAD_LEN: usize = size_of::<Head>();

/// Returns the checkpoint's number and the section.
pub(super) fn parse(payload: &[u8]) -> Result<(u64, StateSection<'_>), WireError> {
    let mut fields = Fields::new(SectionKind::State, payload);
    let head: &Head = fields.fixed()?;
    fields.reserved(head.zero.as_bytes())?;
    let number = head.kind.get();
    let kind = StateKind::from_wire(number)
        .ok_or_else(|| fields.malformed("a state section of an unknown kind", number.into()))?;
    let bytes = fields.bytes(fields.len())?;
    if bytes.len() > kind.limit() {
        return Err(fields.malformed("a state section of more bytes than its kind has", bytes.len() as u64));
    }
    let (version, index) = (head.version.get(), head.index.get());
    Ok((head.checkpoint.get(), StateSection { kind, version, index, bytes }))
}

impl Encoder {
    /// Appends the head of a `State` section of the open checkpoint; `state.bytes` must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Order`].
    pub fn state_head(&mut self, out: &mut Vec<u8>, state: &StateSection<'_>) -> Result<(), EncodeError> {
        check_length("a state section", state.bytes.len(), state.kind.limit())?;
        let number = self.open("state outside a checkpoint")?.add_state(state.bytes.len());
        let head = Head {
            checkpoint: number.into(),
            kind: (state.kind as u16).into(),
            version: state.version.into(),
            index: state.index.into(),
            zero: U16::ZERO,
        };
        self.chained(out, SectionKind::State, state.bytes, |out| out.extend_from_slice(head.as_bytes()));
        Ok(())
    }
}
