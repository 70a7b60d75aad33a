//! Checkpoints that must not be staged.

use outlive_epoch::{
    AuditRange, AuditSpan, CheckpointBegin, ChunkRange, DiskOp, Encoder, Expect, HEADER_LEN, IncomingError,
    PageEntry, ProtocolVersion, RecordBuf, RecordError, SectionKind, StateKind, StateSection,
};

use super::{BASE, PLAIN, begin, header, raw, stage, staged};
use crate::common::{Content, GENERATION, incoming, record_buf, writes};

#[test]
fn limits_are_named_when_they_are_reached() {
    let error = staged(|encoder, out| encoder.checkpoint_begin(out, &begin(1, 601, 0, BASE)).unwrap());
    assert_eq!(error.unwrap_err().to_string(), "checkpoint 1 has 601 pages; the limit max_pages is 600");
    let error = staged(|encoder, out| encoder.checkpoint_begin(out, &begin(1, 0, 4097, BASE)).unwrap());
    assert_eq!(
        error.unwrap_err().to_string(),
        "checkpoint 1 has 4097 bytes of state; the limit max_state_bytes is 4096"
    );
    let too_much = CheckpointBegin { disk_bytes: 8193, ..begin(1, 0, 0, BASE) };
    let error = staged(|encoder, out| encoder.checkpoint_begin(out, &too_much).unwrap());
    assert_eq!(
        error.unwrap_err().to_string(),
        "checkpoint 1 has 8193 bytes of disk writes; the limit max_disk_bytes is 8192"
    );
    let error = staged(|encoder, out| {
        encoder.checkpoint_begin(out, &begin(1, 0, 9, BASE)).unwrap();
        for index in 0..9 {
            encoder
                .state_head(out, &StateSection { kind: StateKind::Vcpu, version: 1, index, bytes: &[0] })
                .unwrap();
            out.push(0);
        }
    });
    assert_eq!(error, Err(IncomingError::TooManySections { number: 1, limit: 8 }));
}

#[test]
fn a_checkpoint_that_is_not_due_is_refused() {
    let error = staged(|encoder, out| encoder.checkpoint_begin(out, &begin(1, 0, 0, PLAIN)).unwrap());
    assert_eq!(error, Err(IncomingError::BaseFinal { number: 1, found: false }));
    let other = CheckpointBegin { generation: GENERATION + 1, ..begin(1, 0, 0, BASE) };
    let error = staged(|encoder, out| encoder.checkpoint_begin(out, &other).unwrap());
    assert_eq!(error, Err(IncomingError::Generation { expected: GENERATION, found: GENERATION + 1 }));

    let mut incoming = incoming();
    for (number, flags, expected) in [
        (6, PLAIN, IncomingError::Number { expected: 5, found: 6 }),
        (4, PLAIN, IncomingError::Number { expected: 5, found: 4 }),
        (5, BASE, IncomingError::BaseFinal { number: 5, found: true }),
    ] {
        incoming.reset(Expect::Number(5));
        let mut out = Vec::new();
        Content::new(number, flags, &[1]).encode(&mut Encoder::new(), &mut out, 9);
        assert_eq!(stage(&mut incoming, &out), Err(expected));
        assert!(incoming.checkpoint().is_none());
    }
}

#[test]
fn pages_outside_the_layout_or_twice_are_refused() {
    let error = staged(|encoder, out| {
        encoder.checkpoint_begin(out, &begin(1, 2, 0, BASE)).unwrap();
        raw(out, encoder, &[999, 1000]);
    });
    assert_eq!(error, Err(IncomingError::OutsideLayout { gfn: 1000 }));
    let error = staged(|encoder, out| {
        encoder.checkpoint_begin(out, &begin(1, 2, 0, BASE)).unwrap();
        raw(out, encoder, &[70]);
        raw(out, encoder, &[70]);
    });
    assert_eq!(error, Err(IncomingError::DuplicatePage { gfn: 70, number: 1 }));
    let error = staged(|encoder, out| {
        encoder.checkpoint_begin(out, &begin(1, 0, 2, BASE)).unwrap();
        for _ in 0..2 {
            encoder
                .state_head(out, &StateSection { kind: StateKind::Device, version: 1, index: 2, bytes: &[0] })
                .unwrap();
            out.push(0);
        }
    });
    assert_eq!(error, Err(IncomingError::DuplicateState { kind: StateKind::Device, index: 2, number: 1 }));
}

