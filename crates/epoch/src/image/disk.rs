//! Disk writes, in the one form that they have all the way from the machine's write log to the standby's
//! journal.
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

use std::collections::TryReserveError;
use std::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::limits::{DISK_RECORD_DATA, MAX_DISK_DATA};

/// The fields in front of a record's data.
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

const OP_DATA: u16 = 1;
const OP_ZERO: u16 = 2;
const OP_FLUSH: u16 = 3;

/// File offsets are signed, so no disk reaches beyond this.
const MAX_END: u64 = i64::MAX as u64;

/// What a record does to its disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum DiskOp<'a> {
    /// Writes these bytes. A record has 1 to [`MAX_DISK_DATA`].
    Data(&'a [u8]),
    /// Makes this many bytes zero.
    Zero(u64),
    /// Makes everything written before durable.
    Flush,
}

impl fmt::Debug for DiskOp<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(data) => write!(f, "Data({} bytes)", data.len()),
            Self::Zero(len) => write!(f, "Zero({len})"),
            Self::Flush => f.write_str("Flush"),
        }
    }
}

/// One write to one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRecord<'a> {
    /// The disk's position among the VM's disks.
    pub disk: u16,
    /// The offset in bytes; 0 for a flush.
    pub offset: u64,
    /// The operation.
    pub op: DiskOp<'a>,
}

impl DiskRecord<'_> {
    /// Bytes of the range that is written.
    pub fn len(&self) -> u64 {
        match self.op {
            DiskOp::Data(data) => data.len() as u64,
            DiskOp::Zero(len) => len,
            DiskOp::Flush => 0,
        }
    }

    /// Whether it writes nothing: a flush.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the record takes.
    fn put_len(&self) -> usize {
        match self.op {
            DiskOp::Data(data) => DISK_RECORD_LEN + data.len(),
            DiskOp::Zero(_) | DiskOp::Flush => DISK_RECORD_LEN,
        }
    }

    /// First byte behind the range that is written. It always fits a `u64`.
    pub fn end(&self) -> u64 {
        self.offset + self.len()
    }
}

/// Why bytes are no record, or a record belongs to no disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not the bytes of a record.
    #[error("{what} ({value:#x})")]
    Malformed {
        /// What is wrong.
        what: &'static str,
        /// The value that is wrong.
        value: u64,
    },
    /// For a disk that is not replicated, or beyond its end.
    #[error("a write to disk {disk} at {offset:#x} is outside the VM's disks")]
    OutsideDisk {
        /// The disk.
        disk: u16,
        /// The record's offset.
        offset: u64,
    },
}

/// Records as they came from a peer or a file, not yet checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UncheckedRecords<'a>(&'a [u8]);

impl<'a> UncheckedRecords<'a> {
    /// Takes any bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing to check.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks every record: it is whole, makes sense and lies within its disk. `disks` has each disk's size
    /// in bytes, 0 for one that is not replicated.
    ///
    /// # Errors
    /// What is wrong with the first record that is refused.
    pub fn check(self, disks: &[u64]) -> Result<DiskRecords<'a>, RecordError> {
        self.walk(disks, |_| {})?;
        Ok(DiskRecords { bytes: self.0 })
    }

    fn walk(self, disks: &[u64], mut each: impl FnMut(&DiskRecord<'a>)) -> Result<(), RecordError> {
        let mut rest = self.0;
        while !rest.is_empty() {
            let (record, more) = take(rest)?;
            let size = disks.get(usize::from(record.disk)).copied().unwrap_or(0);
            if size == 0 || record.end() > size {
                return Err(RecordError::OutsideDisk { disk: record.disk, offset: record.offset });
            }
            each(&record);
            rest = more;
        }
        Ok(())
    }
}

/// Records one after another, all whole and valid: a [`RecordBuf`] wrote them, or
/// [`check`](UncheckedRecords::check) checked them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskRecords<'a> {
    bytes: &'a [u8],
}

