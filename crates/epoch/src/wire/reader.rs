//! Reads sections from a stream into one buffer that never grows.

use std::io::{ErrorKind, Read};

use super::error::{ReadError, WireError};
use super::kind::Peer;
use super::preface::{PREFACE_LEN, Preface};
use super::section::{HEADER_LEN, Section, SectionHeader};
use super::version::ProtocolVersion;
use crate::image::limits::MAX_PAYLOAD;

/// How far one read may run ahead of the section that is being collected, so that many small sections cost
/// one system call.
const READ_AHEAD: usize = 256 * 1024;
const BUFFER: usize = HEADER_LEN + MAX_PAYLOAD + READ_AHEAD;

/// The receiving half of a connection.
///
/// It works on blocking sockets, on sockets with a timeout and on non-blocking ones. After an error for which
/// [`ReadError::is_retry`] holds, the same call continues where it stopped. After any other error the reader
/// is spent.
#[derive(Debug)]
pub struct SectionReader {
    buffer: Box<[u8]>,
    /// The bytes that are not yet consumed are `buffer[start..end]`.
    start: usize,
    end: usize,
    peer: Peer,
    /// Newer versions are refused.
    newest: ProtocolVersion,
    next_sequence: u64,
    received: u64,
}

impl SectionReader {
    /// A reader of what `peer` sends. Its buffer (1.3 MiB) is the only allocation that it ever makes.
    pub fn new(peer: Peer) -> Self {
        Self::up_to(peer, ProtocolVersion::CURRENT)
    }

    /// The same, as a release whose newest version is this one.
    pub fn up_to(peer: Peer, newest: ProtocolVersion) -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            peer,
            newest,
            next_sequence: 0,
            received: 0,
        }
    }

    /// Both sides have agreed on this version: nothing newer may come. Older sections may still come, which
    /// the other side had written before it knew; each section states its version.
    pub fn agree(&mut self, stream: ProtocolVersion) {
        self.newest = stream;
    }

    /// Bytes received on this connection so far. It grows while a long section arrives, so it tells a slow
    /// link from a dead one.
    pub fn bytes_received(&self) -> u64 {
        self.received
    }

    /// Reads the preface: the version in which the peer introduces itself. Call it once, first.
    ///
    /// # Errors
    /// See [`ReadError`]; a peer of another protocol or version is a [`ReadError::Wire`].
    pub fn read_preface(&mut self, stream: &mut impl Read) -> Result<ProtocolVersion, ReadError> {
        self.fill(stream, PREFACE_LEN)?;
        let mut bytes = [0; PREFACE_LEN];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + PREFACE_LEN]);
        self.start += PREFACE_LEN;
        let Preface { version } = Preface::parse(&bytes)?;
        if version > self.newest {
            let (oldest, newest) = (ProtocolVersion::OLDEST as u32, self.newest as u32);
            return Err(WireError::UnknownProtocol { found: version as u32, oldest, newest }.into());
        }
        Ok(version)
    }

    /// Reads the next section and checks everything except the fields of its payload.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read_section(&mut self, stream: &mut impl Read) -> Result<Section<'_>, ReadError> {
        self.fill(stream, HEADER_LEN)?;
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + HEADER_LEN]);
        // Parsed again if a short read made the caller come back: that costs 28 bytes of checksum, and no
        // state is kept.
        let header = SectionHeader::parse(&bytes)?;
        let SectionHeader { kind, version, .. } = header;
        if version > kind.version_in(self.newest) {
            let (oldest, newest) = (kind.oldest_version(), kind.version_in(self.newest));
            return Err(WireError::UnknownVersion { kind, version, oldest, newest }.into());
        }
        if !header.kind.may_come_from(self.peer) {
            return Err(WireError::WrongSender { kind: header.kind, peer: self.peer }.into());
        }
        if header.sequence != self.next_sequence {
            return Err(WireError::Sequence { expected: self.next_sequence, found: header.sequence }.into());
        }
        let length = HEADER_LEN + header.length as usize;
        self.fill(stream, length)?;
        self.next_sequence += 1;
        let payload = self.start + HEADER_LEN..self.start + length;
        self.start += length;
        Ok(Section::new(header, &self.buffer[payload])?)
    }

    /// Makes at least `wanted` bytes available at `start`. `wanted` has been checked against the limits, so
    /// it fits.
    fn fill(&mut self, stream: &mut impl Read, wanted: usize) -> Result<(), ReadError> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        if self.start + wanted > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < wanted {
            match stream.read(&mut self.buffer[self.end..]) {
                Ok(0) if self.start == self.end => return Err(ReadError::Closed),
                Ok(0) => return Err(ReadError::Truncated { missing: wanted - (self.end - self.start) }),
                Ok(count) => {
                    self.end += count;
                    self.received += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(ReadError::Io(error)),
            }
        }
        Ok(())
    }
}
