//! Disks on the wire: records of writes, and the sums, wishes and blocks of the base synchronisation.
//!
//! A *record* is one write. The same bytes stand in a `DiskWrites` section, in a `DiskBlocks` section, in the
//! standby's memory and in its journal, so a record is checked once and never written down again:
//!
//! | bytes | field |
//! |---|---|
//! | 0..2 | disk: its position among the VM's disks |
//! | 2..4 | operation: 1 data, 2 zeroes, 3 flush |
//! | 4..8 | zero |
//! | 8..16 | offset in bytes |
//! | 16..24 | length in bytes |
//! | 24.. | the data, for operation 1 |

use crate::error::WireError;
use crate::fields::Fields;
use crate::section::{Kind, MAX_PAYLOAD};

/// Bytes of a chunk, the unit of base synchronisation. The last chunk of a disk may be shorter.
pub const DISK_CHUNK: usize = 64 * 1024;
/// Most data of one record. A longer write is put down as several.
pub const MAX_DISK_DATA: usize = 1 << 20;
/// Bytes of a record before its data.
pub const DISK_RECORD_LEN: usize = 24;
/// Bytes of a chunk's sum.
pub const DISK_SUM_LEN: usize = 32;
/// Most sums of one `DiskSums` section.
pub const MAX_SUMS: usize = 256;
/// Most chunks that a `DiskSums` section without sums may declare to be zero.
pub const MAX_ZERO_CHUNKS: u32 = 16 * 1024;

/// Fixed fields before the records of `DiskWrites` and `DiskBlocks`: the tag.
pub(crate) const RECORDS_FIXED: usize = 8;
/// Fixed fields of `DiskSums` and `DiskWant`.
pub(crate) const WINDOW_FIXED: usize = 16;

/// Most bytes of all records of one section.
pub const MAX_RECORD_BYTES: usize = MAX_PAYLOAD - RECORDS_FIXED;

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
            DiskOp::Data(data) => (1u16, data.len() as u64, data),
            DiskOp::Zero(len) => (2, len, &[][..]),
            DiskOp::Flush => (3, 0, &[][..]),
        };
        out.extend_from_slice(&self.disk.to_le_bytes());
        out.extend_from_slice(&op.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&len.to_le_bytes());
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

/// Records one after another, checked: every one is whole and makes sense by itself. Whether its disk exists
/// and is large enough is for the receiver to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskRecords<'a> {
    bytes: &'a [u8],
}

impl<'a> DiskRecords<'a> {
    /// Checks the records of a section.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn parse(kind: Kind, bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = take(kind, rest)?.1;
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
            let (record, more) = take(Kind::DiskWrites, rest).ok()?;
            rest = more;
            Some(record)
        })
    }
}

/// Takes the first record off.
fn take(kind: Kind, bytes: &[u8]) -> Result<(DiskRecord<'_>, &[u8]), WireError> {
    let mut fields = Fields::new(kind, bytes);
    let disk = fields.u16()?;
    let op = fields.u16()?;
    fields.reserved(4)?;
    let (offset, len) = (fields.u64()?, fields.u64()?);
    // Offsets of files are signed: nothing lies beyond.
    if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
        return Err(fields.malformed("a disk write reaches beyond every disk, offset", offset));
    }
    let op = match op {
        1 if (1..=MAX_DISK_DATA as u64).contains(&len) => DiskOp::Data(fields.bytes(len as usize)?),
        2 if len > 0 => DiskOp::Zero(len),
        3 if len == 0 && offset == 0 => DiskOp::Flush,
        1..=3 => return Err(fields.malformed("a disk write of an impossible length", len)),
        other => return Err(fields.malformed("a disk write of an unknown operation", other.into())),
    };
    Ok((DiskRecord { disk, offset, op }, fields.rest()))
}

/// The payload of `DiskWrites` (the tag is the checkpoint's number) and `DiskBlocks` (the tag is the round).
pub(crate) fn parse_tagged(kind: Kind, payload: &[u8]) -> Result<(u64, DiskRecords<'_>), WireError> {
    let mut fields = Fields::new(kind, payload);
    let tag = fields.u64()?;
    Ok((tag, DiskRecords::parse(kind, fields.rest())?))
}

/// Sums of the chunks of a part of a disk, the *window*. An empty window asks the standby to make durable
/// what it has written of this disk.
///
/// `u16` disk, `u16` 1 if all chunks are zero else 0, `u32` count, `u64` first chunk, `count` sums of 32
/// bytes unless all are zero. A sum of 32 zero bytes stands for a chunk of zeroes; any other is the BLAKE3
/// hash of the chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSums<'a> {
    /// The disk.
    pub disk: u16,
    /// First chunk of the window.
    pub first: u64,
    /// Chunks of the window: at most [`MAX_SUMS`], or [`MAX_ZERO_CHUNKS`] if all are zero.
    pub count: u32,
    /// One sum a chunk; `None` if all chunks are zero.
    pub sums: Option<&'a [[u8; DISK_SUM_LEN]]>,
}

