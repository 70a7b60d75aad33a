//! Where the clusters are.

use std::path::Path;

use super::header::{Header, Linked};
use crate::Format;
use crate::error::{OpenError, ReadError};
use crate::layer::{Codec, Layer, Note, Packed, Place, joined, out_of_bounds};
use crate::source::{Source, read_vec};

/// The largest first table: as large as QEMU makes and takes it.
const LARGEST_TABLE: u64 = 32 << 20;
/// The bits of an entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an entry of the second table.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Parts of a cluster that have bits of their own.
const PARTS: u64 = 32;
/// How many bytes are joined to one place.
const JOINED: u64 = 4 << 20;

pub(crate) struct Qcow2 {
    source: Box<dyn Source>,
    /// The file with the clusters, if that is another one.
    data: Option<Box<dyn Source>>,
    header: Header,
    /// The first table. The crate keeps no other one whole.
    first: Vec<u8>,
    second: Second,
    /// Which part of the second table was counted last, and how many bytes those that were counted have.
    counted: (Option<u64>, u64),
}

/// The part of the second table that is there.
struct Second {
    offset: Option<u64>,
    bytes: Vec<u8>,
}

impl Qcow2 {
    pub(crate) fn open(source: Box<dyn Source>, path: &Path) -> Result<Self, OpenError> {
        let header = Header::read(&*source, path)?;
        let failed = |source| OpenError::Tables { path: path.to_owned(), format: Format::Qcow2, source };
        let needed = header.bytes.div_ceil(header.covered());
        if needed > u64::from(header.table.1) {
            return Err(failed(ReadError::damaged("its tables are smaller than its disk")));
        }
        if needed * 8 > LARGEST_TABLE {
            return Err(failed(ReadError::damaged("its first table is larger than QEMU makes it")));
        }
        let first = read_vec(&*source, header.table.0, needed as usize * 8).map_err(failed)?;
        Ok(Self {
            source,
            data: None,
            header,
            first,
            second: Second { offset: None, bytes: Vec::new() },
            counted: (None, 0),
        })
    }

    /// Other files that it names.
    pub(crate) fn linked(&self) -> &Linked {
        &self.header.linked
    }

    /// Takes the clusters from this file.
    pub(crate) fn with_data(&mut self, data: Box<dyn Source>) {
        self.data = Some(data);
    }

    /// Each part of the second table is for one place of the disk. So no first table makes more work than the file is
    /// long.
    fn count(&mut self, number: u64) -> Result<(), ReadError> {
        if self.counted.0 != Some(number) {
            self.counted = (Some(number), self.counted.1 + self.header.cluster());
        }
        if self.counted.1 > self.source.bytes() { Err(ReadError::Twice) } else { Ok(()) }
    }

    fn first(&self, number: u64) -> u64 {
        crate::bytes::be64(&self.first, number as usize * 8) & OFFSET
    }
}

impl Header {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn entry_bytes(&self) -> u64 {
        if self.has_subclusters { 16 } else { 8 }
    }

    /// How many bytes of the disk one entry of the first table is for.
    fn covered(&self) -> u64 {
        self.cluster() / self.entry_bytes() * self.cluster()
    }

    /// What has a place of its own.
    fn unit(&self) -> u64 {
        if self.has_subclusters { self.cluster() / PARTS } else { self.cluster() }
    }

    /// The place of the unit with this number of a table.
    fn place(&self, table: &[u8], number: u64, has_data_file: bool) -> Result<Place, ReadError> {
        let parts = self.cluster() / self.unit();
        let (cluster, part) = (number / parts, number % parts);
        let at = (cluster * self.entry_bytes()) as usize;
        let entry = crate::bytes::be64(table, at);
        if entry & COMPRESSED != 0 {
            if has_data_file {
                return Err(ReadError::damaged("a cluster is compressed in a file for data, which has none"));
            }
            return self.packed(entry, (part * self.unit()) as usize).map(Place::Packed);
        }
        let offset = entry & OFFSET;
        if !offset.is_multiple_of(self.cluster()) {
            return Err(ReadError::damaged("a cluster does not begin where clusters begin"));
        }
        // In a file for data the first cluster may have data, too.
        let is_there = offset != 0 || (has_data_file && entry & COPIED != 0);
        let stored = Place::Stored(offset + part * self.unit());
        if self.has_subclusters {
            let bits = crate::bytes::be64(table, at + 8);
            return match (bits >> part & 1, bits >> (part + PARTS) & 1) {
                (0, 0) => Ok(Place::Absent),
                (0, 1) => Ok(Place::Zero),
                (1, 0) if is_there => Ok(stored),
                _ => Err(ReadError::damaged("a part of a cluster is zero and has data")),
            };
        }
        Ok(match (self.has_zeroes && entry & ZERO != 0, is_there) {
            (true, _) => Place::Zero,
            (false, true) => stored,
            (false, false) => Place::Absent,
        })
    }

    fn packed(&self, entry: u64, within: usize) -> Result<Packed, ReadError> {
        let bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> bits;
        // The last sector may be shared with the next cluster. At most twice a cluster, by the number of bits.
        let length = (sectors + 1) * 512 - offset % 512;
        Ok(Packed {
            offset,
            length: usize::try_from(length).map_err(|_| out_of_bounds())?,
            codec: if self.is_zstd { Codec::Zstd } else { Codec::Deflate },
            unpacked: self.cluster() as usize,
            within,
        })
    }
}

impl Layer for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn bytes(&self) -> u64 {
        self.header.bytes
    }

    fn place(&mut self, at: u64) -> Result<(Place, u64), ReadError> {
        let (covered, unit) = (self.header.covered(), self.header.unit());
        let entries = (self.first.len() / 8) as u64;
        let (number, within) = (at / covered, at % covered);
        let table = self.first(number);
        if table == 0 {
            let next = (number + 1..entries).find(|it| self.first(*it) != 0).unwrap_or(entries);
            return Ok((Place::Absent, next * covered - at));
        }
        if !table.is_multiple_of(self.header.cluster()) {
            return Err(ReadError::damaged("a table does not begin where clusters begin"));
        }
        self.count(number)?;
        let Self { source, data, header, second, .. } = self;
        if second.offset != Some(table) {
            second.offset = None;
            second.bytes.resize(header.cluster() as usize, 0);
            crate::source::read(&**source, &mut second.bytes, table)?;
            second.offset = Some(table);
        }
        let limit = (JOINED / unit).min(covered / unit - within / unit);
        let has_base = header.linked.backing.is_some();
        joined(within, unit, limit, |index| match header.place(&second.bytes, index, data.is_some())? {
            Place::Absent if !has_base => Ok(Place::Zero),
            place => Ok(place),
        })
    }

    fn data(&self) -> &dyn Source {
        self.data.as_deref().unwrap_or(&*self.source)
    }

    fn begin_anew(&mut self) {
        self.counted = (None, 0);
    }

    fn notes(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        notes.extend(self.header.was_not_closed.then_some(Note::NotClosed));
        notes.extend((self.header.snapshots > 0).then_some(Note::Snapshots(self.header.snapshots)));
        notes
    }
}
