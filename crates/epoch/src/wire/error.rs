//! What can be wrong with bytes from the wire, and with what a caller wants to write.

use std::io;

use super::kind::{Peer, SectionKind};
use crate::codec::PageCodec;
use crate::image::limits::MAX_PAGES_PER_SECTION;

/// Bytes from the other side that this release does not accept. The connection is of no further use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first bytes do not belong to this protocol (a port scanner, a browser, another program).
    #[error("the peer does not speak the Outlive protocol: it began with {found:02x?}")]
    NotOutlive {
        /// The first 8 bytes.
        found: [u8; 8],
    },
    /// The preface is damaged.
    #[error("preface checksum is {stored:#010x}, computed {computed:#010x}")]
    PrefaceChecksum {
        /// Checksum in the preface.
        stored: u32,
        /// Checksum of the bytes received.
        computed: u32,
    },
    /// A valid preface of a version that this release does not know.
    #[error(
        "the peer introduces itself in version {found} of the protocol; this release reads {oldest} to {newest}: upgrade Outlive on the older host"
    )]
    UnknownProtocol {
        /// The peer's version.
        found: u32,
        /// The oldest version known here.
        oldest: u32,
        /// The newest version known here.
        newest: u32,
    },
    /// No section starts where one must start.
    #[error("section marker is {found:#010x}: the stream is damaged")]
    BadMarker {
        /// The four bytes found, little-endian.
        found: u32,
    },
    /// The header is damaged; its fields were not used.
    #[error("section header checksum is {stored:#010x}, computed {computed:#010x}")]
    HeaderChecksum {
        /// Checksum in the header.
        stored: u32,
        /// Checksum of the header received.
        computed: u32,
    },
    /// A section of a kind that this release does not know.
    #[error("section of unknown kind {kind:#06x}")]
    UnknownKind {
        /// The kind's number.
        kind: u16,
    },
    /// A known kind in a version that this release does not know.
    #[error(
        "section {kind:?} has version {version}; this side reads {oldest} to {newest}: upgrade Outlive on the older host"
    )]
    UnknownVersion {
        /// The section's kind.
        kind: SectionKind,
        /// Version found.
        version: u16,
        /// Oldest version read.
        oldest: u16,
        /// Newest version read.
        newest: u16,
    },
    /// Longer than the limit of its kind.
    #[error("section {kind:?} says it has {length} bytes; the limit is {limit}")]
    TooLong {
        /// The section's kind.
        kind: SectionKind,
        /// Length in the header.
        length: u32,
        /// The limit.
        limit: u32,
    },
    /// A section was lost, doubled or reordered.
    #[error("section number {found} where number {expected} was due")]
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number found.
        found: u64,
    },
    /// The payload is damaged.
    #[error("section {kind:?}: payload checksum is {stored:#010x}, computed {computed:#010x}")]
    PayloadChecksum {
        /// The section's kind.
        kind: SectionKind,
        /// Checksum in the header.
        stored: u32,
        /// Checksum of the payload received.
        computed: u32,
    },
    /// A section that the other side never sends.
    #[error("section {kind:?} is never sent by a {peer}")]
    WrongSender {
        /// The section's kind.
        kind: SectionKind,
        /// Who sent it.
        peer: Peer,
    },
    /// The payload is whole, but its fields make no sense.
    #[error("section {kind:?}: {what} ({value:#x})")]
    Malformed {
        /// The section's kind.
        kind: SectionKind,
        /// What is wrong.
        what: &'static str,
        /// The value that is wrong.
        value: u64,
    },
}

/// Why no section could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The stream failed. After `WouldBlock` and `TimedOut` the same call may be repeated: bytes that had
    /// already arrived are not lost.
    #[error("reading from the link failed: {0}")]
    Io(#[from] io::Error),
    /// The peer closed the connection between two sections.
    #[error("the peer closed the link")]
    Closed,
    /// The connection ended inside a section.
    #[error("the link ended inside a section, {missing} bytes short")]
    Truncated {
        /// Bytes that were still due (of the header, if it had not arrived whole).
        missing: usize,
    },
    /// The bytes themselves are wrong.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl ReadError {
    /// Whether the same read may simply be repeated.
    pub fn is_retry(&self) -> bool {
        matches!(self, Self::Io(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }
}

/// A caller's mistake. Nothing was appended and the stream can continue.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A text or a state section beyond its limit.
    #[error("{field} has {length} bytes; the limit is {limit}")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// More pages than a section may have.
    #[error("{0} pages in one section; the limit is {MAX_PAGES_PER_SECTION}")]
    TooManyPages(usize),
    /// A page written in a way that the peer, or the kind of section, does not support.
    #[error("a page written as {codec:?} in version {version} of {kind:?}")]
    Codec {
        /// How it is written.
        codec: PageCodec,
        /// The kind of section.
        kind: SectionKind,
        /// Its version.
        version: u16,
    },
    /// Entries and data do not belong together.
    #[error("the entries need {expected} bytes of data, not {found}")]
    DataLength {
        /// Bytes that the entries need.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// Pages, state or an end without a checkpoint, or a checkpoint inside another one.
    #[error("{0}")]
    Order(&'static str),
    /// More or less was sent than the checkpoint's beginning said.
    #[error("checkpoint {number} was announced with {announced} {what} and has {sent}")]
    Totals {
        /// The checkpoint's number.
        number: u64,
        /// Pages, bytes of state, or bytes of disk records.
        what: &'static str,
        /// In the beginning.
        announced: u32,
        /// Sent.
        sent: u32,
    },
}
