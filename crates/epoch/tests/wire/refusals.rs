//! Every refusal has its own words, and leaves the sides able to go on.

use std::io::{self, Read};

use crate::common::{Content, GENERATION, hello, incoming, record_buf, writes};
use outlive_epoch::{
    Ancestor, CheckpointBegin, CheckpointFlags, DeviceInfo, DeviceKind, DiskOp, DiskSums, DiskWant,
    EncodeError, Encoder, Expect, HEADER_LEN, Incoming, IncomingError, Lineage, MAX_ANCESTORS, MAX_DEVICES,
    MAX_RECORD_BYTES, MAX_SUMS, Message, PAGE_SIZE, PageEntry, Peer, Preface, ProtocolVersion, ReadError,
    RecordBuf, RecordError, Section, SectionHeader, SectionKind, SectionReader, StateKind, StateSection,
    VmId, WireError,
};

const BASE: CheckpointFlags = CheckpointFlags { base_final: true, end: None };
const PLAIN: CheckpointFlags = CheckpointFlags { base_final: false, end: None };

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

fn header(kind: SectionKind, payload: &[u8], sequence: u64) -> Vec<u8> {
    let header = SectionHeader {
        kind,
        version: kind.version(),
        length: payload.len() as u32,
        payload_crc: crc32fast::hash(payload),
        sequence,
    };
    [&header.encode()[..], payload].concat()
}

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
    assert_eq!((sections, reader.bytes_received()), (23, stream.len() as u64));
}

#[test]
fn the_encoder_refuses_what_no_reader_would_take() {
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    let mut long = hello();
    long.name = "x".repeat(65);
    assert_eq!(
        encoder.hello(&mut out, &long),
        Err(EncodeError::TooLong { field: "the VM's name", length: 65, limit: 64 })
    );
    let pages = (0..257).map(PageEntry::zero).collect::<Vec<_>>();
    assert_eq!(
        encoder.base_pages_head(&mut out, 1, pages.into_iter(), &[]),
        Err(EncodeError::TooManyPages(257))
    );
    let entries = [PageEntry::raw(1)].into_iter();
    let error = encoder.base_pages_head(&mut out, 1, entries, &[0; 4095]);
    assert_eq!(error, Err(EncodeError::DataLength { expected: 4096, found: 4095 }));
    assert!(matches!(encoder.checkpoint_end(&mut out, 0), Err(EncodeError::Order(_))));
    assert!(out.is_empty(), "a refused call appends nothing");

    encoder.checkpoint_begin(&mut out, &begin(1, 1, 0, BASE)).unwrap();
    assert!(matches!(encoder.checkpoint_begin(&mut out, &begin(2, 0, 0, PLAIN)), Err(EncodeError::Order(_))));
    let error = encoder.checkpoint_end(&mut out, 0);
    assert_eq!(error, Err(EncodeError::Totals { number: 1, what: "pages", announced: 1, sent: 0 }));
    assert!(encoder.is_open());
    raw(&mut out, &mut encoder, &[3]);
    encoder.checkpoint_end(&mut out, 0).unwrap();
}

/// The largest sections there can be fit their limits and the reader's buffer.
#[test]
fn the_largest_sections_pass() {
    let gfns: Vec<u64> = (0..256).collect();
    let mut big = hello();
    for text in [&mut big.name, &mut big.host, &mut big.tracker, &mut big.vendor, &mut big.arbiter] {
        *text = "x".repeat(64);
    }
    let ranges = (0..8).map(|n| outlive_epoch::GfnRange { start: n * 10, pages: 5 }).collect();
    let disk = DeviceInfo { serial: "x".repeat(20), ..DeviceInfo::new(DeviceKind::Disk, 16) };
    big.devices = vec![disk; MAX_DEVICES];
    let ancestors = (0..MAX_ANCESTORS as u8).map(|n| Ancestor { vm: VmId([n; 16]), through: u64::MAX });
    big.lineage = Lineage::new(ancestors);
    big.layout = outlive_epoch::Layout::new(ranges).unwrap();
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    encoder.hello(&mut out, &big).unwrap();
    let blocks = record_buf(&[(0, 0, DiskOp::Data(&vec![5; 1 << 20]))]);
    encoder.disk_blocks_head(&mut out, 1, blocks.records()).unwrap();
    out.extend_from_slice(blocks.records().bytes());
    let sums = vec![[7; 32]; MAX_SUMS];
    encoder.disk_sums(&mut out, &DiskSums { disk: 0, first: 0, count: 256, sums: Some(&sums) }).unwrap();
    encoder.checkpoint_begin(&mut out, &begin(1, 256, 64 * 1024, BASE)).unwrap();
    raw(&mut out, &mut encoder, &gfns);
    let state = vec![7; 64 * 1024];
    encoder
        .state_head(&mut out, &StateSection { kind: StateKind::Vcpu, version: 1, index: 0, bytes: &state })
        .unwrap();
    out.extend_from_slice(&state);
    encoder.checkpoint_end(&mut out, 0).unwrap();
    let (mut source, mut reader) = (&out[..], SectionReader::new(Peer::Primary));
    let mut kinds = Vec::new();
    while let Ok(section) = reader.read_section(&mut source) {
        if let Message::Hello(received) = Message::parse(&section).unwrap() {
            assert_eq!(*received, big);
        }
        kinds.push(section.kind());
    }
    let expected = [
        SectionKind::Hello,
        SectionKind::DiskBlocks,
        SectionKind::DiskSums,
        SectionKind::CheckpointBegin,
        SectionKind::Pages,
        SectionKind::State,
        SectionKind::CheckpointEnd,
    ];
    assert_eq!(kinds, expected);
    let want = DiskWant { disk: 0, first: 0, count: 256, wanted: (0..256).collect() };
    let mut out = Vec::new();
    Encoder::new().disk_want(&mut out, &want).unwrap();
    let (mut source, mut reader) = (&out[..], SectionReader::new(Peer::Standby));
    let section = reader.read_section(&mut source).unwrap();
    assert_eq!(Message::parse(&section).unwrap(), Message::DiskWant(want));
}

