//! Disk records: the writes of an epoch, and the blocks of the base synchronisation.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::encoder::{Encoder, check_length};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::{MAX_PAYLOAD, MAX_RECORD_BYTES};
use crate::image::{DiskRecords, UncheckedRecords};

/// The checkpoint's number (`DiskWrites`) or the round (`DiskBlocks`), in front of the records.
type Tag = U64;

const _: () = assert!(MAX_RECORD_BYTES == MAX_PAYLOAD - size_of::<Tag>());

/// Returns the tag and the records, which the receiver checks: only it knows the disks.
pub(super) fn parse(kind: SectionKind, payload: &[u8]) -> Result<(u64, UncheckedRecords<'_>), WireError> {
    let mut fields = Fields::new(kind, payload);
    let tag: &Tag = fields.fixed()?;
    Ok((tag.get(), UncheckedRecords::new(fields.rest())))
}

fn check(records: &DiskRecords<'_>) -> Result<(), EncodeError> {
    check_length("a section of disk records", records.bytes().len(), MAX_RECORD_BYTES)
}

impl Encoder {
    /// Appends the head of a `DiskWrites` section of the open checkpoint; the bytes of `records` (see
    /// [`RecordBuf::sections`](crate::image::RecordBuf::sections)) must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Order`].
    pub fn disk_writes_head(
        &mut self,
        out: &mut Vec<u8>,
        records: DiskRecords<'_>,
    ) -> Result<(), EncodeError> {
        check(&records)?;
        let bytes = records.bytes();
        let number = self.open("disk writes outside a checkpoint")?.add_disk_writes(bytes.len());
        let tag = Tag::new(number);
        self.chained(out, SectionKind::DiskWrites, bytes, |out| out.extend_from_slice(tag.as_bytes()));
        Ok(())
    }

    /// Appends the head of a `DiskBlocks` section; the bytes of `records` must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Order`] inside a checkpoint.
    pub fn disk_blocks_head(
        &mut self,
        out: &mut Vec<u8>,
        round: u64,
        records: DiskRecords<'_>,
    ) -> Result<(), EncodeError> {
        self.outside_checkpoint("disk blocks inside a checkpoint")?;
        check(&records)?;
        let tag = Tag::new(round);
        self.section(out, SectionKind::DiskBlocks, records.bytes(), |out| {
            out.extend_from_slice(tag.as_bytes())
        });
        Ok(())
    }
}
