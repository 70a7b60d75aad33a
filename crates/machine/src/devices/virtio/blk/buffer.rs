//! The disk writes of one epoch, in order, in memory that was allocated before.

use std::fmt;

/// Bytes of a record before its data: disk, kind, offset, length.
const HEADER: usize = 2 + 1 + 8 + 8;

const DATA: u8 = 0;
const ZERO: u8 = 1;
const FLUSH: u8 = 2;

/// What was done to a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum DiskOp<'a> {
    /// These bytes were written.
    Data(&'a [u8]),
    /// So many bytes became zero: by writing zeroes, or by a discard.
    Zero(u64),
    /// The guest made everything durable that came before. The offset is 0.
    Flush,
}

/// One record of a [`WriteBuffer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskWrite<'a> {
    /// Which disk of the machine.
    pub disk: u16,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// What was done there.
    pub op: DiskOp<'a>,
}

/// Records of what was done to the disks, in order.
///
/// All memory is allocated by [`with_capacity`](Self::with_capacity); a record that does not fit is refused.
#[derive(Default)]
pub struct WriteBuffer {
    bytes: Vec<u8>,
    /// The vector may have got more than was asked for; this is what was.
    capacity: usize,
    records: usize,
}

impl WriteBuffer {
    /// Bytes that a record takes up besides its data.
    pub const RECORD: usize = HEADER;

    /// An empty buffer that takes records of `bytes` bytes together, their headers counted.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), capacity: bytes, records: 0 }
    }

    /// Most bytes of records.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of the records in it, their headers counted.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// How many records are in it.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Whether no record is in it.
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Forgets the records; keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.records = 0;
    }

    /// Adds a record. Returns whether there was room for it.
    #[must_use = "a record that finds no room is not stored"]
    pub fn push(&mut self, write: DiskWrite<'_>) -> bool {
        let (kind, len, data) = match write.op {
            DiskOp::Data(data) => (DATA, data.len() as u64, data),
            DiskOp::Zero(len) => (ZERO, len, &[][..]),
            DiskOp::Flush => (FLUSH, 0, &[][..]),
        };
        if self.capacity - self.bytes.len() < HEADER + data.len() {
            return false;
        }
        self.bytes.extend_from_slice(&write.disk.to_le_bytes());
        self.bytes.push(kind);
        self.bytes.extend_from_slice(&write.offset.to_le_bytes());
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(data);
        self.records += 1;
        true
    }

    /// The records, oldest first.
    pub fn iter(&self) -> DiskWrites<'_> {
        DiskWrites { rest: &self.bytes }
    }
}

impl<'a> IntoIterator for &'a WriteBuffer {
    type Item = DiskWrite<'a>;
    type IntoIter = DiskWrites<'a>;

    fn into_iter(self) -> DiskWrites<'a> {
        self.iter()
    }
}

impl fmt::Debug for WriteBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteBuffer")
            .field("records", &self.records)
            .field("bytes", &self.bytes.len())
            .field("capacity", &self.capacity)
            .finish()
    }
}

impl fmt::Debug for DiskOp<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(data) => write!(f, "Data({} bytes)", data.len()),
            Self::Zero(len) => write!(f, "Zero({len})"),
            Self::Flush => write!(f, "Flush"),
        }
    }
}

/// The records of a [`WriteBuffer`], oldest first.
#[derive(Clone, Debug)]
pub struct DiskWrites<'a> {
    rest: &'a [u8],
}

impl<'a> DiskWrites<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }
}

impl<'a> Iterator for DiskWrites<'a> {
    type Item = DiskWrite<'a>;

    fn next(&mut self) -> Option<DiskWrite<'a>> {
        let disk = u16::from_le_bytes(self.take()?);
        let [kind] = self.take()?;
        let offset = u64::from_le_bytes(self.take()?);
        let len = u64::from_le_bytes(self.take()?);
        let op = match kind {
            DATA => {
                // Only `push` writes records, so that the data is all there.
                let (data, rest) = self.rest.split_at_checked(usize::try_from(len).ok()?)?;
                self.rest = rest;
                DiskOp::Data(data)
            }
            ZERO => DiskOp::Zero(len),
            _ => DiskOp::Flush,
        };
        Some(DiskWrite { disk, offset, op })
    }
}
