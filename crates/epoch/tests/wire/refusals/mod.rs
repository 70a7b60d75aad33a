//! Every refusal has its own words, and both sides can continue after it.

mod checkpoints;
mod encoding;
mod payloads;
mod sections;

use outlive_epoch::{
    CheckpointBegin, CheckpointFlags, Encoder, Incoming, IncomingError, Message, PAGE_SIZE, PageEntry, Peer,
    SectionHeader, SectionKind, SectionReader,
};

use crate::common::{GENERATION, incoming};

const BASE: CheckpointFlags = CheckpointFlags { base_final: true, end: None, hand_over: false };

const PLAIN: CheckpointFlags = CheckpointFlags { base_final: false, end: None, hand_over: false };

fn begin(number: u64, pages: u32, state_bytes: u32, flags: CheckpointFlags) -> CheckpointBegin {
    CheckpointBegin { generation: GENERATION, number, pages, state_bytes, disk_bytes: 0, flags }
}

/// Pushes all sections of `stream` (without preface) and returns the first error.
fn stage(incoming: &mut Incoming, stream: &[u8]) -> Result<bool, IncomingError> {
    let (mut source, mut reader) = (stream, SectionReader::new(Peer::Primary));
    let mut complete = false;
    while let Ok(section) = reader.read_section(&mut source) {
        let message = Message::parse(&section).unwrap();
        if !matches!(message, Message::Heartbeat { .. }) {
            complete = incoming.push(&section, &message)?;
        }
    }
    Ok(complete)
}

fn staged(write: impl FnOnce(&mut Encoder, &mut Vec<u8>)) -> Result<bool, IncomingError> {
    let mut out = Vec::new();
    write(&mut Encoder::new(), &mut out);
    stage(&mut incoming(), &out)
}

fn raw(out: &mut Vec<u8>, encoder: &mut Encoder, gfns: &[u64]) {
    let data = vec![1; gfns.len() * PAGE_SIZE];
    encoder.pages_head(out, gfns.iter().map(|gfn| PageEntry::raw(*gfn)), &data).unwrap();
    out.extend_from_slice(&data);
}

pub(super) fn header(kind: SectionKind, payload: &[u8], sequence: u64) -> Vec<u8> {
    let header = SectionHeader {
        kind,
        version: kind.version(),
        length: payload.len() as u32,
        payload_crc: crc32fast::hash(payload),
        sequence,
    };
    [&header.encode()[..], payload].concat()
}
