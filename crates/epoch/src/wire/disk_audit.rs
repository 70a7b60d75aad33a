//! Sums of chunks of disks that the standby compares with its images, and what comes of it. From version 7 of the
//! stream on.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{Encoder, check_length};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::{DISK_CHUNK, MAX_AUDIT_CHUNKS, MAX_AUDIT_RANGES};

/// The checkpoint's number, in front of the ranges.
type Head = U64;

pub(super) const HEAD_LEN: usize = size_of::<Head>();

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Range {
    disk: U16,
    zero: U16,
    count: U32,
    first: U64,
    sum: U64,
}

pub(super) const RANGE_LEN: usize = size_of::<Range>();

/// Chunks of a disk that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChunkRange {
    /// The disk.
    pub disk: u16,
    /// The first chunk.
    pub first: u64,
    /// How many: 1 to [`MAX_AUDIT_CHUNKS`].
    pub count: u32,
}

impl ChunkRange {
    /// The first byte of it.
    pub fn offset(&self) -> u64 {
        self.first * DISK_CHUNK as u64
    }

    /// Its length in bytes, if the disk does not end in it.
    pub fn len(&self) -> u64 {
        u64::from(self.count) * DISK_CHUNK as u64
    }

    /// Whether it has no chunk.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether a disk of so many bytes has all of its chunks.
    pub fn fits(&self, bytes: u64) -> bool {
        self.first.checked_add(self.count.into()).is_some_and(|end| end <= bytes.div_ceil(DISK_CHUNK as u64))
    }

    fn parse(fields: &Fields<'_>, (disk, first, count): (U16, U64, U32)) -> Result<Self, WireError> {
        let range = Self { disk: disk.get(), first: first.get(), count: count.get() };
        if range.count == 0 || range.count > MAX_AUDIT_CHUNKS {
            return Err(fields.malformed("a range of no chunks, or of too many", range.count.into()));
        }
        if range.first > i64::MAX as u64 / DISK_CHUNK as u64 {
            return Err(fields.malformed("a range beyond every disk, first chunk", range.first));
        }
        Ok(range)
    }
}

/// One chunk and its hash, or several that are all zero. The hash of a chunk of zeroes is 0. How the others are
/// computed is agreed on by the version of the stream: xxh3 (64 bits) of the chunk, with its number as the seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditRange {
    /// The chunks.
    pub chunks: ChunkRange,
    /// The hash; 0 for zeroes.
    pub sum: u64,
}

/// Sums of chunks as they are at the open checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskAudit<'a> {
    /// The checkpoint's number.
    pub checkpoint: u64,
    ranges: &'a [[u8; RANGE_LEN]],
}

impl<'a> DiskAudit<'a> {
    pub(super) fn parse(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::DiskAudit, payload);
        let head: &Head = fields.fixed()?;
        let count = fields.len() / RANGE_LEN;
        if count > MAX_AUDIT_RANGES {
            return Err(fields.malformed("more ranges than a section may have", count as u64));
        }
        let audit = Self { checkpoint: head.get(), ranges: fields.row(count)? };
        for bytes in audit.ranges {
            let Range { disk, zero, count, first, sum } = zerocopy::transmute_ref!(bytes);
            if zero.get() != 0 {
                return Err(fields.malformed("a reserved field that is not zero", zero.get().into()));
            }
            let chunks = ChunkRange::parse(&fields, (*disk, *first, *count))?;
            if chunks.count > 1 && sum.get() != 0 {
                return Err(
                    fields.malformed("several chunks that are not all zero, first chunk", chunks.first)
                );
            }
        }
        fields.end()?;
        Ok(audit)
    }

    /// The ranges.
    pub fn ranges(&self) -> impl Iterator<Item = AuditRange> + use<'a> {
        self.ranges.iter().map(|bytes| {
            let Range { disk, zero: _, count, first, sum } = zerocopy::transmute_ref!(bytes);
            let chunks = ChunkRange { disk: disk.get(), first: first.get(), count: count.get() };
            AuditRange { chunks, sum: sum.get() }
        })
    }
}

/// What the standby has compared of its disks since the base, and what differs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskAudited {
    /// The newest checkpoint of which chunks were compared.
    pub checkpoint: u64,
    /// How many chunks were compared.
    pub chunks: u64,
    /// How long that took a processor of the standby, in nanoseconds.
    pub spent_ns: u64,
    /// How long the standby's disks took to read them, in nanoseconds.
    pub read_ns: u64,
    /// The chunks of which at least one differs. `None`: all are the VM's.
    pub differs: Option<ChunkRange>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Report {
    checkpoint: U64,
    chunks: U64,
    spent_ns: U64,
    read_ns: U64,
    disk: U16,
    zero: U16,
    /// 0: nothing differs.
    count: U32,
    first: U64,
}

pub(super) const REPORT_LEN: usize = size_of::<Report>();

impl DiskAudited {
    pub(super) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::DiskAudited, payload);
        let Report { checkpoint, chunks, spent_ns, read_ns, disk, zero, count, first } = fields.fixed()?;
        if zero.get() != 0 {
            return Err(fields.malformed("a reserved field that is not zero", zero.get().into()));
        }
        let differs = match count.get() {
            0 => None,
            _ => Some(ChunkRange::parse(&fields, (*disk, *first, *count))?),
        };
        fields.end()?;
        let (checkpoint, chunks) = (checkpoint.get(), chunks.get());
        Ok(Self { checkpoint, chunks, spent_ns: spent_ns.get(), read_ns: read_ns.get(), differs })
    }
}

impl Encoder {
    /// Appends the sums of the open checkpoint; at most one such section belongs to a checkpoint.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Order`] outside a checkpoint and in an older stream.
    pub fn disk_audit(&mut self, out: &mut Vec<u8>, ranges: &[AuditRange]) -> Result<(), EncodeError> {
        if self.version_of(SectionKind::DiskAudit) == 0 {
            return Err(EncodeError::Order("an audit of disks in a stream that has none"));
        }
        check_length("the ranges of an audit", ranges.len(), MAX_AUDIT_RANGES)?;
        let number = Head::new(self.open("an audit of disks outside a checkpoint")?.number);
        self.chained(out, SectionKind::DiskAudit, &[], |out| {
            out.extend_from_slice(number.as_bytes());
            for &AuditRange { chunks: ChunkRange { disk, first, count }, sum } in ranges {
                let (disk, zero) = (disk.into(), 0.into());
                let range = Range { disk, zero, count: count.into(), first: first.into(), sum: sum.into() };
                out.extend_from_slice(range.as_bytes());
            }
        });
        Ok(())
    }

    /// Appends what the standby has compared of its disks.
    ///
    /// # Errors
    /// [`EncodeError::Order`] in an older stream.
    pub fn disk_audited(&mut self, out: &mut Vec<u8>, audited: &DiskAudited) -> Result<(), EncodeError> {
        if self.version_of(SectionKind::DiskAudited) == 0 {
            return Err(EncodeError::Order("the result of an audit of disks in a stream that has none"));
        }
        let DiskAudited { checkpoint, chunks, spent_ns, read_ns, differs } = *audited;
        let ChunkRange { disk, first, count } = differs.unwrap_or_default();
        let report = Report {
            checkpoint: checkpoint.into(),
            chunks: chunks.into(),
            spent_ns: spent_ns.into(),
            read_ns: read_ns.into(),
            disk: disk.into(),
            zero: 0.into(),
            count: count.into(),
            first: first.into(),
        };
        self.section(out, SectionKind::DiskAudited, &[], |out| out.extend_from_slice(report.as_bytes()));
        Ok(())
    }
}
