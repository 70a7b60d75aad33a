//! Which file system, or other contents, a partition has: enough to say what is not supported.

use crate::ReadError;
use crate::partitions::Partition;
use crate::source::Source;

/// What a partition contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// ext2, ext3 or ext4.
    Ext,
    /// Something that has a name and cannot be read.
    Other(&'static str),
    /// Nothing that is known.
    Unknown,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ext => "ext4",
            Self::Other(name) => name,
            Self::Unknown => "nothing known",
        })
    }
}

/// Offset, bytes there, and whose they are.
const MAGIC: [(u64, &[u8], &str); 15] = [
    (0, b"LUKS\xba\xbe", "LUKS (encrypted)"),
    (0, b"XFSB", "xfs"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (0x200, b"LABELONE", "LVM"),
    (0, b"LABELONE", "LVM"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "a Linux RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "a Linux RAID"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
    (0xff6, b"SWAPSPACE2", "swap space"),
    (0x52, b"FAT32", "FAT"),
    (0x36, b"FAT", "FAT"),
    (3, b"NTFS", "NTFS"),
    (0x8001, b"CD001", "an ISO image"),
    (0, b"hsqs", "squashfs"),
    (0x1_0034, b"ReIsEr", "reiserfs"),
];
/// The last magic ends before.
const LONGEST: usize = 0x1_0080;
const EXT_MAGIC: u64 = 0x438;

/// Looks at a partition.
pub(crate) fn probe(source: &Source, partition: &Partition) -> Result<Kind, ReadError> {
    let length = LONGEST.min(usize::try_from(partition.bytes).unwrap_or(LONGEST));
    let bytes = source.peek(partition.start, length)?;
    let has = |at: u64, magic: &[u8]| bytes.get(at as usize..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((_, _, name)) = MAGIC.iter().find(|(at, magic, _)| has(*at, magic)) {
        return Ok(Kind::Other(name));
    }
    Ok(if has(EXT_MAGIC, b"\x53\xef") { Kind::Ext } else { Kind::Unknown })
}
