//! A FAT file system with some files in its root, written once and never changed: so every file is in one piece.
//!
//! The crate fatfs could do it, but has had no release since January 2023, and what it would be needed for is less
//! than this file.

/// Length of the file system: 2 MiB, with room for [`MOST`](super::MOST) bytes of files. FAT12, as its number of clusters
/// says.
pub(super) const BYTES: usize = SECTORS * SECTOR;
const SECTOR: usize = 512;
const SECTORS: usize = 4096;
const CLUSTER_SECTORS: usize = 4;
const CLUSTER: usize = CLUSTER_SECTORS * SECTOR;
/// Sectors before the first table.
const RESERVED: usize = 1;
const TABLES: usize = 2;
/// 1.5 bytes for each cluster.
const TABLE_SECTORS: usize = 4;
/// Entries of the root.
const ROOT: usize = 512;
const ENTRY: usize = 32;
const ROOT_AT: usize = (RESERVED + TABLES * TABLE_SECTORS) * SECTOR;
const DATA_AT: usize = ROOT_AT + ROOT * ENTRY;
/// The first day that FAT knows: 1 January 1980.
const DAY: u16 = 1 << 5 | 1;
/// A hard disk.
const MEDIA: u8 = 0xf8;
/// The end of a file.
const LAST: u16 = 0xfff;
/// Attributes of entries.
const LABEL: u8 = 0x08;
const ARCHIVE: u8 = 0x20;
const LONG_NAME: u8 = 0x0f;
/// How many letters an entry of a long name has, and where they are.
const LETTERS: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];

// The type of a FAT is its number of clusters, and each needs an entry.
const CLUSTERS: usize = (BYTES - DATA_AT) / CLUSTER;
const _: () = assert!(CLUSTERS < 4085 && (CLUSTERS + 2) * 3 / 2 <= TABLE_SECTORS * SECTOR);
const _: () = assert!(super::MOST + 4 * CLUSTER <= CLUSTERS * CLUSTER);

/// A file of the root.
pub(super) struct File<'a> {
    /// Its name, of small ASCII letters and hyphens. The first six letters of each name differ.
    pub(super) name: &'a str,
    pub(super) contents: &'a [u8],
}

/// Makes a file system with this label. The files have [`MOST`](super::MOST) bytes together at most, and are few.
pub(super) fn file_system(label: &[u8; 11], files: &[File<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    let mut root = Root { entries: Vec::new() };
    root.entry(*label, LABEL, 0, 0);
    // The first two entries of a table are no clusters.
    let mut next = 2;
    let mut table = vec![0xf00 | u16::from(MEDIA), LAST];
    for file in files {
        let clusters = file.contents.len().div_ceil(CLUSTER);
        let first = if clusters == 0 { 0 } else { next };
        root.file(file, first as u16);
        let at = DATA_AT + (next - 2) * CLUSTER;
        bytes[at..at + file.contents.len()].copy_from_slice(file.contents);
        table.extend((1..clusters).map(|it| (next + it) as u16));
        table.extend((clusters > 0).then_some(LAST));
        next += clusters;
    }
    bytes[ROOT_AT..ROOT_AT + root.entries.len()].copy_from_slice(&root.entries);
    for number in 0..TABLES {
        let at = (RESERVED + number * TABLE_SECTORS) * SECTOR;
        write_table(&mut bytes[at..at + TABLE_SECTORS * SECTOR], &table);
    }
    let serial = crc32fast::hash(&bytes);
    write_head(&mut bytes[..SECTOR], label, serial);
    bytes
}

/// Twelve bits for each entry.
fn write_table(bytes: &mut [u8], table: &[u16]) {
    for (number, entry) in table.iter().enumerate() {
        let at = number * 3 / 2;
        let shifted = if number % 2 == 0 { *entry } else { entry << 4 };
        let [low, high] = shifted.to_le_bytes();
        bytes[at] |= low;
        bytes[at + 1] |= high;
    }
}

fn write_head(head: &mut [u8], label: &[u8; 11], serial: u32) {
    let mut put = |at: usize, value: &[u8]| head[at..at + value.len()].copy_from_slice(value);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"OUTLIVE ");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[CLUSTER_SECTORS as u8]);
    put(14, &(RESERVED as u16).to_le_bytes());
    put(16, &[TABLES as u8]);
    put(17, &(ROOT as u16).to_le_bytes());
    put(19, &(SECTORS as u16).to_le_bytes());
    put(21, &[MEDIA]);
    put(22, &(TABLE_SECTORS as u16).to_le_bytes());
    // A geometry, which nobody uses.
    put(24, &[32, 0, 64, 0]);
    put(36, &[0x80, 0, 0x29]);
    put(39, &serial.to_le_bytes());
    put(43, label);
    put(54, b"FAT12   ");
    put(510, &[0x55, 0xaa]);
}

struct Root {
    entries: Vec<u8>,
}

impl Root {
    fn entry(&mut self, name: [u8; 11], attributes: u8, first: u16, length: u32) {
        let mut entry = [0; ENTRY];
        entry[..11].copy_from_slice(&name);
        entry[11] = attributes;
        for at in [16, 18, 24] {
            entry[at..at + 2].copy_from_slice(&DAY.to_le_bytes());
        }
        entry[26..28].copy_from_slice(&first.to_le_bytes());
        entry[28..].copy_from_slice(&length.to_le_bytes());
        self.entries.extend(entry);
    }

    /// The long name comes before the entry, its last part first.
    fn file(&mut self, file: &File<'_>, first: u16) {
        let mut name = *b"      ~1   ";
        let letters = file.name.bytes().take(6);
        name.iter_mut().zip(letters).for_each(|(to, from)| *to = from.to_ascii_uppercase());
        let sum = name.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        let parts: Vec<&[u8]> = file.name.as_bytes().chunks(LETTERS.len()).collect();
        for (number, part) in parts.iter().enumerate().rev() {
            let mut entry = [0; ENTRY];
            let last = if number + 1 == parts.len() { 0x40 } else { 0 };
            entry[0] = (number as u8 + 1) | last;
            entry[11] = LONG_NAME;
            entry[13] = sum;
            for (at, place) in LETTERS.into_iter().enumerate() {
                let letter = match part.get(at) {
                    Some(letter) => u16::from(*letter),
                    None if at == part.len() => 0,
                    None => u16::MAX,
                };
                entry[place..place + 2].copy_from_slice(&letter.to_le_bytes());
            }
            self.entries.extend(entry);
        }
        self.entry(name, ARCHIVE, first, file.contents.len() as u32);
    }
}