impl<'a> DiskRecords<'a> {
    /// The records as bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Every record in order.
    pub fn iter(&self) -> impl Iterator<Item = DiskRecord<'a>> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            // All records here are whole, so only the end of the bytes ends this.
            let (record, more) = take(rest).ok()?;
            rest = more;
            Some(record)
        })
    }
}

/// Records of an epoch, or of a part of a disk, in memory that was allocated beforehand: a record that does
/// not fit is refused.
#[derive(Default, PartialEq, Eq)]
pub struct RecordBuf {
    bytes: Vec<u8>,
    /// The capacity that was asked for; the vector may have more.
    capacity: usize,
    flush: bool,
    /// Bytes that the records make zero.
    zeroed: u64,
}

impl RecordBuf {
    /// An empty buffer for records of `bytes` bytes in all, counting [`DISK_RECORD_LEN`] for each.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), capacity: bytes, flush: false, zeroed: 0 }
    }

    /// Gives an empty buffer another capacity, keeping its memory if that is enough. The number may come from
    /// a peer: too large a number does not end the process.
    ///
    /// # Errors
    /// When there is not that much memory.
    pub fn empty_for(&mut self, bytes: usize) -> Result<(), TryReserveError> {
        self.clear();
        self.bytes.try_reserve_exact(bytes)?;
        self.capacity = bytes;
        Ok(())
    }

    /// Bytes of memory that the buffer holds.
    pub fn memory(&self) -> usize {
        self.bytes.capacity()
    }

    /// Most bytes of records.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of the records in it.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes that carrying the records out may write: a few bytes of a record can make a gigabyte zero, and
    /// some file systems have to write it.
    pub fn work(&self) -> usize {
        usize::try_from(self.zeroed).unwrap_or(usize::MAX).saturating_add(self.len())
    }

    /// Whether the buffer has no record.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether the guest asked for its writes to be durable.
    pub fn has_flush(&self) -> bool {
        self.flush
    }

    /// Forgets the records; keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.flush = false;
        self.zeroed = 0;
    }

    /// Makes it a copy of another buffer. Allocates only if there is too little room.
    ///
    /// # Errors
    /// When there is not that much memory; the buffer is empty then.
    pub fn try_copy_from(&mut self, other: &Self) -> Result<(), TryReserveError> {
        self.empty_for(other.len())?;
        self.bytes.extend_from_slice(&other.bytes);
        (self.flush, self.zeroed) = (other.flush, other.zeroed);
        Ok(())
    }

    /// Adds a write. Data of more than [`DISK_RECORD_DATA`] becomes several records; a write of no bytes that
    /// is no flush changes nothing and becomes none. Returns whether there was room; if not, nothing is
    /// added.
    #[must_use = "a record that finds no room is not stored"]
    pub fn push(&mut self, record: DiskRecord<'_>) -> bool {
        let DiskRecord { disk, offset, op } = record;
        debug_assert!(offset.checked_add(record.len()).is_some_and(|end| end <= MAX_END), "{record:?}");
        match op {
            DiskOp::Data(data) => {
                let heads = data.len().div_ceil(DISK_RECORD_DATA) * DISK_RECORD_LEN;
                if self.room() < heads + data.len() {
                    return false;
                }
                for (index, part) in data.chunks(DISK_RECORD_DATA).enumerate() {
                    self.put(
                        disk,
                        OP_DATA,
                        offset + (index * DISK_RECORD_DATA) as u64,
                        part.len() as u64,
                        part,
                    );
                }
            }
            DiskOp::Zero(0) => {}
            DiskOp::Zero(_) | DiskOp::Flush if self.room() < DISK_RECORD_LEN => return false,
            DiskOp::Zero(len) => {
                self.put(disk, OP_ZERO, offset, len, &[]);
                self.zeroed = self.zeroed.saturating_add(len);
            }
            DiskOp::Flush => {
                self.put(disk, OP_FLUSH, 0, 0, &[]);
                self.flush = true;
            }
        }
        true
    }

    /// Checks records as [`UncheckedRecords::check`] does and adds a copy of them, in one walk.
    ///
    /// # Errors
    /// What is wrong with the first record that is refused. Nothing is added then.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn check_and_append(
        &mut self,
        records: UncheckedRecords<'_>,
        disks: &[u64],
    ) -> Result<(), RecordError> {
        assert!(records.len() <= self.room(), "no room for {} bytes of records", records.len());
        let (mut flush, mut zeroed) = (self.flush, self.zeroed);
        records.walk(disks, |record| match record.op {
            DiskOp::Flush => flush = true,
            DiskOp::Zero(len) => zeroed = zeroed.saturating_add(len),
            DiskOp::Data(_) => {}
        })?;
        (self.flush, self.zeroed) = (flush, zeroed);
        self.bytes.extend_from_slice(records.0);
        Ok(())
    }

    /// All records.
    pub fn records(&self) -> DiskRecords<'_> {
        DiskRecords { bytes: &self.bytes }
    }

    /// Every record in order.
    pub fn iter(&self) -> impl Iterator<Item = DiskRecord<'_>> {
        self.records().iter()
    }

    /// The records in sections of at most `bytes` bytes; a larger record is a section of its own. There is no
    /// section without a record. Every section fits the link if `bytes` is at most
    /// [`MAX_RECORD_BYTES`](super::limits::MAX_RECORD_BYTES).
    pub fn sections(&self, bytes: usize) -> impl Iterator<Item = DiskRecords<'_>> {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            let mut len = 0;
            while let Ok((record, _)) = take(&rest[len..])
                && (len == 0 || len + record.put_len() <= bytes)
            {
                len += record.put_len();
            }
            let bytes = rest.split_off(..len)?;
            (len > 0).then_some(DiskRecords { bytes })
        })
    }

    fn room(&self) -> usize {
        self.capacity - self.bytes.len()
    }

    fn put(&mut self, disk: u16, op: u16, offset: u64, len: u64, data: &[u8]) {
        let (disk, op, offset, len) = (disk.into(), op.into(), offset.into(), len.into());
        self.bytes.extend_from_slice(Head { disk, op, zero: U32::ZERO, offset, len }.as_bytes());
        self.bytes.extend_from_slice(data);
    }
}

