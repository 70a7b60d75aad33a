//! What an encoder refuses to write, and the largest sections that it writes.

use outlive_epoch::{
    Ancestor, DeviceInfo, DeviceKind, DiskOp, DiskSums, DiskWant, EncodeError, Encoder, HEADER_LEN, Lineage,
    MAX_ANCESTORS, MAX_DEVICES, MAX_RECORD_BYTES, MAX_SUMS, Message, PAGE_SIZE, PageEntry, Peer, RecordBuf,
    Section, SectionHeader, SectionKind, SectionReader, StateKind, StateSection, VmId,
};

use super::{BASE, PLAIN, begin, raw};
use crate::common::{hello, record_buf};

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

/// The largest possible sections fit their limits and the reader's buffer.
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

/// Invariant 5: code that runs in every epoch allocates nothing.
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
