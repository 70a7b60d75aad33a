//! Hyper-V's format: two headers, a table of regions, a table of what the disk is, a map of blocks, blocks.

use std::path::Path;

use crate::Format;
use crate::bytes::{le16, le32, le64};
use crate::error::{OpenError, ReadError};
use crate::layer::{Layer, Note, Place, Window, disk_bytes, joined};
use crate::source::{Source, read_vec};

/// Where the two headers are, and the two tables of regions.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
const HEADER: usize = 4 << 10;
const TABLE: usize = 64 << 10;
/// Most entries of either table.
const MOST_ENTRIES: u32 = 2047;
/// Names of regions and of what the second table has, as they stand in a file.
const MAP: u128 = guid(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
const METADATA: u128 = guid(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);
const PARAMETERS: u128 = guid(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
const LENGTH: u128 = guid(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
const SECTOR: u128 = guid(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
/// States of a block.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const PRESENT: u64 = 6;
/// An entry for so many sectors of the disk is of another kind, and stands between those of blocks.
const CHUNK_SECTORS: u64 = 1 << 23;
/// Offsets in the map are whole megabytes.
const OFFSET: u64 = !0xf_ffff;
/// How many bytes are joined to one place.
const JOINED: u64 = 64 << 20;

/// A name as it stands in a file: its first three parts have their lowest bytes first.
const fn guid(written: u128) -> u128 {
    let bytes = written.to_be_bytes();
    u128::from_le_bytes([
        bytes[3], bytes[2], bytes[1], bytes[0], bytes[5], bytes[4], bytes[7], bytes[6], bytes[8], bytes[9],
        bytes[10], bytes[11], bytes[12], bytes[13], bytes[14], bytes[15],
    ])
}

fn guid_at(bytes: &[u8], at: usize) -> u128 {
    u128::from(le64(bytes, at)) | u128::from(le64(bytes, at + 8)) << 64
}

pub(crate) struct Vhdx {
    source: Box<dyn Source>,
    bytes: u64,
    block: u64,
    sector: u32,
    map: Window,
    /// How many entries the map has.
    entries: u64,
}

/// What the disk is.
#[derive(Default)]
struct About {
    bytes: u64,
    block: u64,
    has_parent: bool,
    sector: u32,
}

impl Vhdx {
    pub(crate) fn open(source: Box<dyn Source>, path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Tables { path: path.to_owned(), format: Format::Vhdx, source };
        let header = header(&*source).map_err(failed)?;
        if guid_at(&header, 48) != 0 {
            return Err(OpenError::Log(path.to_owned()));
        }
        let (map, metadata) = regions(&*source).map_err(failed)?;
        let about = about(&*source, metadata).map_err(failed)?;
        if about.has_parent {
            let what = "has only what differs from another image (it is of a snapshot)".to_owned();
            return Err(OpenError::NotRead { path: path.to_owned(), format: "vhdx", what });
        }
        Self::with(source, map, &about).map_err(failed)
    }

    fn with(source: Box<dyn Source>, map: (u64, u32), about: &About) -> Result<Self, ReadError> {
        let bytes = disk_bytes(about.bytes)?;
        let (block, sector) = (about.block, about.sector);
        if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
            return Err(ReadError::Damaged(format!("it has blocks of {block} bytes")));
        }
        if !matches!(sector, 512 | 4096) {
            return Err(ReadError::Damaged(format!("it has sectors of {sector} bytes")));
        }
        let (offset, entries) = (map.0, u64::from(map.1) / 8);
        let image = Self { source, bytes, block, sector, map: Window::new(offset), entries };
        if image.entry(bytes.div_ceil(block) - 1) >= entries {
            return Err(ReadError::damaged("its map is smaller than its disk"));
        }
        Ok(image)
    }

    /// Which entry of the map is this block's.
    fn entry(&self, block: u64) -> u64 {
        let ratio = CHUNK_SECTORS * u64::from(self.sector) / self.block;
        block + block / ratio
    }
}

/// CRC-32C of a table, in which the four bytes of the sum are zero. Tables have 64 KiB, so it need not be fast.
fn sum(table: &[u8]) -> u32 {
    let sum = table.iter().enumerate().fold(u32::MAX, |sum, (at, byte)| {
        let byte = if (4..8).contains(&at) { 0 } else { *byte };
        (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg()))
    });
    !sum
}

fn has_sum(table: &[u8]) -> bool {
    sum(table) == le32(table, 4)
}

/// The newer one of the headers that are whole.
fn header(source: &dyn Source) -> Result<Vec<u8>, ReadError> {
    let mut newest: Option<Vec<u8>> = None;
    for offset in HEADERS {
        let header = read_vec(source, offset, HEADER)?;
        if header.starts_with(b"head")
            && has_sum(&header)
            && newest.as_ref().is_none_or(|old| le64(&header, 8) > le64(old, 8))
        {
            newest = Some(header);
        }
    }
    let header = newest.ok_or_else(|| ReadError::damaged("neither of its headers is whole"))?;
    if le16(&header, 66) != 1 { Err(ReadError::damaged("its version is not 1")) } else { Ok(header) }
}

/// Where the map is, with its length, and where the table is that says what the disk is.
fn regions(source: &dyn Source) -> Result<((u64, u32), u64), ReadError> {
    for offset in REGIONS {
        let table = read_vec(source, offset, TABLE)?;
        if !table.starts_with(b"regi") || !has_sum(&table) {
            continue;
        }
        let (mut map, mut metadata) = (None, None);
        for at in entries(le32(&table, 8), 16) {
            let (offset, length) = (le64(&table, at + 16), le32(&table, at + 24));
            match guid_at(&table, at) {
                MAP => map = Some((offset, length)),
                METADATA => metadata = Some(offset),
                _ if le32(&table, at + 28) & 1 == 0 => {}
                _ => return Err(ReadError::damaged("it has a region that must be known")),
            }
        }
        return map.zip(metadata).ok_or_else(|| ReadError::damaged("it has no map"));
    }
    Err(ReadError::damaged("neither of its tables of regions is whole"))
}

/// Where the entries of a table are, of 32 bytes each.
fn entries(number: u32, first: usize) -> impl Iterator<Item = usize> {
    (0..number.min(MOST_ENTRIES) as usize).map(move |number| first + number * 32)
}

fn about(source: &dyn Source, offset: u64) -> Result<About, ReadError> {
    let table = read_vec(source, offset, TABLE)?;
    if !table.starts_with(b"metadata") {
        return Err(ReadError::damaged("nothing says what its disk is"));
    }
    let mut about = About { sector: 512, ..About::default() };
    for at in entries(le16(&table, 10).into(), 32) {
        let place = offset.saturating_add(le32(&table, at + 16).into());
        let value = |length| read_vec(source, place, length);
        match guid_at(&table, at) {
            PARAMETERS => {
                let value = value(8)?;
                about.block = le32(&value, 0).into();
                about.has_parent = le32(&value, 4) & 2 != 0;
            }
            LENGTH => about.bytes = le64(&value(8)?, 0),
            SECTOR => about.sector = le32(&value(4)?, 0),
            // Others say nothing about what is where: sizes that a guest is told, names.
            _ => {}
        }
    }
    Ok(about)
}

impl Layer for Vhdx {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn place(&mut self, at: u64) -> Result<(Place, u64), ReadError> {
        let limit = JOINED.div_ceil(self.block).min(self.bytes.div_ceil(self.block) - at / self.block);
        let ratio = CHUNK_SECTORS * u64::from(self.sector) / self.block;
        let Self { source, map, block, entries, .. } = self;
        joined(at, *block, limit, |index| {
            let number = index + index / ratio;
            if number >= *entries {
                return Err(ReadError::damaged("its map is smaller than its disk"));
            }
            let entry = u64::from_le_bytes(map.entry(&**source, number)?);
            match entry & 7 {
                NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED => Ok(Place::Zero),
                PRESENT if entry & OFFSET != 0 => Ok(Place::Stored(entry & OFFSET)),
                state => Err(ReadError::Damaged(format!("a block is in the state {state}"))),
            }
        })
    }

    fn data(&self) -> &dyn Source {
        &*self.source
    }

    fn notes(&self) -> Vec<Note> {
        Vec::from_iter((self.sector != 512).then_some(Note::Sectors(self.sector)))
    }
}
