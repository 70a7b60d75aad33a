//! The writes to disks of one epoch, as they go over the link.

use outlive_epoch::{DiskOp, DiskRecord, MAX_RECORD_BYTES, put_write};
use outlive_machine::{DiskOp as LoggedOp, WriteBuffer};

use super::sender::BATCH_BYTES;

/// Data of one record: with its head it fits a batch. A longer write is sent as several.
const RECORD_DATA: usize = BATCH_BYTES / 2;
const _: () = assert!(BATCH_BYTES <= MAX_RECORD_BYTES);

/// Records, cut into sections. The memory is kept from one checkpoint to the next.
#[derive(Default)]
pub(super) struct Records {
    bytes: Vec<u8>,
    /// Where each section but the last ends.
    ends: Vec<usize>,
}

impl Records {
    /// Replaces everything with what a log holds.
    pub(super) fn fill(&mut self, log: &WriteBuffer) {
        self.bytes.clear();
        self.ends.clear();
        let mut start = 0;
        let mut put = |put: &dyn Fn(&mut Vec<u8>)| {
            let before = self.bytes.len();
            put(&mut self.bytes);
            if self.bytes.len() - start > BATCH_BYTES {
                self.ends.push(before);
                start = before;
            }
        };
        for write in log {
            let (disk, offset) = (write.disk, write.offset);
            match write.op {
                LoggedOp::Data(data) => {
                    for (i, data) in data.chunks(RECORD_DATA).enumerate() {
                        put(&|to| put_write(to, disk, offset + (i * RECORD_DATA) as u64, data));
                    }
                }
                // A request of no length changes nothing, and no record says so.
                LoggedOp::Zero(0) => {}
                LoggedOp::Zero(len) => put(&|to| DiskRecord { disk, offset, op: DiskOp::Zero(len) }.put(to)),
                LoggedOp::Flush => put(&|to| DiskRecord { disk, offset: 0, op: DiskOp::Flush }.put(to)),
            }
        }
    }

    /// Bytes of all records.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The sections, of at most [`BATCH_BYTES`]; at least one, which may be empty.
    pub(super) fn sections(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ends = self.ends.iter().copied().chain(std::iter::once(self.bytes.len()));
        starts.zip(ends).map(|(start, end)| &self.bytes[start..end])
    }
}

#[cfg(test)]
mod tests {
    use outlive_epoch::DiskRecords;
    use outlive_machine::DiskWrite;

    use super::*;

    #[test]
    fn sections_are_cut_between_records() {
        let mut log = WriteBuffer::with_capacity(8 << 20);
        let data = vec![7; 64 << 10];
        for index in 0..100 {
            assert!(log.push(DiskWrite { disk: 1, offset: index << 20, op: LoggedOp::Data(&data) }));
            assert!(log.push(DiskWrite { disk: 0, offset: 0, op: LoggedOp::Flush }));
            assert!(log.push(DiskWrite { disk: 0, offset: 5, op: LoggedOp::Zero(index) }));
        }
        let mut records = Records::default();
        for _ in 0..2 {
            records.fill(&log);
            let mut found = 0;
            for section in records.sections() {
                assert!(section.len() <= BATCH_BYTES);
                found += DiskRecords::parse(section).unwrap().iter().count();
            }
            // The zeroing of nothing is left out.
            assert_eq!(found, 299);
            assert!(records.sections().count() > 6 << 20 >> 18);
        }
        let long: Vec<u8> = (0..600 << 10).map(|i| (i / 512) as u8).collect();
        let mut log = WriteBuffer::with_capacity(1 << 20);
        assert!(log.push(DiskWrite { disk: 1, offset: 512, op: LoggedOp::Data(&long) }));
        records.fill(&log);
        let mut at = 0;
        for section in records.sections() {
            assert!(section.len() <= BATCH_BYTES);
            for record in DiskRecords::parse(section).unwrap().iter() {
                let DiskOp::Data(data) = record.op else { panic!("{:?}", record.op) };
                assert_eq!((record.disk, record.offset), (1, 512 + at as u64));
                assert_eq!(data, &long[at..at + data.len()]);
                at += data.len();
            }
        }
        assert_eq!(at, long.len());
        records.fill(&WriteBuffer::with_capacity(0));
        assert_eq!(records.len(), 0);
    }
}