/// The text of a refusal is cut at a character, not inside one.
#[test]
fn a_long_refusal_is_cut_at_a_character() {
    let mut out = Vec::new();
    Encoder::new().refuse(&mut out, outlive_epoch::RefuseCode::Resources, &"ä".repeat(200));
    let header = SectionHeader::parse(out.first_chunk::<HEADER_LEN>().unwrap()).unwrap();
    let section = Section::new(header, &out[HEADER_LEN..]).unwrap();
    match Message::parse(&section).unwrap() {
        Message::Refuse(refuse) => assert_eq!(refuse.text, "ä".repeat(128)),
        other => panic!("{other:?}"),
    }
}

/// Invariant 5: what runs in every epoch allocates nothing.
#[test]
fn a_full_section_of_pages_fits_the_promised_capacity() {
    let mut out = Vec::with_capacity(64 + 8 * 256);
    let (place, capacity) = (out.as_ptr(), out.capacity());
    let mut encoder = Encoder::new();
    let mut begun = Vec::new();
    encoder.checkpoint_begin(&mut begun, &begin(1, 256, 0, BASE)).unwrap();
    let (gfns, data): (Vec<u64>, _) = ((0..256).collect(), vec![0; 256 * PAGE_SIZE]);
    encoder.pages_head(&mut out, gfns.iter().map(|gfn| PageEntry::raw(*gfn)), &data).unwrap();
    assert_eq!((out.as_ptr(), out.capacity()), (place, capacity));
}

/// A peer whose announcement and end agree, with the right chain, but which left a page out.
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
fn entries_that_do_not_add_up_to_the_data_are_refused() {
    let pages = |version: u16, count: u32, data_len: u32, words: &[u64], data: usize| {
        let mut payload = 1u64.to_le_bytes().to_vec();
        payload.extend_from_slice(&count.to_le_bytes());
        payload.extend_from_slice(&data_len.to_le_bytes());
        words.iter().for_each(|word| payload.extend_from_slice(&word.to_le_bytes()));
        payload.resize(payload.len() + data, 0);
        let parsed = Message::parse_payload(SectionKind::Pages, version, &payload);
        parsed.map(|_| ()).map_err(|error| error.to_string())
    };
    let unknown = "a page is written by a codec that this release does not know";
    let length = "a page has data of a length that its codec does not write";
    let old = |gfn: u64, codec: u64| gfn | codec << 52;
    let new = |gfn: u64, codec: u64, length: u64| gfn | codec << 40 | length << 48;
    assert_eq!(pages(1, 2, 4096, &[old(3, 0), old(4, 1)], 4096), Ok(()));
    assert_eq!(pages(2, 2, 4096, &[new(3, 0, 4096), new(4, 1, 0)], 4096), Ok(()));
    let raw = [(1, old(3, 0)), (2, new(3, 0, 4096))];
    for (version, word) in raw {
        for (count, data_len, words, data, why) in [
            (1, 4095, &[word][..], 4096, "the entries do not add up to the data's length (0xfff)"),
            (1, 4096, &[word], 4095, "the payload ends early, bytes missing (0x1)"),
            (1, 4096, &[word], 4097, "bytes are left over (0x1)"),
            (257, 0, &[], 0, "more pages than a section may have (0x101)"),
            (u32::MAX, 0, &[], 0, "more pages than a section may have (0xffffffff)"),
        ] {
            let expected = Err(format!("section Pages: {why}"));
            assert_eq!(pages(version, count, data_len, words, data), expected);
        }
    }
    for (version, word, why) in [
        (1, old(0, 2), format!("{unknown} (0x2)")),
        (1, old(0, 0x101), format!("{unknown} (0xff)")),
        (1, old(1 << 40, 0), "a page of an impossible frame (0x10000000000)".into()),
        (2, new(0, 2, 0), format!("{unknown} (0x2)")),
        (2, new(0, 0, 0), format!("{length} (0x0)")),
        (2, new(0, 0, 4095), format!("{length} (0xfff)")),
        (2, new(0, 0, 0xffff), format!("{length} (0xffff)")),
        (2, new(0, 1, 1), format!("{length} (0x1)")),
    ] {
        let found = pages(version, 1, 4096, &[word], 4096);
        assert_eq!(found, Err(format!("section Pages: {why}")), "{version} {word:#x}");
    }
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
    // Announced and left out: the encoder does not do that.
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    encoder.checkpoint_begin(&mut out, &CheckpointBegin { disk_bytes: 24, ..begin(1, 0, 0, BASE) }).unwrap();
    let error = encoder.checkpoint_end(&mut out, 0).unwrap_err();
    assert_eq!(error.to_string(), "checkpoint 1 was announced with 24 bytes of disk writes and has 0");
    encoder.disk_writes_head(&mut out, record_buf(&[(1, 0, DiskOp::Flush)]).records()).unwrap();
    assert!(encoder.checkpoint_end(&mut out, 0).is_ok());
}

