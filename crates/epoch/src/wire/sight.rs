//! Whether a host sees the arbiter.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::Encoder;
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;

/// What a host knows of its way to the arbiter. It is for people: nobody decides by it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ArbiterSight {
    /// It has not looked yet.
    #[default]
    Unknown,
    /// It cannot reach the arbiter.
    Lost {
        /// Since so many seconds.
        for_s: u32,
    },
    /// It reaches the arbiter.
    Seen,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Payload {
    /// 0: it does not know; 1: it does not; 2: it does.
    sees: u8,
    zero: [u8; 3],
    /// Seconds; 0 unless it does not.
    lost_for: U32,
}

pub(super) const LEN: usize = size_of::<Payload>();

impl ArbiterSight {
    pub(super) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::ArbiterSight, payload);
        let Payload { sees, zero, lost_for } = fields.fixed()?;
        let sight = match sees {
            0 => Self::Unknown,
            1 => Self::Lost { for_s: lost_for.get() },
            2 => Self::Seen,
            _ => return Err(fields.malformed("unknown sight of the arbiter", (*sees).into())),
        };
        fields.reserved(zero)?;
        if *sees != 1 {
            fields.reserved(lost_for.as_bytes())?;
        }
        fields.end()?;
        Ok(sight)
    }
}

impl Encoder {
    /// Appends whether this host sees the arbiter. A standby may from version 7 of the stream on, a primary from version 8.
    ///
    /// # Errors
    /// [`EncodeError::Order`] in an older stream.
    pub fn arbiter_sight(&mut self, out: &mut Vec<u8>, sight: ArbiterSight) -> Result<(), EncodeError> {
        let kind = SectionKind::ArbiterSight;
        if self.version_of(kind) == 0 {
            return Err(EncodeError::Order("a sight of the arbiter in a stream that does not tell of it"));
        }
        let (sees, for_s) = match sight {
            ArbiterSight::Unknown => (0, 0),
            ArbiterSight::Lost { for_s } => (1, for_s),
            ArbiterSight::Seen => (2, 0),
        };
        let payload = Payload { sees, zero: [0; 3], lost_for: for_s.into() };
        self.section(out, kind, &[], |out| out.extend_from_slice(payload.as_bytes()));
        Ok(())
    }
}