#[test]
fn sums_of_pages_outside_the_layout_of_another_checkpoint_or_twice_are_refused() {
    let span = |first, mask| AuditSpan { first, mask, sum: 9 };
    let with = |audits: &[&[AuditSpan]]| {
        let (mut out, mut encoder) = (Vec::new(), Encoder::speaking(ProtocolVersion::V7));
        encoder.checkpoint_begin(&mut out, &begin(1, 0, 0, BASE)).unwrap();
        audits.iter().for_each(|spans| encoder.audit(&mut out, spans).unwrap());
        stage(&mut incoming(), &out)
    };
    // The layout has 1000 pages from 0 and from 0x10_0000 on.
    assert_eq!(with(&[&[span(960, 1 << 39), span(0x10_0000, 1)]]), Ok(false));
    assert_eq!(with(&[&[span(960, 1 << 40)]]), Err(IncomingError::OutsideLayout { gfn: 1000 }));
    let twice = IncomingError::Order { kind: SectionKind::Audit, place: "twice in a checkpoint" };
    assert_eq!(with(&[&[span(0, 1)], &[span(64, 1)]]), Err(twice));
}

#[test]
fn sums_of_chunks_outside_the_disks_of_another_checkpoint_or_twice_are_refused() {
    let range = |disk, first, count| AuditRange { chunks: ChunkRange { disk, first, count }, sum: 0 };
    let with = |audits: &[&[AuditRange]]| {
        let (mut out, mut encoder) = (Vec::new(), Encoder::speaking(ProtocolVersion::V7));
        encoder.checkpoint_begin(&mut out, &begin(1, 0, 0, BASE)).unwrap();
        audits.iter().for_each(|ranges| encoder.disk_audit(&mut out, ranges).unwrap());
        stage(&mut incoming(), &out)
    };
    // Disk 0 is not replicated, disk 1 has 16 chunks, disk 2 has one and a part.
    assert_eq!(with(&[&[range(1, 0, 16), range(2, 1, 1)]]), Ok(false));
    for (disk, first, count) in [(0, 0, 1), (1, 0, 17), (1, 16, 1), (2, 2, 1), (3, 0, 1)] {
        let outside = IncomingError::OutsideDisk { disk, chunk: first };
        assert_eq!(with(&[&[range(disk, first, count)]]), Err(outside));
    }
    let twice = IncomingError::Order { kind: SectionKind::DiskAudit, place: "twice in a checkpoint" };
    assert_eq!(with(&[&[range(1, 0, 1)], &[range(1, 1, 1)]]), Err(twice));
}

#[test]
fn more_pages_than_announced_are_refused_before_they_are_kept() {
    let error = staged(|encoder, out| {
        encoder.checkpoint_begin(out, &begin(1, 1, 0, BASE)).unwrap();
        raw(out, encoder, &[1, 2]);
    });
    assert_eq!(error, Err(IncomingError::Totals { number: 1, what: "pages", expected: 1, found: 2 }));
}

#[test]
fn sections_out_of_place_are_refused() {
    let mut out = Vec::new();
    Content::new(1, BASE, &[1, 2]).encode(&mut Encoder::new(), &mut out, 9);
    let mut incoming = incoming();
    assert_eq!(stage(&mut incoming, &out), Ok(true));
    // The buffer is full until it is reset.
    let error = stage(&mut incoming, &out).unwrap_err();
    assert!(matches!(error, IncomingError::Order { kind: SectionKind::CheckpointBegin, .. }));
    incoming.reset(Expect::Base);
    let mut base = Vec::new();
    Encoder::new().base_pages_head(&mut base, 1, [PageEntry::zero(1)].into_iter(), &[]).unwrap();
    let error = stage(&mut incoming, &base).unwrap_err();
    assert_eq!(error.to_string(), "section BasePages came outside a checkpoint");
}

/// A reset must forget which pages it has seen, or the next checkpoint with the same page is refused.
#[test]
fn a_staging_buffer_serves_one_checkpoint_after_another() {
    let mut incoming = incoming();
    let mut encoder = Encoder::new();
    for number in 10..30 {
        let flags = if number == 10 { BASE } else { PLAIN };
        let content = Content::new(number, flags, &[63, 64, 65, 0x10_0000 + number]);
        let mut out = Vec::new();
        content.encode(&mut encoder, &mut out, 3);
        let mut fresh = Vec::new();
        content.encode(&mut Encoder::new(), &mut fresh, 3);
        assert_eq!(stage(&mut incoming, &fresh), Ok(true), "checkpoint {number}");
        assert_eq!(Content::of(&incoming), Some(content));
        incoming.reset(Expect::Number(number + 1));
    }
}

