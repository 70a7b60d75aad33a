//! What comes from the other host. Checksums are made right where a fuzzer would never get past them.

use outlive_epoch::{
    Expect, GfnRange, Incoming, IncomingLimits, Layout, Message, Peer, Section, SectionHeader, SectionKind,
    SectionReader,
};

/// The bytes of a connection as they come.
pub fn stream(data: &[u8]) {
    let Some((&peer, mut bytes)) = data.split_first() else { return };
    let mut reader = SectionReader::new(if peer & 1 == 0 { Peer::Primary } else { Peer::Standby });
    if reader.read_preface(&mut bytes).is_err() {
        return;
    }
    while let Ok(section) = reader.read_section(&mut bytes) {
        let _ = Message::parse(&section);
    }
}

/// One payload, of any kind and in each of its versions.
pub fn message(data: &[u8]) {
    let Some((&[kind, version], payload)) = data.split_first_chunk::<2>() else { return };
    let kind = SectionKind::ALL[usize::from(kind) % SectionKind::ALL.len()];
    let versions = kind.version() - kind.oldest_version() + 1;
    let version = kind.oldest_version() + u16::from(version) % versions;
    if let Ok(message) = Message::parse_payload(kind, version, payload) {
        assert_eq!(message.kind(), kind, "a payload is of its section's kind");
    }
}

/// Sections of a checkpoint, each as kind, version, two bytes of length and its payload. The connection's own
/// checksums are right. Only the end of a checkpoint must know the sum of all that came before.
pub fn incoming(data: &[u8]) {
    let limits =
        IncomingLimits { max_pages: 64, max_state_bytes: 4096, max_state_sections: 8, max_disk_bytes: 4096 };
    let Ok(layout) = Layout::new(vec![GfnRange { start: 0, pages: 64 }]) else { return };
    let mut incoming = Incoming::new(limits, layout, 1).expect("a little memory").with_disks(vec![8192, 0]);
    let mut rest = data;
    for sequence in 0.. {
        let Some((&[kind, version, low, high], after)) = rest.split_first_chunk::<4>() else { break };
        let kind = SectionKind::ALL[usize::from(kind) % SectionKind::ALL.len()];
        let version =
            kind.oldest_version() + u16::from(version) % (kind.version() - kind.oldest_version() + 1);
        let (payload, after) = after.split_at(after.len().min(u16::from_le_bytes([low, high]).into()));
        rest = after;
        let header = SectionHeader {
            kind,
            version,
            length: payload.len() as u32,
            payload_crc: crc32fast::hash(payload),
            sequence,
        };
        let Ok(header) = SectionHeader::parse(&header.encode()) else { continue };
        let section = Section::new(header, payload).expect("its checksum is right");
        let Ok(message) = Message::parse(&section) else { continue };
        if incoming.push(&section, &message).is_err() {
            incoming.reset(if low & 1 == 0 { Expect::Base } else { Expect::Number(2) });
        }
    }
}