/// A peer's records are looked at once, when they are collected: nothing of them may panic or be kept.
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

/// The room for disk writes goes away with them, so that nobody copies them, and comes back.
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

#[test]
fn disk_sections_out_of_place_or_of_nonsense_are_not_encoded() {
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    let none = RecordBuf::default();
    let error = encoder.disk_writes_head(&mut out, none.records());
    assert!(matches!(error, Err(EncodeError::Order(_))));
    let data = vec![1; MAX_RECORD_BYTES / 2];
    let two = record_buf(&[(0, 0, DiskOp::Data(&data)), (0, 0, DiskOp::Data(&data))]);
    let error = encoder.disk_blocks_head(&mut out, 1, two.records());
    assert!(matches!(error, Err(EncodeError::TooLong { .. })), "{error:?}");
    let many = vec![[0; 32]; 257];
    let sums = DiskSums { disk: 0, first: 0, count: 257, sums: Some(&many) };
    assert!(matches!(encoder.disk_sums(&mut out, &sums), Err(EncodeError::TooLong { .. })));
    let sums = DiskSums { disk: 0, first: 0, count: 4, sums: Some(&many[..3]) };
    assert_eq!(encoder.disk_sums(&mut out, &sums), Err(EncodeError::DataLength { expected: 128, found: 96 }));
    let want = DiskWant { disk: 0, first: 0, count: 1000, wanted: (0..257).collect() };
    assert!(matches!(encoder.disk_want(&mut out, &want), Err(EncodeError::TooLong { .. })));
    assert!(out.is_empty(), "a refused call appends nothing");
    encoder.checkpoint_begin(&mut out, &begin(1, 0, 0, BASE)).unwrap();
    let error = encoder.disk_blocks_head(&mut out, 1, none.records());
    assert!(matches!(error, Err(EncodeError::Order(_))));
    let sums = DiskSums { disk: 0, first: 0, count: 0, sums: None };
    assert!(matches!(encoder.disk_sums(&mut out, &sums), Err(EncodeError::Order(_))));
}

