//! The standby is ready for base pages.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{Encoder, check_length, put_text};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use super::version::ProtocolVersion;
use crate::image::limits::MAX_TEXT;

/// The standby is ready for base pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The generation in which the VM runs, as the primary stated it.
    pub generation: u64,
    /// The silence, in microseconds, after which either side is taken for dead from now on: the larger of the
    /// two configured ones.
    pub dead_after_us: u64,
    /// The standby host's name, at most [`MAX_TEXT`] bytes.
    pub host: String,
    /// The version of the stream that both sides write from now on. In an `Accept` of version 1 it is the
    /// version of the preface, 2.
    pub version: ProtocolVersion,
    /// Whether the standby's memory is of the moment that the primary named
    /// ([`Hello::since`](super::Hello::since)). Otherwise it is zero.
    pub holds: bool,
}

/// The first version of the payload that has the version of the stream.
const WITH_VERSION: u16 = 2;

/// The host's name follows as a text, the version of the stream, and, if it is not 0, one byte: 1 if the standby's memory
/// is of the moment that the primary named. An older primary has named none.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    generation: U64,
    dead_after_us: U64,
}

impl Accept {
    pub(crate) fn parse(version: u16, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::Accept, payload);
        let head: &Head = fields.fixed()?;
        let host = fields.text(MAX_TEXT)?;
        let (stream, holds) = if version >= WITH_VERSION {
            let number = fields.fixed::<U32>()?.get();
            let stream = ProtocolVersion::from_wire(number).ok_or_else(|| {
                fields.malformed("a version of the stream that was not offered", number.into())
            })?;
            let holds = fields.len() > 0 && *fields.fixed::<u8>()? == 1;
            fields.skip_later();
            (stream, holds)
        } else {
            fields.end()?;
            (ProtocolVersion::V2, false)
        };
        let (generation, dead_after_us) = (head.generation.get(), head.dead_after_us.get());
        Ok(Self { generation, dead_after_us, host, version: stream, holds })
    }
}

impl Encoder {
    /// Appends [`Accept`]. Everything after it is in the version that it names.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`] for the host's name.
    pub fn accept(&mut self, out: &mut Vec<u8>, accept: &Accept) -> Result<(), EncodeError> {
        check_length("the host's name", accept.host.len(), MAX_TEXT)?;
        let head = Head { generation: accept.generation.into(), dead_after_us: accept.dead_after_us.into() };
        let version = self.version_of(SectionKind::Accept);
        self.section(out, SectionKind::Accept, &[], |out| {
            out.extend_from_slice(head.as_bytes());
            put_text(out, &accept.host);
            if version >= WITH_VERSION {
                out.extend_from_slice(U32::new(accept.version as u32).as_bytes());
                out.extend(accept.holds.then_some(1));
            }
        });
        self.speak(accept.version);
        Ok(())
    }
}
