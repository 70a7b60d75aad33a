//! The section: a header of fixed size and a payload whose length is bounded by its kind.

use std::fmt;

use crate::disk::{DISK_SUM_LEN, MAX_SUMS, WINDOW_FIXED};
use crate::error::WireError;
use crate::pages::{MAX_PAGES_PER_SECTION, PAGE_SIZE, PAGES_FIXED};

/// Length of a section header in bytes.
pub const HEADER_LEN: usize = 32;
/// Most bytes of one state section (without its own fixed fields).
pub const MAX_STATE_SECTION: usize = 256 * 1024;
/// Most bytes of any payload: a `Pages` section with as many raw pages as it may have.
pub const MAX_PAYLOAD: usize = PAGES_FIXED + MAX_PAGES_PER_SECTION * (8 + PAGE_SIZE);

/// Fixed fields before the bytes of a state section.
pub(crate) const STATE_FIXED: usize = 16;

const MARKER: u32 = u32::from_le_bytes(*b"oSEC");

/// Who sent a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The host where the VM runs.
    Primary,
    /// The host that can take over.
    Standby,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Standby => "standby",
        })
    }
}

/// What a section is. The numbers are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// The primary introduces itself and its VM.
    Hello = 1,
    /// The standby is ready for base pages.
    Accept = 2,
    /// The standby says no, and why.
    Refuse = 3,
    /// Pages of the base synchronisation; applied at once.
    BasePages = 4,
    /// A checkpoint begins.
    CheckpointBegin = 5,
    /// Pages of the open checkpoint.
    Pages = 6,
    /// One state section of the open checkpoint.
    State = 7,
    /// The open checkpoint is complete.
    CheckpointEnd = 8,
    /// The standby holds all of a checkpoint.
    Ack = 9,
    /// The sender lives.
    Heartbeat = 10,
    /// The VM has ended in order: do not take over.
    End = 11,
    /// The standby leaves in order and will not take over.
    Leave = 12,
    /// Writes to disks in the open checkpoint, in their order.
    DiskWrites = 13,
    /// Sums of a part of a disk, for the base synchronisation.
    DiskSums = 14,
    /// Which chunks of that part the standby wants.
    DiskWant = 15,
    /// Chunks of a disk of the base synchronisation; written at once.
    DiskBlocks = 16,
}

impl Kind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [Self; 16] = [
        Self::Hello,
        Self::Accept,
        Self::Refuse,
        Self::BasePages,
        Self::CheckpointBegin,
        Self::Pages,
        Self::State,
        Self::CheckpointEnd,
        Self::Ack,
        Self::Heartbeat,
        Self::End,
        Self::Leave,
        Self::DiskWrites,
        Self::DiskSums,
        Self::DiskWant,
        Self::DiskBlocks,
    ];

    /// The kind with this number.
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The version of the payload that this release reads and writes.
    pub fn version(self) -> u16 {
        match self {
            // 2: devices; totals of disk writes.
            Self::Hello | Self::CheckpointBegin | Self::CheckpointEnd => 2,
            _ => 1,
        }
    }

    /// Most bytes of the payload.
    pub fn limit(self) -> u32 {
        let bytes = match self {
            Self::Hello => 2048,
            Self::Accept => 256,
            Self::Refuse => 512,
            Self::BasePages | Self::Pages | Self::DiskWrites | Self::DiskBlocks => MAX_PAYLOAD,
            Self::CheckpointBegin | Self::CheckpointEnd => 32,
            Self::State => STATE_FIXED + MAX_STATE_SECTION,
            Self::Ack => 24,
            Self::Heartbeat => 8,
            Self::End | Self::Leave => 4,
            Self::DiskSums => WINDOW_FIXED + MAX_SUMS * DISK_SUM_LEN,
            Self::DiskWant => WINDOW_FIXED + MAX_SUMS * 2,
        };
        bytes as u32
    }

    /// Whether this side may send it.
    pub fn may_come_from(self, peer: Peer) -> bool {
        match self {
            Self::Heartbeat => true,
            Self::Accept | Self::Refuse | Self::Ack | Self::Leave | Self::DiskWant => peer == Peer::Standby,
            Self::Hello
            | Self::BasePages
            | Self::CheckpointBegin
            | Self::Pages
            | Self::State
            | Self::CheckpointEnd
            | Self::DiskWrites
            | Self::DiskSums
            | Self::DiskBlocks
            | Self::End => peer == Peer::Primary,
        }
    }
}

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
    pub kind: Kind,
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
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MARKER.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.version().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_crc.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// What the chain of a checkpoint covers: the header without its own checksum. With it the chain would
    /// cover nothing, since a CRC over any bytes followed by their CRC is the same for all bytes.
    pub(crate) fn chained(self) -> [u8; HEADER_LEN - 4] {
        let mut bytes = [0; HEADER_LEN - 4];
        bytes.copy_from_slice(&self.encode()[..HEADER_LEN - 4]);
        bytes
    }

    /// Checks a header: marker, own checksum, kind, version, length, in this order.
    ///
    /// # Errors
    /// The first of these that is wrong.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if word(0) != MARKER {
            return Err(WireError::BadMarker { found: word(0) });
        }
        let computed = crc32fast::hash(&bytes[..28]);
        if word(28) != computed {
            return Err(WireError::HeaderChecksum { stored: word(28), computed });
        }
        let kind = Kind::from_wire(half(4)).ok_or(WireError::UnknownKind { kind: half(4) })?;
        if half(6) != kind.version() {
            return Err(WireError::UnknownVersion { kind, version: half(6), known: kind.version() });
        }
        let length = word(8);
        if length > kind.limit() {
            return Err(WireError::TooLong { kind, length, limit: kind.limit() });
        }
        if word(24) != 0 {
            return Err(WireError::Malformed {
                kind,
                what: "reserved header field is not zero",
                value: word(24).into(),
            });
        }
        let sequence = u64::from(word(16)) | u64::from(word(20)) << 32;
        Ok(Self { kind, length, payload_crc: word(12), sequence })
    }
}

/// A section whose header, sequence, sender and checksums are right. Its payload is still to be parsed.
#[derive(Debug, Clone, Copy)]
pub struct Section<'a> {
    pub(crate) header: SectionHeader,
    pub(crate) payload: &'a [u8],
}

impl<'a> Section<'a> {
    /// Joins a header and a payload that were read separately.
    ///
    /// # Errors
    /// [`WireError::PayloadChecksum`], or [`WireError::Malformed`] if the length is another one.
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
    pub fn kind(&self) -> Kind {
        self.header.kind
    }

    /// The bytes after the header.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}
