//! VMware's format, in one file: a header, a description in words, two levels of tables, grains. Grains may be
//! compressed (`streamOptimized`, as in an OVA).

use std::path::Path;

use crate::Format;
use crate::bytes::{le16, le32, le64};
use crate::error::{OpenError, ReadError};
use crate::layer::{Codec, Layer, Note, Packed, Place, Window, disk_bytes, joined};
use crate::source::{Source, read, read_vec};

const SECTOR: u64 = 512;
const HEADER: usize = 512;
/// Bits of the header's flags.
const HAS_ZEROES: u32 = 1 << 2;
const IS_COMPRESSED: u32 = 1 << 16;
const HAS_MARKERS: u32 = 1 << 17;
/// The directory is at the end, where the header is repeated.
const AT_END: u64 = u64::MAX;
/// Where the repeated header is, counted from the end.
const FOOTER: u64 = 1024;
/// As many entries as a table has.
const ENTRIES: u32 = 512;
/// Longer descriptions have other things in mind.
const LONGEST_DESCRIPTION: u64 = 64 << 10;
/// The largest directory.
const LARGEST_DIRECTORY: u64 = 32 << 20;
/// What stands before a compressed grain: its place on the disk, and its length.
const MARKER: u64 = 12;
/// A disk that is not based on another one.
const NO_PARENT: &str = "ffffffff";
/// How many bytes are joined to one place.
const JOINED: u64 = 4 << 20;

pub(crate) struct Vmdk {
    source: Box<dyn Source>,
    bytes: u64,
    grain: u64,
    directory: Window,
    directory_entries: u64,
    table: Option<(u64, Window)>,
    is_compressed: bool,
    has_zeroes: bool,
    was_not_closed: bool,
}

impl Vmdk {
    pub(crate) fn open(source: Box<dyn Source>, path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Tables { path: path.to_owned(), format: Format::Vmdk, source };
        let not_read =
            |what: &str| OpenError::NotRead { path: path.to_owned(), format: "vmdk", what: what.to_owned() };
        let mut header = read_vec(&*source, 0, HEADER).map_err(failed)?;
        let (first, sectors) = (le64(&header, 28), le64(&header, 36));
        if first == 0 || sectors == 0 {
            return Err(not_read("is one of several files of a disk"));
        }
        if sectors > LONGEST_DESCRIPTION / SECTOR {
            return Err(failed(ReadError::damaged("its description is too long")));
        }
        let offset = first.saturating_mul(SECTOR);
        let text = read_vec(&*source, offset, (sectors * SECTOR) as usize).map_err(failed)?;
        check_description(&String::from_utf8_lossy(&text)).map_err(|what| not_read(&what))?;
        if le64(&header, 56) == AT_END {
            // A file that was cut off has something else there.
            let end = source.bytes().saturating_sub(FOOTER);
            read(&*source, &mut header, end).map_err(failed)?;
            if !header.starts_with(b"KDMV") || le64(&header, 56) == AT_END {
                return Err(failed(ReadError::damaged("its directory is not at its end, so it was cut off")));
            }
        }
        if !(1..=3).contains(&le32(&header, 4)) {
            return Err(not_read("is in a newer version of its format"));
        }
        let flags = le32(&header, 8);
        let is_compressed = flags & IS_COMPRESSED != 0;
        if is_compressed && (le16(&header, 77) != 1 || flags & HAS_MARKERS == 0) {
            return Err(not_read("is compressed by another method than all others"));
        }
        Self::with(source, &header, is_compressed).map_err(failed)
    }

    fn with(source: Box<dyn Source>, header: &[u8], is_compressed: bool) -> Result<Self, ReadError> {
        let bytes = disk_bytes(le64(header, 12).saturating_mul(SECTOR))?;
        let grain = le64(header, 20).saturating_mul(SECTOR);
        if !grain.is_power_of_two() || !(4096..=4 << 20).contains(&grain) || le32(header, 44) != ENTRIES {
            return Err(ReadError::Damaged(format!("it has grains of {grain} bytes")));
        }
        let directory_entries = bytes.div_ceil(grain * u64::from(ENTRIES));
        if directory_entries * 4 > LARGEST_DIRECTORY {
            return Err(ReadError::damaged("its directory is larger than 32 MiB"));
        }
        Ok(Self {
            source,
            bytes,
            grain,
            directory: Window::new(le64(header, 56).saturating_mul(SECTOR)),
            directory_entries,
            table: None,
            is_compressed,
            has_zeroes: le32(header, 8) & HAS_ZEROES != 0,
            was_not_closed: header[72] != 0,
        })
    }

