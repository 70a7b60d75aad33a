//! The header, and what it says of other files.

use std::path::Path;

use crate::Format;
use crate::bytes::{be32, be64};
use crate::error::{OpenError, ReadError};
use crate::layer::disk_bytes;
use crate::source::{Source, read_vec};

/// The header of version 2, and as much of version 3's as says something here.
const V2: usize = 72;
const V3: usize = 104;
/// With the method of compression.
const V3_LONGER: u64 = 112;
/// Features without whose knowledge an image cannot be read.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const SUBCLUSTERS: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | SUBCLUSTERS;
/// Sections behind the header.
const NAME_OF_DATA_FILE: u32 = 0x4441_5441;
const FORMAT_OF_BACKING: u32 = 0xe279_2aca;
/// The longest name of a file, as QEMU has it.
const LONGEST_NAME: u32 = 1023;
/// More sections than anybody writes.
const MOST_SECTIONS: usize = 64;

/// What a qcow2's header says.
#[derive(Debug)]
pub(crate) struct Header {
    /// Length of the disk.
    pub(crate) bytes: u64,
    /// A cluster has 2 to this many bytes.
    pub(crate) cluster_bits: u32,
    /// The first table: where it is, and how many entries it has.
    pub(crate) table: (u64, u32),
    /// Whether clusters can be marked as zero.
    pub(crate) has_zeroes: bool,
    /// Whether clusters have 32 parts of their own.
    pub(crate) has_subclusters: bool,
    /// Whether compressed clusters are zstd's.
    pub(crate) is_zstd: bool,
    pub(crate) was_not_closed: bool,
    pub(crate) snapshots: u32,
    /// Other files that it names.
    pub(crate) linked: Linked,
}

/// Other files that an image names.
#[derive(Debug, Default)]
pub(crate) struct Linked {
    /// What it is based on.
    pub(crate) backing: Option<String>,
    /// The format of that, if it is named.
    pub(crate) backing_format: Option<String>,
    /// Where its clusters are, if not in it.
    pub(crate) data: Option<String>,
}

impl Header {
    /// Reads a header.
    pub(crate) fn read(source: &dyn Source, path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Tables { path: path.to_owned(), format: Format::Qcow2, source };
        let not_read = |what: String| OpenError::NotRead { path: path.to_owned(), format: "qcow2", what };
        let mut head = read_vec(source, 0, V2).map_err(failed)?;
        let is_newer = be32(&head, 4) >= 3;
        if is_newer {
            let length = V3_LONGER.min(source.bytes().max(V3 as u64)) as usize;
            head = read_vec(source, 0, length).map_err(failed)?;
        }
        let features = if is_newer { be64(&head, 72) } else { 0 };
        if features & CORRUPT != 0 {
            return Err(OpenError::MarkedCorrupt(path.to_owned()));
        }
        if be32(&head, 32) != 0 {
            return Err(OpenError::Encrypted(path.to_owned()));
        }
        if features & !KNOWN != 0 {
            let number = (features & !KNOWN).trailing_zeros();
            return Err(not_read(format!("has a feature with the number {number}")));
        }
        let compression = if features & COMPRESSION == 0 { 0 } else { head.get(104).copied().unwrap_or(0) };
        if compression > 1 {
            return Err(not_read(format!("is compressed by a method with the number {compression}")));
        }
        Self::with(source, &head, is_newer, features, compression == 1).map_err(failed)
    }

    fn with(
        source: &dyn Source,
        head: &[u8],
        is_newer: bool,
        features: u64,
        is_zstd: bool,
    ) -> Result<Self, ReadError> {
        let cluster_bits = be32(head, 20);
        let has_subclusters = features & SUBCLUSTERS != 0;
        // Parts of a cluster are whole sectors.
        let least = if has_subclusters { 14 } else { 9 };
        if !(least..=21).contains(&cluster_bits) {
            return Err(ReadError::Damaged(format!("its clusters have 2^{cluster_bits} bytes")));
        }
        let linked = linked(source, head, is_newer, features, cluster_bits)?;
        if features & DATA_FILE != 0 && linked.data.is_none() {
            return Err(ReadError::damaged("its data are in another file, and it does not name that"));
        }
        Ok(Self {
            bytes: disk_bytes(be64(head, 24))?,
            cluster_bits,
            table: (be64(head, 40), be32(head, 36)),
            has_zeroes: is_newer,
            has_subclusters,
            is_zstd,
            was_not_closed: features & DIRTY != 0,
            snapshots: be32(head, 60),
            linked,
        })
    }
}

/// Finds the names of other files: in the header, and in sections behind it, all within the first cluster.
fn linked(
    source: &dyn Source,
    head: &[u8],
    is_newer: bool,
    features: u64,
    cluster_bits: u32,
) -> Result<Linked, ReadError> {
    let mut linked = Linked::default();
    let cluster = 1u64 << cluster_bits;
    let (offset, length) = (be64(head, 8), be32(head, 16));
    if offset != 0 {
        if length == 0 || length > LONGEST_NAME || offset > cluster - u64::from(length) {
            return Err(ReadError::damaged("the name of the image that it is based on is not in its header"));
        }
        linked.backing = Some(text(read_vec(source, offset, length as usize)?));
    }
    let end = if offset == 0 { cluster } else { offset }.min(source.bytes());
    let mut at = if is_newer { u64::from(be32(head, 100)) } else { V2 as u64 };
    if is_newer && !(V3 as u64..=cluster).contains(&at) {
        return Err(ReadError::Damaged(format!("its header has {at} bytes")));
    }
    for _ in 0..MOST_SECTIONS {
        if at + 8 > end {
            break;
        }
        let section = read_vec(source, at, 8)?;
        let (kind, length) = (be32(&section, 0), be32(&section, 4));
        at += 8;
        if kind == 0 {
            break;
        }
        if u64::from(length) > end - at {
            return Err(ReadError::damaged("a section of its header reaches beyond it"));
        }
        let is_name = matches!(kind, NAME_OF_DATA_FILE | FORMAT_OF_BACKING);
        if is_name && length <= LONGEST_NAME {
            let name = Some(text(read_vec(source, at, length as usize)?));
            if kind == FORMAT_OF_BACKING {
                linked.backing_format = name;
            } else if features & DATA_FILE != 0 {
                linked.data = name;
            }
        }
        at += u64::from(length).next_multiple_of(8);
    }
    Ok(linked)
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}