#[test]
fn windows_that_make_no_sense_are_refused() {
    let parse = |kind, words: [&[u8]; 5]| {
        Message::parse_payload(kind, kind.version(), &words.concat())
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let two = |n: u16| n.to_le_bytes();
    let four = |n: u32| n.to_le_bytes();
    let eight = |n: u64| n.to_le_bytes();
    let sums = |zero, count, first, rest: &[u8]| {
        parse(SectionKind::DiskSums, [&two(0), &two(zero), &four(count), &eight(first), rest])
    };
    assert_eq!(sums(0, 1, 9, &[1; 32]), Ok(()));
    assert_eq!(sums(1, 16 * 1024, 9, &[]), Ok(()));
    for (zero, count, first, rest, why) in [
        (0, 1, 9, &[1; 31][..], "the payload ends early, bytes missing (0x1)"),
        (0, 1, 9, &[1; 33], "bytes are left over (0x1)"),
        (0, 257, 9, &[], "more sums than a section may have (0x101)"),
        (0, u32::MAX, 9, &[], "a window of too many chunks (0xffffffff)"),
        (1, 16 * 1024 + 1, 9, &[], "a window of too many chunks (0x4001)"),
        (1, 1, 9, &[0], "bytes are left over (0x1)"),
        (2, 1, 9, &[], "the zero flag is neither 0 nor 1 (0x2)"),
        (1, 1, u64::MAX, &[], "a window beyond every disk, first chunk (0xffffffffffffffff)"),
    ] {
        assert_eq!(sums(zero, count, first, rest), Err(format!("section DiskSums: {why}")));
    }
    let want = |length, count, positions: &[u16]| {
        let rest: Vec<u8> = positions.iter().flat_map(|at| at.to_le_bytes()).collect();
        parse(SectionKind::DiskWant, [&two(0), &two(length), &four(count), &eight(0), &rest])
    };
    assert_eq!(want(3, 9, &[0, 7, 8]), Ok(()));
    for (length, count, positions, why) in [
        (1, 9, &[9][..], "a wanted chunk is out of order or its window (0x9)"),
        (2, 9, &[5, 5], "a wanted chunk is out of order or its window (0x5)"),
        (2, 9, &[6, 5], "a wanted chunk is out of order or its window (0x5)"),
        (257, 1000, &[], "more chunks wanted than a window has (0x101)"),
        (2, 9, &[6], "the payload ends early, bytes missing (0x2)"),
        (1, 9, &[6, 7], "bytes are left over (0x2)"),
    ] {
        assert_eq!(want(length, count, positions), Err(format!("section DiskWant: {why}")));
    }
}

#[test]
fn devices_that_make_no_sense_are_refused() {
    let mut out = Vec::new();
    let mut one = hello();
    one.devices.truncate(1);
    // The version at whose end nothing may be left.
    let old = ProtocolVersion::V2;
    Encoder::speaking(old).hello(&mut out, &one).unwrap();
    let payload = &out[HEADER_LEN..];
    let text_at = payload.windows(6).position(|w| w == b"golden").unwrap() - 2;
    let device = text_at - 16;
    assert_eq!(payload[device], DeviceKind::Net as u8);
    for (at, byte, why) in [
        (device - 1, 33, "more devices than a VM has (0x21)"),
        (device, 0, "unknown kind of device (0x0)"),
        (device, 6, "unknown kind of device (0x6)"),
        (device + 1, 1, "a reserved field is not zero (0x1)"),
        (device + 2, 4, "unknown device flags (0x4)"),
        (device + 13, 0x80, "a disk larger than every disk (0x8000000000000000)"),
        (device + 14, 21, "a text is longer than its limit (0x15)"),
        (payload.len() - 25, 17, "more ancestors than a VM remembers (0x11)"),
        (payload.len() - 25, 2, "the payload ends early, bytes missing (0x18)"),
        (payload.len() - 25, 0, "bytes are left over (0x18)"),
    ] {
        let mut wrong = payload.to_vec();
        wrong[at] = byte;
        let error = Message::parse_payload(SectionKind::Hello, SectionKind::Hello.version_in(old), &wrong)
            .map(|_| ())
            .map_err(|e| e.to_string());
        assert_eq!(error, Err(format!("section Hello: {why}")), "{at}");
    }
}

#[test]
fn state_sections_that_make_no_sense_are_refused() {
    let state = |kind: u16, reserved: u16, bytes: usize| {
        let mut payload = 1u64.to_le_bytes().to_vec();
        [kind, 1, 0, reserved].iter().for_each(|half| payload.extend_from_slice(&half.to_le_bytes()));
        payload.resize(payload.len() + bytes, 7);
        let parsed = Message::parse_payload(SectionKind::State, SectionKind::State.version(), &payload);
        parsed.map(|_| ()).map_err(|error| error.to_string())
    };
    for kind in StateKind::ALL {
        assert_eq!(state(kind as u16, 0, kind.limit()), Ok(()));
        let long = format!("a state section of more bytes than its kind has ({:#x})", kind.limit() + 1);
        assert_eq!(state(kind as u16, 0, kind.limit() + 1), Err(format!("section State: {long}")));
    }
    for (kind, reserved, why) in [
        (0, 0, "a state section of an unknown kind (0x0)"),
        (7, 0, "a state section of an unknown kind (0x7)"),
        (u16::MAX, 0, "a state section of an unknown kind (0xffff)"),
        (1, 5, "a reserved field is not zero (0x5)"),
    ] {
        assert_eq!(state(kind, reserved, 9), Err(format!("section State: {why}")));
    }
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    encoder.checkpoint_begin(&mut out, &begin(1, 0, 0, BASE)).unwrap();
    let bytes = vec![0; StateKind::Check.limit() + 1];
    let error = encoder
        .state_head(&mut out, &StateSection { kind: StateKind::Check, version: 1, index: 0, bytes: &bytes });
    assert!(matches!(error, Err(EncodeError::TooLong { .. })), "{error:?}");
}
