//! The standby holds all of a checkpoint.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::Encoder;
use super::error::WireError;
use super::fields::Fields;
use super::kind::SectionKind;

/// The standby holds all of a checkpoint: it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// The generation of the checkpoint.
    pub generation: u64,
    /// The checkpoint's number.
    pub number: u64,
    /// The newest stamp that the standby has heard.
    pub stamp_us: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Payload {
    generation: U64,
    number: U64,
    stamp_us: U64,
}

pub(super) const LEN: usize = size_of::<Payload>();

impl Ack {
    pub(super) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::Ack, payload);
        let Payload { generation, number, stamp_us } = fields.fixed()?;
        fields.end()?;
        Ok(Self { generation: generation.get(), number: number.get(), stamp_us: stamp_us.get() })
    }
}

impl Encoder {
    /// Appends [`Ack`].
    pub fn ack(&mut self, out: &mut Vec<u8>, ack: &Ack) {
        let Ack { generation, number, stamp_us } = *ack;
        let payload =
            Payload { generation: generation.into(), number: number.into(), stamp_us: stamp_us.into() };
        self.section(out, SectionKind::Ack, &[], |out| out.extend_from_slice(payload.as_bytes()));
    }
}
