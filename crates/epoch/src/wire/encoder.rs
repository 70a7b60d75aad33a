//! Writes sections. The page bytes themselves are never copied: the encoder appends everything in front of
//! them to the caller's buffer, and the sender hands both to one `writev`.
//!
//! Each message's method is in the message's file.

use super::error::EncodeError;
use super::kind::SectionKind;
use super::open::Open;
use super::section::{HEADER_LEN, SectionHeader};
use super::version::ProtocolVersion;

/// The sending half of a connection: numbers the sections and keeps the totals and the chain of the open
/// checkpoint.
///
/// The bytes must reach the link in the order of the calls, so one thread owns the encoder and the socket.
/// Each call appends to `out`; with enough capacity (64 + 8 bytes per page are ample for a `Pages` section)
/// none allocates. Calls whose names end in `_head` append everything but the data, which the caller must
/// send right behind.
pub struct Encoder {
    stream: ProtocolVersion,
    sequence: u64,
    pub(super) open: Option<Open>,
    /// A payload that may turn out to be too long is put together here.
    pub(super) scratch: Vec<u8>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self::speaking(ProtocolVersion::INTRODUCTION)
    }
}

impl Encoder {
    /// The encoder of a new connection, in the version of the introduction.
    pub fn new() -> Self {
        Self::default()
    }

    /// The encoder of a new connection, in this version. The preface must name the same version.
    pub fn speaking(stream: ProtocolVersion) -> Self {
        Self { stream, sequence: 0, open: None, scratch: Vec::new() }
    }

    /// Switches to the version that was agreed on, outside a checkpoint.
    pub fn speak(&mut self, stream: ProtocolVersion) {
        debug_assert!(self.open.is_none());
        self.stream = stream;
    }

    /// The version that it writes.
    pub fn stream(&self) -> ProtocolVersion {
        self.stream
    }

    /// The version in which it writes payloads of a kind.
    pub(super) fn version_of(&self, kind: SectionKind) -> u16 {
        kind.version_in(self.stream)
    }

    /// Whether a checkpoint has been begun and not ended.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The open checkpoint; `mistake` names what is not allowed without one.
    pub(super) fn open(&mut self, mistake: &'static str) -> Result<&mut Open, EncodeError> {
        self.open.as_mut().ok_or(EncodeError::Order(mistake))
    }

    /// `mistake` names what is not allowed inside a checkpoint.
    pub(super) fn outside_checkpoint(&self, mistake: &'static str) -> Result<(), EncodeError> {
        if self.open.is_some() { Err(EncodeError::Order(mistake)) } else { Ok(()) }
    }

    /// Appends a section of the open checkpoint, as [`section`](Self::section).
    pub(super) fn chained(
        &mut self,
        out: &mut Vec<u8>,
        kind: SectionKind,
        data: &[u8],
        put: impl FnOnce(&mut Vec<u8>),
    ) {
        let header = self.section(out, kind, data, put);
        if let Some(open) = &mut self.open {
            open.chain.update(&header.chained());
        }
    }

    /// Appends a section: its header, what `put` appends, and `data`, which is counted and summed but not
    /// appended.
    pub(super) fn section(
        &mut self,
        out: &mut Vec<u8>,
        kind: SectionKind,
        data: &[u8],
        put: impl FnOnce(&mut Vec<u8>),
    ) -> SectionHeader {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_LEN]);
        put(out);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&out[start + HEADER_LEN..]);
        crc.update(data);
        let length = out.len() - start - HEADER_LEN + data.len();
        debug_assert!(length <= kind.limit() as usize);
        let payload_crc = crc.finalize();
        let (version, sequence) = (self.version_of(kind), self.sequence);
        let header = SectionHeader { kind, version, length: length as u32, payload_crc, sequence };
        out[start..start + HEADER_LEN].copy_from_slice(&header.encode());
        self.sequence += 1;
        header
    }
}

/// Appends a text behind its length. The length must have been checked.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

pub(super) fn check_length(field: &'static str, length: usize, limit: usize) -> Result<(), EncodeError> {
    if length > limit { Err(EncodeError::TooLong { field, length, limit }) } else { Ok(()) }
}