impl<'a> DiskSums<'a> {
    pub(crate) fn parse(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::DiskSums, payload);
        let (disk, zero) = (fields.u16()?, fields.u16()?);
        let (count, first) = (fields.u32()?, fields.u64()?);
        check_window(&fields, first, count)?;
        let sums = match zero {
            1 => {
                fields.end()?;
                None
            }
            0 if count as usize <= MAX_SUMS => {
                let (sums, _) = fields.bytes(count as usize * DISK_SUM_LEN)?.as_chunks();
                fields.end()?;
                Some(sums)
            }
            0 => return Err(fields.malformed("more sums than a section may have", count.into())),
            other => return Err(fields.malformed("the zero flag is neither 0 nor 1", other.into())),
        };
        Ok(Self { disk, first, count, sums })
    }
}

/// Which chunks of a window the standby wants, the answer to every [`DiskSums`], in their order.
///
/// `u16` disk, `u16` chunks wanted, `u32` chunks of the window, `u64` first chunk of the window, and for each
/// wanted chunk a `u16`, its position in the window, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWant {
    /// The disk.
    pub disk: u16,
    /// First chunk of the window.
    pub first: u64,
    /// Chunks of the window.
    pub count: u32,
    /// Positions in the window, ascending, at most [`MAX_SUMS`].
    pub wanted: Vec<u16>,
}

impl DiskWant {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::DiskWant, payload);
        let (disk, length) = (fields.u16()?, usize::from(fields.u16()?));
        let (count, first) = (fields.u32()?, fields.u64()?);
        check_window(&fields, first, count)?;
        if length > MAX_SUMS {
            return Err(fields.malformed("more chunks wanted than a window has", length as u64));
        }
        let mut wanted = Vec::with_capacity(length);
        for _ in 0..length {
            let at = fields.u16()?;
            if u32::from(at) >= count || wanted.last().is_some_and(|last| *last >= at) {
                return Err(fields.malformed("a wanted chunk is out of order or its window", at.into()));
            }
            wanted.push(at);
        }
        fields.end()?;
        Ok(Self { disk, first, count, wanted })
    }
}

fn check_window(fields: &Fields<'_>, first: u64, count: u32) -> Result<(), WireError> {
    if count > MAX_ZERO_CHUNKS {
        return Err(fields.malformed("a window of too many chunks", count.into()));
    }
    if first > i64::MAX as u64 / DISK_CHUNK as u64 {
        return Err(fields.malformed("a window beyond every disk, first chunk", first));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(bytes: &[u8]) -> Result<Vec<DiskRecord<'_>>, String> {
        let records = DiskRecords::parse(Kind::DiskWrites, bytes).map_err(|error| error.to_string())?;
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
        let record = |op: u16, offset: u64, len: u64, data: usize| {
            let mut bytes = vec![1, 0];
            bytes.extend_from_slice(&op.to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.resize(bytes.len() + data, 9);
            records(&bytes).map(|records| records.len())
        };
        assert_eq!(record(1, 0, 4, 4), Ok(1));
        assert_eq!(record(2, 8, u64::from(u32::MAX), 0), Ok(1));
        assert_eq!(record(3, 0, 0, 0), Ok(1));
        for (op, offset, len, data, why) in [
            (1, 0, 5, 4, "the payload ends early, bytes missing (0x1)"),
            (1, 0, 0, 0, "a disk write of an impossible length (0x0)"),
            (1, 0, (1 << 20) + 1, 4, "a disk write of an impossible length (0x100001)"),
            (1, u64::MAX, 1, 1, "a disk write reaches beyond every disk, offset (0xffffffffffffffff)"),
            (2, 1 << 62, 1 << 62, 0, "a disk write reaches beyond every disk, offset (0x4000000000000000)"),
            (2, 0, 0, 0, "a disk write of an impossible length (0x0)"),
            (3, 1, 0, 0, "a disk write of an impossible length (0x0)"),
            (4, 0, 0, 0, "a disk write of an unknown operation (0x4)"),
            (0, 0, 0, 0, "a disk write of an unknown operation (0x0)"),
            (2, 0, 8, 3, "the payload ends early, bytes missing (0x1)"),
        ] {
            let found = record(op, offset, len, data).map_err(|e| e.replace("section DiskWrites: ", ""));
            let expected = Err(why.to_owned());
            // Three stray bytes are the start of a record that ends early.
            if data == 3 {
                assert!(found.is_err())
            } else {
                assert_eq!(found, expected, "{op} {offset} {len}")
            }
        }
    }
}
