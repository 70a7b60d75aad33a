//! The standby is ready for base pages.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{EncodeError, Encoder, check_length, put_text};
use super::error::WireError;
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::MAX_TEXT;

/// The standby is ready for base pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The generation in which the VM runs, as the primary said it.
    pub generation: u64,
    /// The silence, in microseconds, that both sides use from now on: the larger of the two configured ones.
    pub dead_after_us: u64,
    /// The standby host's name, at most [`MAX_TEXT`] bytes.
    pub host: String,
}

/// The host's name follows as a text.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    generation: U64,
    dead_after_us: U64,
}

impl Accept {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::Accept, payload);
        let head: &Head = fields.fixed()?;
        let host = fields.text(MAX_TEXT)?;
        fields.end()?;
        Ok(Self { generation: head.generation.get(), dead_after_us: head.dead_after_us.get(), host })
    }
}

impl Encoder {
    /// Appends [`Accept`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`] for the host's name.
    pub fn accept(&mut self, out: &mut Vec<u8>, accept: &Accept) -> Result<(), EncodeError> {
        check_length("the host's name", accept.host.len(), MAX_TEXT)?;
        let head = Head { generation: accept.generation.into(), dead_after_us: accept.dead_after_us.into() };
        self.section(out, SectionKind::Accept, &[], |out| {
            out.extend_from_slice(head.as_bytes());
            put_text(out, &accept.host);
        });
        Ok(())
    }
}