    fn packed(&self, sector: u64, index: u64) -> Result<Packed, ReadError> {
        let offset = sector * SECTOR;
        let mut marker = [0; MARKER as usize];
        read(&*self.source, &mut marker, offset)?;
        let (place, length) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
        if place.checked_mul(SECTOR) != Some(index * self.grain) || length > 2 * self.grain {
            return Err(ReadError::damaged("a grain is not the one that its table says"));
        }
        // The last grain is as long as the disk.
        let unpacked = self.grain.min(self.bytes - index * self.grain) as usize;
        let length = length as usize;
        Ok(Packed { offset: offset + MARKER, length, codec: Codec::Zlib, unpacked, within: 0 })
    }
}

/// Checks what the description says of the disk. `Err` is what is not read.
fn check_description(text: &str) -> Result<(), String> {
    let value = |key: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        lines.find(|(name, _)| name.trim().eq_ignore_ascii_case(key)).map(|(_, value)| value.trim())
    };
    match value("createType").unwrap_or_default().trim_matches('"') {
        "monolithicSparse" | "streamOptimized" => {}
        other => return Err(format!("is of the type {other:?}, with parts in other files")),
    }
    let parent = value("parentCID").unwrap_or(NO_PARENT);
    if !parent.eq_ignore_ascii_case(NO_PARENT) {
        return Err("has only what differs from another image (it is of a snapshot)".into());
    }
    Ok(())
}

impl Layer for Vmdk {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn place(&mut self, at: u64) -> Result<(Place, u64), ReadError> {
        let covered = self.grain * u64::from(ENTRIES);
        let (number, within) = (at / covered, at % covered);
        let table = u32::from_le_bytes(self.directory.entry(&*self.source, number)?);
        if table == 0 {
            let mut next = number + 1;
            while next < self.directory_entries && self.directory.entry(&*self.source, next)? == [0; 4] {
                next += 1;
            }
            return Ok((Place::Absent, next * covered - at));
        }
        let Self { source, grain, has_zeroes, is_compressed, .. } = self;
        let (source, grain, has_zeroes, is_compressed) = (&**source, *grain, *has_zeroes, *is_compressed);
        let known = self.table.take_if(|(known, _)| *known == u64::from(table));
        let mut window = known.map_or_else(|| Window::new(u64::from(table) * SECTOR), |(_, window)| window);
        let left = u64::from(ENTRIES) - within / grain;
        let limit = if is_compressed { left } else { left.min(JOINED.div_ceil(grain)) };
        let found = joined(within, grain, limit, |index| {
            Ok(match u32::from_le_bytes(window.entry(source, index)?) {
                0 => Place::Zero,
                1 if has_zeroes => Place::Zero,
                // Stands for a packed one: those are never joined.
                sector if is_compressed => Place::Packed(Packed {
                    offset: sector.into(),
                    length: 0,
                    codec: Codec::Zlib,
                    unpacked: 0,
                    within: 0,
                }),
                sector => Place::Stored(u64::from(sector) * SECTOR),
            })
        });
        self.table = Some((table.into(), window));
        match found? {
            (Place::Packed(Packed { offset, within, .. }), length) => {
                let packed = self.packed(offset, at / self.grain)?;
                Ok((Place::Packed(Packed { within, ..packed }), length))
            }
            found => Ok(found),
        }
    }

    fn data(&self) -> &dyn Source {
        &*self.source
    }

    fn notes(&self) -> Vec<Note> {
        Vec::from_iter(self.was_not_closed.then_some(Note::NotClosed))
    }
}