/// A peer that left a page out: its announcement and its end agree, and the chain is right.
#[test]
fn fewer_pages_than_announced_are_refused() {
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    encoder.checkpoint_begin(&mut out, &begin(1, 2, 0, BASE)).unwrap();
    encoder.pages_head(&mut out, [PageEntry::zero(4)].into_iter(), &[]).unwrap();
    let mut chain = crc32fast::Hasher::new();
    chain.update(&out[..28]);
    let second = HEADER_LEN + 32;
    chain.update(&out[second..second + 28]);
    let mut end = [0; 32];
    end[0] = 1;
    end[16] = 2;
    end[24..28].copy_from_slice(&chain.finalize().to_le_bytes());
    out.extend_from_slice(&header(SectionKind::CheckpointEnd, &end, 2));
    let error = stage(&mut incoming(), &out);
    assert_eq!(error, Err(IncomingError::Totals { number: 1, what: "pages", expected: 2, found: 1 }));
}

#[test]
fn disk_writes_outside_the_disks_or_beyond_the_announcement_are_refused() {
    let stage_writes = |announced: u32, writes: &RecordBuf| {
        staged(|encoder, out| {
            let begin = CheckpointBegin { disk_bytes: announced, ..begin(1, 0, 0, BASE) };
            encoder.checkpoint_begin(out, &begin).unwrap();
            encoder.disk_writes_head(out, writes.records()).unwrap();
            out.extend_from_slice(writes.records().bytes());
        })
    };
    assert_eq!(stage_writes(4000, &writes()), Ok(false));
    for (disk, offset, op) in [
        (0, 0, DiskOp::Flush),
        (0, 0, DiskOp::Zero(1)),
        (1, (1 << 20) - 1, DiskOp::Data(&[1, 2])),
        (2, 100_000, DiskOp::Zero(1)),
        (3, 0, DiskOp::Data(&[1])),
        (u16::MAX, 0, DiskOp::Data(&[1])),
    ] {
        let error = stage_writes(4000, &record_buf(&[(disk, offset, op)]));
        let source = RecordError::OutsideDisk { disk, offset };
        assert_eq!(error, Err(IncomingError::Records { number: 1, source }));
    }
    let found = writes().len() as u32;
    let expected = IncomingError::Totals { number: 1, what: "bytes of disk writes", expected: 30, found };
    assert_eq!(stage_writes(30, &writes()), Err(expected));
    // Announced and left out: the encoder cannot do that.
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    encoder.checkpoint_begin(&mut out, &CheckpointBegin { disk_bytes: 24, ..begin(1, 0, 0, BASE) }).unwrap();
    let error = encoder.checkpoint_end(&mut out, 0).unwrap_err();
    assert_eq!(error.to_string(), "checkpoint 1 was announced with 24 bytes of disk writes and has 0");
    encoder.disk_writes_head(&mut out, record_buf(&[(1, 0, DiskOp::Flush)]).records()).unwrap();
    assert!(encoder.checkpoint_end(&mut out, 0).is_ok());
}

/// A peer's records are checked once, when they are collected: bad ones never panic and are not kept.
#[test]
fn bytes_that_are_no_disk_records_are_refused() {
    let sound = writes();
    let sound = sound.records().bytes();
    for cut in (0..sound.len()).filter(|cut| ![94, 118, 142].contains(cut)).skip(1) {
        let payload = [&1u64.to_le_bytes()[..], &sound[..cut]].concat();
        let mut out = Vec::new();
        let mut encoder = Encoder::new();
        let begin = CheckpointBegin { disk_bytes: 4000, ..begin(1, 0, 0, BASE) };
        encoder.checkpoint_begin(&mut out, &begin).unwrap();
        out.extend_from_slice(&header(SectionKind::DiskWrites, &payload, 1));
        let error = stage(&mut incoming(), &out).unwrap_err();
        assert!(error.to_string().contains("a disk record ends early"), "{cut}: {error}");
    }
}

/// The memory for disk writes goes away with them, so that nobody copies them, and comes back.
#[test]
fn disk_writes_are_handed_over_with_their_memory() {
    let (mut incoming, mut writes) = (incoming(), RecordBuf::default());
    for number in 1..4 {
        let mut out = Vec::new();
        let flags = if number == 1 { BASE } else { PLAIN };
        let content = Content::new(number, flags, &[1]);
        content.encode(&mut Encoder::new(), &mut out, 9);
        incoming.swap_disk_writes(&mut writes);
        assert!(writes.is_empty(), "not whole yet");
        let memory = writes.memory();
        assert_eq!(stage(&mut incoming, &out), Ok(true));
        let place = incoming.checkpoint().unwrap().disk_writes().records().bytes().as_ptr();
        incoming.swap_disk_writes(&mut writes);
        assert!(writes.records().bytes() == content.writes && writes.has_flush());
        assert_eq!(writes.records().bytes().as_ptr(), place);
        let left = incoming.checkpoint().unwrap().disk_writes();
        assert_eq!((left.len(), left.memory()), (0, memory));
        incoming.reset(Expect::Number(number + 1));
    }
}
