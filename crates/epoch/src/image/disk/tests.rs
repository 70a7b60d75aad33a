//! Disk records by themselves.

use proptest::prelude::*;

use super::*;
use crate::image::limits::MAX_RECORD_BYTES;

const DISKS: [u64; 4] = [0, 1 << 40, 0, 1 << 40];

fn filled(records: &[DiskRecord<'_>]) -> RecordBuf {
    let mut buffer = RecordBuf::with_capacity(8 << 20);
    records.iter().for_each(|record| assert!(buffer.push(*record)));
    buffer
}

#[test]
fn a_long_write_becomes_several_records() {
    let data: Vec<u8> = (0..2 * DISK_RECORD_DATA + 5).map(|at| (at / 7) as u8).collect();
    let buffer = filled(&[DiskRecord { disk: 3, offset: 1000, op: DiskOp::Data(&data) }]);
    assert_eq!(buffer.len(), 3 * DISK_RECORD_LEN + data.len());
    let mut at = 1000;
    for part in buffer.iter() {
        let DiskOp::Data(bytes) = part.op else { panic!("{part:?}") };
        assert_eq!((part.disk, part.offset), (3, at));
        assert!(bytes == &data[(at - 1000) as usize..(part.end() - 1000) as usize]);
        at = part.end();
    }
    assert_eq!(at, 1000 + data.len() as u64);
    assert_eq!(UncheckedRecords::new(buffer.records().bytes()).check(&DISKS), Ok(buffer.records()));
}

#[test]
fn what_finds_no_room_leaves_nothing_behind() {
    let data = vec![7; DISK_RECORD_DATA + 1];
    let record = DiskRecord { disk: 1, offset: 0, op: DiskOp::Data(&data) };
    let mut buffer = RecordBuf::with_capacity(2 * DISK_RECORD_LEN + data.len() - 1);
    assert!(!buffer.push(record) && buffer.is_empty());
    let mut buffer = RecordBuf::with_capacity(2 * DISK_RECORD_LEN + data.len());
    assert!(buffer.push(record) && !buffer.push(DiskRecord { op: DiskOp::Flush, ..record }));
    assert!(!buffer.has_flush() && buffer.len() == buffer.capacity());
}

#[test]
fn sections_are_cut_between_records() {
    let data = vec![7; 64 << 10];
    let mut records = Vec::new();
    for index in 0..100 {
        records.push(DiskRecord { disk: 1, offset: index << 20, op: DiskOp::Data(&data) });
        records.push(DiskRecord { disk: 3, offset: 0, op: DiskOp::Flush });
        records.push(DiskRecord { disk: 3, offset: 5, op: DiskOp::Zero(index) });
    }
    let buffer = filled(&records);
    let (mut found, mut sections) = (0, 0);
    for section in buffer.sections(MAX_RECORD_BYTES) {
        assert!(section.bytes().len() <= MAX_RECORD_BYTES);
        found += section.iter().count();
        sections += 1;
    }
    // Zeroing nothing is left out.
    assert_eq!((found, sections), (299, 7));
    assert_eq!(RecordBuf::default().sections(MAX_RECORD_BYTES).count(), 0);
    // Records that were read may have more data.
    let head = [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0];
    let large = [&head[..], &vec![7; MAX_DISK_DATA]].concat();
    let mut buffer = RecordBuf::default();
    buffer.empty_for(2 * large.len()).unwrap();
    for _ in 0..2 {
        buffer.check_and_append(UncheckedRecords::new(&large), &DISKS).unwrap();
    }
    assert_eq!(buffer.sections(MAX_RECORD_BYTES).count(), 2);
    assert_eq!(buffer.sections(1 << 10).count(), 2, "a record is never cut");
    const { assert!(MAX_DISK_DATA + DISK_RECORD_LEN <= MAX_RECORD_BYTES) }
}

#[test]
fn a_copy_of_checked_records_knows_of_a_flush() {
    let plain = filled(&[DiskRecord { disk: 1, offset: 9, op: DiskOp::Zero(1) }]);
    let flush = filled(&[DiskRecord { disk: 1, offset: 0, op: DiskOp::Flush }]);
    let outside = filled(&[DiskRecord { disk: 2, offset: 0, op: DiskOp::Zero(1) }]);
    let mut copy = RecordBuf::default();
    copy.empty_for(100).unwrap();
    for (records, has_flush) in [(&plain, false), (&flush, true), (&plain, true)] {
        let records = UncheckedRecords::new(records.records().bytes());
        copy.check_and_append(records, &DISKS).unwrap();
        assert_eq!(copy.has_flush(), has_flush);
    }
    let before = copy.len();
    let outside = UncheckedRecords::new(outside.records().bytes());
    let error = copy.check_and_append(outside, &DISKS).unwrap_err();
    assert_eq!(error, RecordError::OutsideDisk { disk: 2, offset: 0 });
    assert_eq!((copy.len(), copy.iter().count()), (before, 3));
    copy.clear();
    assert!(!copy.has_flush());
    assert!(copy.empty_for(usize::MAX).is_err());
    assert_eq!((copy.capacity(), copy.memory() >= 100), (100, true));
}

#[test]
fn records_that_make_no_sense_are_refused() {
    let record = |op: u16, reserved: u32, offset: u64, len: u64, data: usize| {
        let mut bytes = vec![1, 0];
        bytes.extend_from_slice(&op.to_le_bytes());
        bytes.extend_from_slice(&reserved.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.resize(bytes.len() + data, 9);
        let records = UncheckedRecords::new(&bytes).check(&DISKS).map_err(|error| error.to_string())?;
        Ok(records.iter().count())
    };
    assert_eq!(record(1, 0, 0, 4, 4), Ok(1));
    assert_eq!(record(2, 0, 8, u64::from(u32::MAX), 0), Ok(1));
    assert_eq!(record(3, 0, 0, 0, 0), Ok(1));
    for (op, reserved, offset, len, data, why) in [
        (1, 0, 0, 5, 4, "a disk record ends early, bytes missing (0x1)"),
        (1, 0, 0, 0, 0, "a disk write of an impossible length (0x0)"),
        (1, 0, 0, (1 << 20) + 1, 4, "a disk write of an impossible length (0x100001)"),
        (1, 0, u64::MAX, 1, 1, "a disk write reaches beyond every disk, offset (0xffffffffffffffff)"),
        (2, 0, 1 << 62, 1 << 62, 0, "a disk write reaches beyond every disk, offset (0x4000000000000000)"),
        (2, 0, 0, 0, 0, "a disk write of an impossible length (0x0)"),
        (3, 0, 1, 0, 0, "a disk write of an impossible length (0x0)"),
        (4, 0, 0, 0, 0, "a disk write of an unknown operation (0x4)"),
        (0, 0, 0, 0, 0, "a disk write of an unknown operation (0x0)"),
        (2, 1 << 31, 0, 8, 0, "a reserved field of a disk record is not zero (0x80000000)"),
        // Three stray bytes are the start of a record that ends early.
        (2, 0, 0, 8, 3, "a disk record ends early, bytes missing (0x15)"),
        (2, 0, 1 << 40, 1, 0, "a write to disk 1 at 0x10000000000 is outside the VM's disks"),
    ] {
        assert_eq!(record(op, reserved, offset, len, data), Err(why.to_owned()), "{op} {offset} {len}");
    }
}

#[derive(Clone, Debug)]
enum Op {
    Data(Vec<u8>),
    Zero(u64),
    Flush,
}

proptest! {
    #[test]
    fn a_buffer_gives_back_what_it_took(
        writes in prop::collection::vec((any::<u16>(), 0..MAX_END / 2, prop_oneof![
            prop::collection::vec(any::<u8>(), 0..50).prop_map(Op::Data),
            (0..MAX_END / 2).prop_map(Op::Zero),
            Just(Op::Flush),
        ]), 0..30),
        capacity in 0usize..600,
    ) {
        let mut buffer = RecordBuf::with_capacity(capacity);
        let mut kept = Vec::new();
        for (disk, offset, op) in &writes {
            let (offset, op) = match op {
                Op::Data(data) => (*offset, DiskOp::Data(data)),
                Op::Zero(len) => (*offset, DiskOp::Zero(*len)),
                Op::Flush => (0, DiskOp::Flush),
            };
            let write = DiskRecord { disk: *disk, offset, op };
            // A write that changes nothing is no record.
            if buffer.push(write) && (op == DiskOp::Flush || !write.is_empty()) {
                kept.push(write);
            }
            prop_assert!(buffer.len() <= capacity);
        }
        prop_assert_eq!(buffer.iter().collect::<Vec<_>>(), kept);
        let copied = UncheckedRecords::new(buffer.records().bytes()).check(&[MAX_END; 1 << 16]);
        prop_assert_eq!(copied, Ok(buffer.records()));
    }
}
