//! The connection preface.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::WireError;
use super::version::ProtocolVersion;

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

/// The first 16 bytes that each side sends: magic (8), protocol version (4), CRC-32 of those 12 bytes (4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preface {
    /// The version in which this side introduces itself.
    pub version: ProtocolVersion,
}

impl Preface {
    /// The preface of this release, unless the other side is known to be older.
    pub const CURRENT: Self = Self { version: ProtocolVersion::INTRODUCTION };

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
        let (oldest, newest) = (ProtocolVersion::OLDEST as u32, ProtocolVersion::INTRODUCTION as u32);
        match ProtocolVersion::from_wire(found).filter(|version| version.introduction() == *version) {
            Some(version) => Ok(Self { version }),
            None => Err(WireError::UnknownProtocol { found, oldest, newest }),
        }
    }
}
