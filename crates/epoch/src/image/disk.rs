//! Disk writes, in the one form that they have from the machine's write log to the standby's journal.
//!
//! A *record* is one write:
//!
//! | bytes | field |
//! |---|---|
//! | 0..2 | disk: its position among the VM's disks |
//! | 2..4 | operation: 1 data, 2 zeroes, 3 flush |
//! | 4..8 | zero |
//! | 8..16 | offset in bytes |
//! | 16..24 | length in bytes |
//! | 24.. | the data, for operation 1 |

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::limits::MAX_DISK_DATA;

/// What stands in front of a record's data.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    disk: U16,
    op: U16,
    zero: U32,
    offset: U64,
    len: U64,
}

/// Bytes of a record before its data.
pub const DISK_RECORD_LEN: usize = size_of::<Head>();

/// What a record does to its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp<'a> {
    /// Writes these bytes, 1 to [`MAX_DISK_DATA`].
    Data(&'a [u8]),
    /// Makes so many bytes zero.
    Zero(u64),
    /// What was written before is to be durable.
    Flush,
}

/// One write to one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRecord<'a> {
    /// The disk's position among the VM's disks.
    pub disk: u16,
    /// Where, in bytes; 0 for a flush.
    pub offset: u64,
    /// What.
    pub op: DiskOp<'a>,
}

impl DiskRecord<'_> {
    /// Appends the record's bytes. The data must not be longer than [`MAX_DISK_DATA`]; see [`put_write`].
    pub fn put(&self, out: &mut Vec<u8>) {
        let (op, len, data) = match self.op {
            DiskOp::Data(data) => (1, data.len() as u64, data),
            DiskOp::Zero(len) => (2, len, &[][..]),
            DiskOp::Flush => (3, 0, &[][..]),
        };
        let (disk, offset) = (self.disk.into(), self.offset.into());
        let head = Head { disk, op: U16::new(op), zero: U32::ZERO, offset, len: len.into() };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(data);
    }

    /// Bytes that [`put`](Self::put) appends.
    pub fn encoded_len(&self) -> usize {
        match self.op {
            DiskOp::Data(data) => DISK_RECORD_LEN + data.len(),
            DiskOp::Zero(_) | DiskOp::Flush => DISK_RECORD_LEN,
        }
    }

    /// First byte behind the range that is written.
    pub fn end(&self) -> u64 {
        match self.op {
            DiskOp::Data(data) => self.offset + data.len() as u64,
            DiskOp::Zero(len) => self.offset + len,
            DiskOp::Flush => 0,
        }
    }
}

/// Appends a write of any length as one record or several.
pub fn put_write(out: &mut Vec<u8>, disk: u16, offset: u64, data: &[u8]) {
    for (index, part) in data.chunks(MAX_DISK_DATA).enumerate() {
        let offset = offset + (index * MAX_DISK_DATA) as u64;
        DiskRecord { disk, offset, op: DiskOp::Data(part) }.put(out);
    }
}

/// Bytes that are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} ({value:#x})")]
pub struct RecordError {
    /// What is wrong.
    pub what: &'static str,
    /// The value that is wrong.
    pub value: u64,
}

/// Records one after another, checked: every one is whole and makes sense by itself. Whether its disk exists
/// and is large enough is for the receiver to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskRecords<'a> {
    bytes: &'a [u8],
}

impl<'a> DiskRecords<'a> {
    /// Checks records that came from somewhere.
    ///
    /// # Errors
    /// What is wrong with the first that is no record.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = take(rest)?.1;
        }
        Ok(Self { bytes })
    }

    /// Records that have been checked.
    pub(crate) fn trusted(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The records as bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Every record in its order.
    pub fn iter(&self) -> impl Iterator<Item = DiskRecord<'a>> + 'a {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            // Checked by `parse`, so only the end of the bytes ends this.
            let (record, more) = take(rest).ok()?;
            rest = more;
            Some(record)
        })
    }
}

