//! The section: a header of fixed size and a payload. The kind bounds the payload's length.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::WireError;
use super::kind::SectionKind;

/// The header as it precedes a payload.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    marker: [u8; 4],
    kind: U16,
    version: U16,
    length: U32,
    payload_crc: U32,
    sequence: U64,
    zero: U32,
    crc: U32,
}

/// Length of a section header in bytes.
pub const HEADER_LEN: usize = size_of::<RawHeader>();
/// Bytes of a header in front of its own checksum.
const CHECKED_LEN: usize = HEADER_LEN - size_of::<U32>();

const MARKER: [u8; 4] = *b"oSEC";

/// The header of a section.
///
/// | bytes | field |
/// |---|---|
/// | 0..4 | marker `oSEC` |
/// | 4..6 | kind |
/// | 6..8 | version of the payload |
/// | 8..12 | length of the payload |
/// | 12..16 | CRC-32 of the payload |
/// | 16..24 | sequence number: 0, 1, 2 ... in each direction of a connection |
/// | 24..28 | zero |
/// | 28..32 | CRC-32 of bytes 0..28 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionHeader {
    /// What the payload is.
    pub kind: SectionKind,
    /// Version of the payload, one that this release reads.
    pub version: u16,
    /// Bytes of payload.
    pub length: u32,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
    /// Position in the stream.
    pub sequence: u64,
}

impl SectionHeader {
    /// The bytes of the header.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut raw = RawHeader {
            marker: MARKER,
            kind: U16::new(self.kind as u16),
            version: U16::new(self.version),
            length: U32::new(self.length),
            payload_crc: U32::new(self.payload_crc),
            sequence: U64::new(self.sequence),
            zero: U32::ZERO,
            crc: U32::ZERO,
        };
        raw.crc = U32::new(crc32fast::hash(&raw.as_bytes()[..CHECKED_LEN]));
        zerocopy::transmute!(raw)
    }

    /// What the chain of a checkpoint covers: the header without its own checksum. With it the chain would
    /// cover nothing, since the CRC over any bytes and their CRC is always the same.
    pub(crate) fn chained(self) -> [u8; CHECKED_LEN] {
        let mut bytes = [0; CHECKED_LEN];
        bytes.copy_from_slice(&self.encode()[..CHECKED_LEN]);
        bytes
    }

    /// Checks a header: marker, own checksum, kind, version, length, in this order.
    ///
    /// # Errors
    /// The first of these that is wrong.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.marker != MARKER {
            return Err(WireError::BadMarker { found: u32::from_le_bytes(raw.marker) });
        }
        let (stored, computed) = (raw.crc.get(), crc32fast::hash(&bytes[..CHECKED_LEN]));
        if stored != computed {
            return Err(WireError::HeaderChecksum { stored, computed });
        }
        let number = raw.kind.get();
        let kind = SectionKind::from_wire(number).ok_or(WireError::UnknownKind { kind: number })?;
        let version = raw.version.get();
        if !(kind.oldest_version()..=kind.version()).contains(&version) {
            let (oldest, newest) = (kind.oldest_version(), kind.version());
            return Err(WireError::UnknownVersion { kind, version, oldest, newest });
        }
        let length = raw.length.get();
        if length > kind.limit() {
            return Err(WireError::TooLong { kind, length, limit: kind.limit() });
        }
        if raw.zero != U32::ZERO {
            return Err(WireError::Malformed {
                kind,
                what: "reserved header field is not zero",
                value: raw.zero.get().into(),
            });
        }
        Ok(Self { kind, version, length, payload_crc: raw.payload_crc.get(), sequence: raw.sequence.get() })
    }
}

/// A section whose header, sequence, sender and checksums are right. Its payload is not yet parsed.
#[derive(Debug, Clone, Copy)]
pub struct Section<'a> {
    pub(crate) header: SectionHeader,
    pub(crate) payload: &'a [u8],
}

impl<'a> Section<'a> {
    /// Joins a header and a payload that were read separately.
    ///
    /// # Errors
    /// [`WireError::PayloadChecksum`], or [`WireError::Malformed`] if the length does not match.
    pub fn new(header: SectionHeader, payload: &'a [u8]) -> Result<Self, WireError> {
        let kind = header.kind;
        if payload.len() != header.length as usize {
            return Err(WireError::Malformed {
                kind,
                what: "payload of another length",
                value: payload.len() as u64,
            });
        }
        let computed = crc32fast::hash(payload);
        if computed != header.payload_crc {
            return Err(WireError::PayloadChecksum { kind, stored: header.payload_crc, computed });
        }
        Ok(Self { header, payload })
    }

    /// The header.
    pub fn header(&self) -> SectionHeader {
        self.header
    }

    /// What the section is.
    pub fn kind(&self) -> SectionKind {
        self.header.kind
    }

    /// The bytes after the header.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}
