//! Partition tables: GPT (UEFI specification, 5.3), MBR with logical partitions, or none.

use std::rc::Rc;

use crate::ReadError;
use crate::source::Source;

/// Most entries of a GPT that are looked at; the usual number is 128.
const GPT_ENTRIES: u32 = 1024;
/// Most logical partitions.
const LOGICAL: u32 = 64;
const SECTOR: u64 = 512;
/// Sectors of disks that have larger ones: their GPT counts in these.
const LARGE_SECTOR: u64 = 4096;

/// By which table a partition is known; boot loaders' names of it differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    /// No table: the file system is the disk.
    None,
    Mbr,
    Gpt,
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Partition {
    /// Its number in the table, from 1; 0 is the whole disk.
    pub(crate) number: u32,
    pub(crate) table: Table,
    /// Its first byte.
    pub(crate) start: u64,
    /// Its length in bytes.
    pub(crate) bytes: u64,
    /// As in `PARTUUID=`, in lower case.
    pub(crate) uuid: String,
}

impl std::fmt::Display for Partition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.number == 0 { f.write_str("the whole disk") } else { write!(f, "partition {}", self.number) }
    }
}

/// All partitions, in the order of their numbers; the whole disk if it has no table.
pub(crate) fn list(source: &Rc<Source>) -> Result<Vec<Partition>, ReadError> {
    for sector in [SECTOR, LARGE_SECTOR] {
        if let Some(found) = gpt(source, sector)? {
            return Ok(found);
        }
    }
    let found = mbr(source)?;
    if !found.is_empty() {
        return Ok(found);
    }
    let (uuid, bytes) = (String::new(), source.bytes());
    Ok(vec![Partition { number: 0, table: Table::None, start: 0, bytes, uuid }])
}

/// The table at the disk's begin or, if that is damaged, its copy at the end.
fn gpt(source: &Source, sector: u64) -> Result<Option<Vec<Partition>>, ReadError> {
    let last = (source.bytes() / sector).saturating_sub(1);
    for at in [1, last] {
        if let Some(found) = gpt_at(source, sector, at)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn gpt_at(source: &Source, sector: u64, at: u64) -> Result<Option<Vec<Partition>>, ReadError> {
    let header = source.peek(at.saturating_mul(sector), SECTOR as usize)?;
    let header_bytes = u32_at(&header, 12) as usize;
    if !header.starts_with(b"EFI PART") || !(92..=header.len()).contains(&header_bytes) {
        return Ok(None);
    }
    let mut summed = header[..header_bytes].to_vec();
    summed[16..20].fill(0);
    if crc32fast::hash(&summed) != u32_at(&header, 16) {
        return Ok(None);
    }
    let (entries, count, size) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    if !(128..=4096).contains(&size) {
        return Ok(None);
    }
    let looked_at = count.min(GPT_ENTRIES);
    let table = source.peek(entries.saturating_mul(sector), (looked_at * size) as usize)?;
    // A table with more of them is not summed.
    if looked_at == count && crc32fast::hash(&table) != u32_at(&header, 88) {
        return Ok(None);
    }
    let entries = table.chunks_exact(size as usize).zip(1..);
    let found = entries.filter_map(|(entry, number)| {
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        let is_used = entry[..16].iter().any(|byte| *byte != 0);
        let (start, bytes) = (first.checked_mul(sector)?, sectors.checked_mul(sector)?);
        let uuid = guid(&entry[16..32]);
        let is_there = is_used && start < source.bytes();
        is_there.then_some(Partition { number, table: Table::Gpt, start, bytes, uuid })
    });
    Ok(Some(found.collect()))
}

/// The first three groups are little endian.
fn guid(bytes: &[u8]) -> String {
    const ORDER: [&[usize]; 5] = [&[3, 2, 1, 0], &[5, 4], &[7, 6], &[8, 9], &[10, 11, 12, 13, 14, 15]];
    let group = |group: &&[usize]| group.iter().map(|at| format!("{:02x}", bytes[*at])).collect::<String>();
    ORDER.iter().map(group).collect::<Vec<_>>().join("-")
}

const MBR_ENTRIES: usize = 446;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// An entry of an MBR, in sectors.
struct MbrEntry {
    kind: u8,
    start: u64,
    sectors: u64,
}

fn mbr_entries(sector: &[u8]) -> Option<Vec<MbrEntry>> {
    if sector.get(510..512) != Some(&[0x55, 0xaa]) {
        return None;
    }
    let entries = sector[MBR_ENTRIES..510].chunks_exact(16);
    // Code of a boot sector without a table has other bytes there.
    if entries.clone().any(|entry| !matches!(entry[0], 0 | 0x80)) {
        return None;
    }
    let entry = |entry: &[u8]| MbrEntry {
        kind: entry[4],
        start: u32_at(entry, 8).into(),
        sectors: u32_at(entry, 12).into(),
    };
    Some(entries.map(entry).collect())
}

fn mbr(source: &Source) -> Result<Vec<Partition>, ReadError> {
    let sector = source.peek(0, SECTOR as usize)?;
    let Some(entries) = mbr_entries(&sector) else { return Ok(Vec::new()) };
    let disk = u32_at(&sector, 440);
    let partition = |number: u32, start: u64, sectors: u64| Partition {
        number,
        table: Table::Mbr,
        start: start * SECTOR,
        bytes: sectors * SECTOR,
        uuid: format!("{disk:08x}-{number:02x}"),
    };
    let mut found = Vec::new();
    let mut extended = None;
    for (entry, number) in entries.iter().zip(1..) {
        let is_there = entry.start > 0 && entry.sectors > 0 && entry.start * SECTOR < source.bytes();
        if !is_there || entry.kind == 0 {
            continue;
        }
        if EXTENDED.contains(&entry.kind) {
            extended.get_or_insert(entry.start);
        } else {
            found.push(partition(number, entry.start, entry.sectors));
        }
    }
    // Each logical partition has a sector that says where it is and where the next such sector is.
    let Some(base) = extended else { return Ok(found) };
    let mut at = base;
    for number in 5..5 + LOGICAL {
        let sector = source.peek(at * SECTOR, SECTOR as usize)?;
        let Some([first, next, ..]) = mbr_entries(&sector).and_then(|it| <[MbrEntry; 4]>::try_from(it).ok())
        else {
            break;
        };
        if first.kind != 0 && first.sectors > 0 {
            found.push(partition(number, at + first.start, first.sectors));
        }
        if next.kind == 0 || next.start == 0 {
            break;
        }
        at = base + next.start;
    }
    Ok(found)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|it| it.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|it| it.try_into().ok()).map_or(0, u64::from_le_bytes)
}
