//! Prefaces and headers that must not be believed, and a stream that comes in pieces.

use std::io::{self, Read};

use outlive_epoch::{Message, Peer, Preface, ReadError, SectionKind, SectionReader, WireError};

use super::header;

fn read(peer: Peer, stream: &[u8]) -> WireError {
    let mut source = stream;
    match SectionReader::new(peer).read_section(&mut source) {
        Err(ReadError::Wire(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_section_of_the_wrong_side_kind_version_or_length_is_refused() {
    let ack = header(SectionKind::Ack, &[0; 24], 0);
    assert_eq!(
        read(Peer::Primary, &ack),
        WireError::WrongSender { kind: SectionKind::Ack, peer: Peer::Primary }
    );
    let late = header(SectionKind::Heartbeat, &[0; 8], 1);
    assert_eq!(read(Peer::Primary, &late), WireError::Sequence { expected: 0, found: 1 });
    let resum = |mut bytes: Vec<u8>, at: usize, value: &[u8]| {
        bytes[at..at + value.len()].copy_from_slice(value);
        let crc = crc32fast::hash(&bytes[..28]);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    };
    let beat = header(SectionKind::Heartbeat, &[0; 8], 0);
    let unknown = resum(beat.clone(), 4, &999u16.to_le_bytes());
    assert_eq!(read(Peer::Primary, &unknown), WireError::UnknownKind { kind: 999 });
    let newer = resum(beat.clone(), 6, &2u16.to_le_bytes());
    let error = read(Peer::Primary, &newer);
    assert_eq!(
        error,
        WireError::UnknownVersion { kind: SectionKind::Heartbeat, version: 2, oldest: 1, newest: 1 }
    );
    let long = resum(beat, 8, &u32::MAX.to_le_bytes());
    let error = read(Peer::Primary, &long);
    assert_eq!(error, WireError::TooLong { kind: SectionKind::Heartbeat, length: u32::MAX, limit: 8 });
}

#[test]
fn another_protocol_or_version_is_named() {
    let mut reader = SectionReader::new(Peer::Primary);
    let error = reader.read_preface(&mut &b"GET / HTTP/1.1\r\n\r\n"[..]).unwrap_err();
    assert!(error.to_string().starts_with("the peer does not speak the Outlive protocol"), "{error}");
    let mut newer = Preface::CURRENT.encode();
    newer[8] = 9;
    let crc = crc32fast::hash(&newer[..12]);
    newer[12..].copy_from_slice(&crc.to_le_bytes());
    let error = SectionReader::new(Peer::Primary).read_preface(&mut &newer[..]).unwrap_err();
    let words = "version 9 of the protocol; this release reads 2 to 3: upgrade Outlive on the older host";
    assert!(error.to_string().contains(words), "{error}");
}

/// A stream that comes in single bytes, with a time-out after each.
struct Trickle<'a>(&'a [u8], bool);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.0.read(&mut buffer[..1])
    }
}

#[test]
fn a_time_out_loses_no_byte() {
    let (stream, _) = crate::common::small_stream();
    let mut source = Trickle(&stream, false);
    let mut reader = SectionReader::new(Peer::Primary);
    while let Err(error) = reader.read_preface(&mut source) {
        assert!(error.is_retry());
    }
    let mut sections = 0;
    loop {
        match reader.read_section(&mut source) {
            Ok(section) => {
                assert!(Message::parse(&section).is_ok());
                sections += 1;
            }
            Err(ReadError::Closed) => break,
            Err(error) => assert!(error.is_retry(), "{error}"),
        }
    }
    assert_eq!((sections, reader.bytes_received()), (32, stream.len() as u64));
}
