//! The standby is ready for base pages.

use std::fmt;

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
    /// With what the standby takes strays: frames that reach the primary's host when the guest is gone from there. It
    /// takes them as UDP datagrams, at the port of the same number as that of this connection. `None` if it takes none.
    pub strays: Option<StrayKey>,
}

/// What seals strays: a secret of the two ends of a connection.
#[derive(Clone, PartialEq, Eq)]
pub struct StrayKey(pub [u8; KEY]);

impl fmt::Debug for StrayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StrayKey(..)")
    }
}

/// Bytes of a [`StrayKey`].
const KEY: usize = 32;

/// The first version of the payload that has the version of the stream.
const WITH_VERSION: u16 = 2;

/// The host's name follows as a text, the version of the stream, and, as far as there is something to say, one byte: 1 if
/// the standby's memory is of the moment that the primary named (an older primary has named none); and the key for
/// strays.
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
        let (stream, holds, strays) = if version >= WITH_VERSION {
            let number = fields.fixed::<U32>()?.get();
            let stream = ProtocolVersion::from_wire(number).ok_or_else(|| {
                fields.malformed("a version of the stream that was not offered", number.into())
            })?;
            let holds = fields.len() > 0 && *fields.fixed::<u8>()? == 1;
            // Fewer bytes are no key, whatever they are: without one nothing is lost but the help.
            let strays = if fields.len() >= KEY { Some(StrayKey(*fields.fixed()?)) } else { None };
            fields.skip_later();
            (stream, holds, strays)
        } else {
            fields.end()?;
            (ProtocolVersion::V2, false, None)
        };
        let (generation, dead_after_us) = (head.generation.get(), head.dead_after_us.get());
        Ok(Self { generation, dead_after_us, host, version: stream, holds, strays })
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
                let says_holds = accept.holds || accept.strays.is_some();
                out.extend(says_holds.then_some(u8::from(accept.holds)));
                out.extend(accept.strays.iter().flat_map(|key| key.0));
            }
        });
        self.speak(accept.version);
        Ok(())
    }
}