impl fmt::Debug for RecordBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordBuf")
            .field("bytes", &self.bytes.len())
            .field("capacity", &self.capacity)
            .field("flush", &self.flush)
            .finish_non_exhaustive()
    }
}

/// Takes the first record off.
fn take(bytes: &[u8]) -> Result<(DiskRecord<'_>, &[u8]), RecordError> {
    let wrong = |what, value| RecordError::Malformed { what, value };
    let early = |missing: usize| wrong("a disk record ends early, bytes missing", missing as u64);
    let (head, rest) =
        Head::ref_from_prefix(bytes).map_err(|_| early(DISK_RECORD_LEN.saturating_sub(bytes.len())))?;
    let (offset, len) = (head.offset.get(), head.len.get());
    if head.zero != U32::ZERO {
        return Err(wrong("a reserved field of a disk record is not zero", head.zero.get().into()));
    }
    if offset.checked_add(len).is_none_or(|end| end > MAX_END) {
        return Err(wrong("a disk write reaches beyond every disk, offset", offset));
    }
    let (op, rest) = match head.op.get() {
        OP_DATA if (1..=MAX_DISK_DATA as u64).contains(&len) => {
            let len = len as usize;
            let (data, rest) = rest.split_at_checked(len).ok_or_else(|| early(len - rest.len()))?;
            (DiskOp::Data(data), rest)
        }
        OP_ZERO if len > 0 => (DiskOp::Zero(len), rest),
        OP_FLUSH if len == 0 && offset == 0 => (DiskOp::Flush, rest),
        OP_DATA | OP_ZERO | OP_FLUSH => {
            return Err(wrong("a disk write of an impossible length", len));
        }
        other => return Err(wrong("a disk write of an unknown operation", other.into())),
    };
    Ok((DiskRecord { disk: head.disk.get(), offset, op }, rest))
}

#[cfg(test)]
mod tests;
