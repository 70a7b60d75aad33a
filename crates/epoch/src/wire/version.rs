//! The connection preface and the versions of the protocol.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::WireError;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawPreface {
    magic: [u8; 8],
    version: U32,
    crc: U32,
}

/// Length of the preface in bytes.
pub const PREFACE_LEN: usize = size_of::<RawPreface>();
/// Bytes of a preface in front of its checksum.
const CHECKED_LEN: usize = PREFACE_LEN - size_of::<U32>();

const MAGIC: [u8; 8] = *b"OUTLIVE\0";

/// Versions of the stream, with one line of history each.
///
/// The policy:
///
/// * Frozen forever, in every version: the preface, the section header, the numbers of the section kinds,
///   and the payload of `Refuse` version 1. So any two releases can at least tell each other, in words, why
///   they do not fit.
/// * Whoever changes the meaning of a stream as a whole (order, who speaks when) adds a variant here. Whoever
///   changes one payload raises the version of that kind in
///   [`SectionKind::version`](super::SectionKind::version) and keeps the parser of the old one while the last
///   release that wrote it is supported.
/// * A section's version is between that in the oldest stream that is read and the current one
///   ([`SectionKind::version_in`](super::SectionKind::version_in)); the parser is given the version that it
///   found.
/// * A reader takes the versions in this enum; an encoder writes [`CURRENT`](Self::CURRENT), or the version
///   that it is told to. The two sides do not agree on one yet: each writes its current one, so a pair of two
///   releases of different versions is refused with words, by the older side.
/// * Unknown is refused, never skipped: a skipped section could be a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum ProtocolVersion {
    /// 2: devices in the introduction, disk writes in checkpoints, base synchronisation of disks. Version 1
    /// (base pages, checkpoints of raw and zero pages and state sections, heartbeats with stamps, orderly
    /// end) was in no release.
    V2 = 2,
    /// 3: pages say how long their data is, so that a codec can be added whose data has not always the same
    /// length. GFNs have 40 bits. Everything else is as in 2.
    V3 = 3,
}

impl ProtocolVersion {
    /// The version that this release writes.
    pub const CURRENT: Self = Self::V3;
    /// The oldest version that this release reads, and that an [`Encoder`](super::Encoder) can be told to
    /// write.
    pub const OLDEST: Self = Self::V2;

    /// The version with this number, if this release understands it.
    pub fn from_wire(number: u32) -> Option<Self> {
        match number {
            2 => Some(Self::V2),
            3 => Some(Self::V3),
            _ => None,
        }
    }
}

/// The first 16 bytes that each side sends: magic (8), protocol version (4), CRC-32 of those 12 bytes (4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preface {
    /// The version of all sections that follow from this side.
    pub version: ProtocolVersion,
}

impl Preface {
    /// The preface of this release.
    pub const CURRENT: Self = Self { version: ProtocolVersion::CURRENT };

    /// The bytes to send.
    pub fn encode(self) -> [u8; PREFACE_LEN] {
        let mut raw = RawPreface { magic: MAGIC, version: U32::new(self.version as u32), crc: U32::ZERO };
        raw.crc = U32::new(crc32fast::hash(&raw.as_bytes()[..CHECKED_LEN]));
        zerocopy::transmute!(raw)
    }

    /// Checks the 16 bytes of the other side.
    ///
    /// # Errors
    /// [`WireError::NotOutlive`], [`WireError::PrefaceChecksum`] or [`WireError::UnknownProtocol`].
    pub fn parse(bytes: &[u8; PREFACE_LEN]) -> Result<Self, WireError> {
        let raw: RawPreface = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(WireError::NotOutlive { found: raw.magic });
        }
        let (stored, computed) = (raw.crc.get(), crc32fast::hash(&bytes[..CHECKED_LEN]));
        if stored != computed {
            return Err(WireError::PrefaceChecksum { stored, computed });
        }
        let found = raw.version.get();
        let version = ProtocolVersion::from_wire(found)
            .ok_or(WireError::UnknownProtocol { found, newest: ProtocolVersion::CURRENT as u32 })?;
        Ok(Self { version })
    }
}