/// Takes the first record off.
fn take(bytes: &[u8]) -> Result<(DiskRecord<'_>, &[u8]), RecordError> {
    let wrong = |what, value| RecordError { what, value };
    let early = |missing: usize| wrong("a disk record ends early, bytes missing", missing as u64);
    let (head, rest) =
        Head::ref_from_prefix(bytes).map_err(|_| early(DISK_RECORD_LEN.saturating_sub(bytes.len())))?;
    let (offset, len) = (head.offset.get(), head.len.get());
    if head.zero != U32::ZERO {
        return Err(wrong("a reserved field of a disk record is not zero", head.zero.get().into()));
    }
    // Offsets of files are signed: nothing lies beyond.
    if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
        return Err(wrong("a disk write reaches beyond every disk, offset", offset));
    }
    let (op, rest) = match head.op.get() {
        1 if (1..=MAX_DISK_DATA as u64).contains(&len) => {
            let len = len as usize;
            let (data, rest) = rest.split_at_checked(len).ok_or_else(|| early(len - rest.len()))?;
            (DiskOp::Data(data), rest)
        }
        2 if len > 0 => (DiskOp::Zero(len), rest),
        3 if len == 0 && offset == 0 => (DiskOp::Flush, rest),
        1..=3 => return Err(wrong("a disk write of an impossible length", len)),
        other => return Err(wrong("a disk write of an unknown operation", other.into())),
    };
    Ok((DiskRecord { disk: head.disk.get(), offset, op }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(bytes: &[u8]) -> Result<Vec<DiskRecord<'_>>, String> {
        let records = DiskRecords::parse(bytes).map_err(|error| error.to_string())?;
        Ok(records.iter().collect())
    }

    #[test]
    fn a_long_write_becomes_several_records() {
        let data: Vec<u8> = (0..2 * MAX_DISK_DATA + 5).map(|at| (at / 7) as u8).collect();
        let mut out = Vec::new();
        put_write(&mut out, 3, 1000, &data);
        let parts = records(&out).unwrap();
        assert_eq!(parts.len(), 3);
        assert_eq!(parts.iter().map(DiskRecord::encoded_len).sum::<usize>(), out.len());
        let mut at = 1000;
        for part in parts {
            let DiskOp::Data(bytes) = part.op else { panic!("{part:?}") };
            assert_eq!((part.disk, part.offset), (3, at));
            assert_eq!(bytes, &data[(at - 1000) as usize..(part.end() - 1000) as usize]);
            at = part.end();
        }
        assert_eq!(at, 1000 + data.len() as u64);
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
            records(&bytes).map(|records| records.len())
        };
        assert_eq!(record(1, 0, 0, 4, 4), Ok(1));
        assert_eq!(record(2, 0, 8, u64::from(u32::MAX), 0), Ok(1));
        assert_eq!(record(3, 0, 0, 0, 0), Ok(1));
        for (op, reserved, offset, len, data, why) in [
            (1, 0, 0, 5, 4, "a disk record ends early, bytes missing (0x1)"),
            (1, 0, 0, 0, 0, "a disk write of an impossible length (0x0)"),
            (1, 0, 0, (1 << 20) + 1, 4, "a disk write of an impossible length (0x100001)"),
            (1, 0, u64::MAX, 1, 1, "a disk write reaches beyond every disk, offset (0xffffffffffffffff)"),
            (
                2,
                0,
                1 << 62,
                1 << 62,
                0,
                "a disk write reaches beyond every disk, offset (0x4000000000000000)",
            ),
            (2, 0, 0, 0, 0, "a disk write of an impossible length (0x0)"),
            (3, 0, 1, 0, 0, "a disk write of an impossible length (0x0)"),
            (4, 0, 0, 0, 0, "a disk write of an unknown operation (0x4)"),
            (0, 0, 0, 0, 0, "a disk write of an unknown operation (0x0)"),
            (2, 1 << 31, 0, 8, 0, "a reserved field of a disk record is not zero (0x80000000)"),
            // Three stray bytes are the start of a record that ends early.
            (2, 0, 0, 8, 3, "a disk record ends early, bytes missing (0x15)"),
        ] {
            assert_eq!(record(op, reserved, offset, len, data), Err(why.to_owned()), "{op} {offset} {len}");
        }
    }
}
