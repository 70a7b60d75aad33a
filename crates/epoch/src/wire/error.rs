//! What can be wrong with bytes from the wire.

use std::io;

use super::kind::{Peer, SectionKind};

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
