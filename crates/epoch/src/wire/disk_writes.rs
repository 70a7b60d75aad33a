//! Disk records: the writes of an epoch, and the blocks of the base synchronisation.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::encoder::{EncodeError, Encoder, check_length};
use super::error::WireError;
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::DiskRecords;
use crate::image::limits::{MAX_PAYLOAD, MAX_RECORD_BYTES};

/// In front of the records stands the checkpoint's number (`DiskWrites`) or the round (`DiskBlocks`).
type Tag = U64;

const _: () = assert!(MAX_RECORD_BYTES == MAX_PAYLOAD - size_of::<Tag>());

/// Returns the tag and the records.
pub(super) fn parse(kind: SectionKind, payload: &[u8]) -> Result<(u64, DiskRecords<'_>), WireError> {
    let mut fields = Fields::new(kind, payload);
    let tag: &Tag = fields.fixed()?;
    let records = DiskRecords::parse(fields.rest()).map_err(|error| WireError::Malformed {
        kind,
        what: error.what,
        value: error.value,
    })?;
    Ok((tag.get(), records))
}

fn check(records: &[u8]) -> Result<(), EncodeError> {
    check_length("a section of disk records", records.len(), MAX_RECORD_BYTES)?;
    DiskRecords::parse(records).map(drop).map_err(|error| EncodeError::Records(error.to_string()))
}

impl Encoder {
    /// Appends the head of a `DiskWrites` section of the open checkpoint; `records` (see
    /// [`DiskRecord::put`](crate::image::DiskRecord::put)) must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Records`], [`EncodeError::Order`].
    pub fn disk_writes_head(&mut self, out: &mut Vec<u8>, records: &[u8]) -> Result<(), EncodeError> {
        check(records)?;
        let number = self.open("disk writes outside a checkpoint")?.add_disk_writes(records.len());
        let tag = Tag::new(number);
        self.chained(out, SectionKind::DiskWrites, records, |out| out.extend_from_slice(tag.as_bytes()));
        Ok(())
    }

    /// Appends the head of a `DiskBlocks` section; `records` must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Records`], [`EncodeError::Order`] inside a checkpoint.
    pub fn disk_blocks_head(
        &mut self,
        out: &mut Vec<u8>,
        round: u64,
        records: &[u8],
    ) -> Result<(), EncodeError> {
        self.outside_checkpoint("disk blocks inside a checkpoint")?;
        check(records)?;
        let tag = Tag::new(round);
        self.section(out, SectionKind::DiskBlocks, records, |out| out.extend_from_slice(tag.as_bytes()));
        Ok(())
    }
}
