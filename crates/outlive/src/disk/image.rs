//! Reading and writing images.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use outlive_epoch::{DISK_CHUNK, DISK_SUM_LEN, DiskOp, DiskRecord, is_zero};

/// The sum of a chunk.
pub(crate) type Sum = [u8; DISK_SUM_LEN];
/// The sum of a chunk of zeroes, whatever its length.
pub(crate) const ZERO_SUM: Sum = [0; DISK_SUM_LEN];

/// The storage behind journal and images. Tests put in one that loses its power.
pub(crate) trait Store: Send {
    /// Fills `to` from `offset`.
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes`.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a range zero.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes everything written durable.
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    fn bytes(&self) -> io::Result<u64>;
    /// First byte at or behind `offset` that may not be zero; `None` if there is none.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;
}

impl Store for File {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(to, offset)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        zero(
            &|offset, len| punch_hole(self, offset, len),
            &|offset, len| write_zeroes(self, offset, len),
            offset,
            len,
        )
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn bytes(&self) -> io::Result<u64> {
        // The metadata of a block device lack its length, so seek. Nobody uses the position of these
        // descriptors.
        Ok(lseek(self, 0, Whence::SeekEnd)? as u64)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match lseek(self, offset as i64, Whence::SeekData) {
            Ok(at) => Ok(Some(at as u64)),
            Err(Errno::ENXIO) => Ok(None),
            // Some file systems and all block devices do not know their holes.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(offset)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Reads an image beside whoever writes to it.
pub(crate) struct ImageReader {
    pub(super) file: File,
    /// Bytes of the disk.
    pub(super) bytes: u64,
}

impl ImageReader {
    /// Its length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where the next data is, from this byte on.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        Store::next_data(&self.file, from)
    }

    /// Fills `to` with the bytes at this place.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn read(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        Store::read(&self.file, to, at)
    }
}

/// The largest sectors of a block device.
const LARGEST_SECTOR: u64 = 4096;

/// Makes a range zero: as a hole if that is possible, or else by writing. Of a block device only whole
/// sectors can become a hole, and its sectors may be larger than those that the guest sees.
fn zero(
    punch: &impl Fn(u64, u64) -> Result<(), Errno>,
    write: &impl Fn(u64, u64) -> io::Result<()>,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    match punch(offset, len) {
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => write(offset, len),
        Err(Errno::EINVAL) => {
            let end = offset + len;
            let (first, last) =
                (offset.next_multiple_of(LARGEST_SECTOR), end / LARGEST_SECTOR * LARGEST_SECTOR);
            if first >= last || punch(first, last - first).is_err() {
                return write(offset, len);
            }
            write(offset, first - offset)?;
            write(last, end - last)
        }
        other => Ok(other?),
    }
}

fn punch_hole(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, hole, offset as i64, len as i64)
}

fn write_zeroes(file: &File, mut offset: u64, len: u64) -> io::Result<()> {
    let zeroes = [0; DISK_CHUNK];
    let end = offset + len;
    while offset < end {
        let step = (end - offset).min(DISK_CHUNK as u64);
        file.write_all_at(&zeroes[..step as usize], offset)?;
        offset += step;
    }
    Ok(())
}

/// Carries a record out. The caller does flushes.
pub(crate) fn apply(store: &impl Store, record: &DiskRecord<'_>) -> io::Result<()> {
    match record.op {
        DiskOp::Data(bytes) => store.write(bytes, record.offset),
        DiskOp::Zero(len) => store.zero(record.offset, len),
        DiskOp::Flush => Ok(()),
    }
}

/// Carries records out on `bytes`, which are what an image has at `offset` of this disk. Returns whether any of them
/// is about those bytes. What the image has of the records already changes nothing, as long as they are the newest
/// of it and come in their order.
pub(crate) fn overlay<'a>(
    bytes: &mut [u8],
    disk: u16,
    offset: u64,
    records: impl Iterator<Item = DiskRecord<'a>>,
) -> bool {
    let (end, mut any) = (offset + bytes.len() as u64, false);
    for record in records {
        let (from, to) = (record.offset.max(offset), record.end().min(end));
        if record.disk != disk || from >= to {
            continue;
        }
        any = true;
        let place = &mut bytes[(from - offset) as usize..(to - offset) as usize];
        match record.op {
            DiskOp::Data(data) => {
                let skipped = (from - record.offset) as usize;
                place.copy_from_slice(&data[skipped..skipped + place.len()]);
            }
            DiskOp::Zero(_) => place.fill(0),
            DiskOp::Flush => {}
        }
    }
    any
}

/// The chunk that a record fills from its first byte to its last, and its sum then.
pub(crate) fn whole_chunk(record: &DiskRecord<'_>, disk_bytes: u64) -> Option<(u64, Sum)> {
    let (chunk, size) = (record.offset / DISK_CHUNK as u64, DISK_CHUNK as u64);
    let whole = record.offset.is_multiple_of(size)
        && record.len() == size.min(disk_bytes.saturating_sub(record.offset));
    let sum = match record.op {
        DiskOp::Data(bytes) if is_zero(bytes) => ZERO_SUM,
        DiskOp::Data(bytes) => *blake3::hash(bytes).as_bytes(),
        DiskOp::Zero(_) => ZERO_SUM,
        DiskOp::Flush => return None,
    };
    (whole && !record.is_empty()).then_some((chunk, sum))
}

/// How many chunks a disk of this many bytes has.
pub(crate) fn chunks(bytes: u64) -> u64 {
    bytes.div_ceil(DISK_CHUNK as u64)
}

/// Reads chunks of one image one after another, and asks the file system only where a hole may begin or end.
pub(crate) struct ChunkReader<'a, S> {
    store: &'a S,
    bytes: u64,
    /// The range `.0..=.1` is known to be a hole.
    hole: (u64, u64),
}

impl<'a, S: Store> ChunkReader<'a, S> {
    /// A reader of the first `bytes` bytes.
    pub(crate) fn new(store: &'a S, bytes: u64) -> Self {
        Self { store, bytes, hole: (0, 0) }
    }

    /// Where a chunk is. Empty behind the end.
    pub(crate) fn range(&self, chunk: u64) -> (u64, usize) {
        let start = chunk.saturating_mul(DISK_CHUNK as u64).min(self.bytes);
        (start, (self.bytes - start).min(DISK_CHUNK as u64) as usize)
    }

    /// Whether the chunk lies in a hole. A writer may fill it at any time.
    pub(crate) fn is_hole(&mut self, chunk: u64) -> io::Result<bool> {
        let (start, len) = self.range(chunk);
        let end = start + len as u64;
        if !(self.hole.0 <= start && end <= self.hole.1) {
            self.hole = (start, self.store.next_data(start)?.unwrap_or(self.bytes));
        }
        Ok(end <= self.hole.1)
    }

    /// Reads a chunk into `buffer` and returns its bytes; `None` if all are zero.
    pub(crate) fn read<'b>(&mut self, chunk: u64, buffer: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
        let (start, len) = self.range(chunk);
        if len == 0 || self.is_hole(chunk)? {
            return Ok(None);
        }
        let bytes = &mut buffer[..len];
        self.store.read(bytes, start)?;
        Ok((!is_zero(bytes)).then_some(bytes))
    }

    /// The sum of a chunk.
    pub(crate) fn sum(&mut self, chunk: u64, buffer: &mut [u8]) -> io::Result<Sum> {
        Ok(self.read(chunk, buffer)?.map_or(ZERO_SUM, |bytes| *blake3::hash(bytes).as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_zero_without_being_read() {
        let file = tempfile::tempfile().unwrap();
        let bytes = 10 * DISK_CHUNK as u64 + 700;
        file.set_len(bytes).unwrap();
        file.write_all_at(&[7; 300], 4 * DISK_CHUNK as u64 + 5).unwrap();
        file.write_all_at(&[8; 700], 10 * DISK_CHUNK as u64).unwrap();
        file.write_all_at(&[0; DISK_CHUNK], 6 * DISK_CHUNK as u64).unwrap();
        let mut reader = ChunkReader::new(&file, bytes);
        let mut buffer = vec![0xee; DISK_CHUNK];
        let data: Vec<u64> = (0..12).filter(|c| reader.read(*c, &mut buffer).unwrap().is_some()).collect();
        assert_eq!(data, [4, 10]);
        assert_eq!(reader.range(10), (10 * DISK_CHUNK as u64, 700));
        assert_eq!(reader.range(11), (bytes, 0));
        assert_eq!(reader.range(u64::MAX).1, 0);
        assert_eq!(reader.sum(6, &mut buffer).unwrap(), ZERO_SUM);
        assert_eq!(reader.sum(10, &mut buffer).unwrap(), *blake3::hash(&[8; 700]).as_bytes());
    }

    /// A block device whose sectors have 4096 bytes makes holes of whole sectors only.
    #[test]
    fn of_a_range_that_is_not_whole_sectors_the_inner_ones_become_a_hole() {
        let holes = std::cell::RefCell::new(Vec::new());
        let written = std::cell::RefCell::new(Vec::new());
        let punch = |offset: u64, len: u64| {
            if !offset.is_multiple_of(4096) || !len.is_multiple_of(4096) {
                return Err(Errno::EINVAL);
            }
            holes.borrow_mut().push((offset, len));
            Ok(())
        };
        let write = |offset, len| {
            written.borrow_mut().push((offset, len));
            Ok(())
        };
        for (range, hole, rest) in [
            ((4096, 8192), vec![(4096, 8192)], vec![]),
            ((512, 12_288), vec![(4096, 8192)], vec![(512, 3584), (12_288, 512)]),
            ((512, 4096), vec![], vec![(512, 4096)]),
            ((4608, 512), vec![], vec![(4608, 512)]),
        ] {
            zero(&punch, &write, range.0, range.1).unwrap();
            assert_eq!((holes.take(), written.take()), (hole, rest), "{range:?}");
        }
        let none = |_, _| Err(Errno::EOPNOTSUPP);
        zero(&none, &write, 0, 1 << 20).unwrap();
        assert_eq!(written.take(), [(0, 1 << 20)]);
        let broken = |_, _| Err(Errno::EIO);
        assert!(zero(&broken, &write, 0, 4096).is_err() && written.take().is_empty());
    }

    #[test]
    fn records_are_carried_out_on_a_part_of_an_image_as_on_all_of_it() {
        let mut dice = fastrand::Rng::with_seed(7);
        for _ in 0..300 {
            let mut records = outlive_epoch::RecordBuf::with_capacity(64 << 10);
            for _ in 0..dice.usize(0..8) {
                let (disk, offset) = (dice.u16(0..2), dice.u64(0..900));
                let data = vec![dice.u8(..); dice.usize(1..200)];
                let op = match dice.u8(0..5) {
                    0 => DiskOp::Zero(data.len() as u64),
                    1 => DiskOp::Flush,
                    _ => DiskOp::Data(&data),
                };
                let offset = if op == DiskOp::Flush { 0 } else { offset };
                assert!(records.push(DiskRecord { disk, offset, op }));
            }
            let image = tempfile::tempfile().unwrap();
            image.write_all_at(&[0xaa; 1200], 0).unwrap();
            let (offset, len) = (dice.u64(0..1000), dice.usize(0..200));
            let mut part = vec![0xaa; len];
            // A part of them is there already.
            let begun = dice.usize(0..=records.iter().count());
            overlay(&mut part, 1, offset, records.iter().take(begun));
            let any = overlay(&mut part, 1, offset, records.iter());
            let of_disk = || records.iter().filter(|it| it.disk == 1);
            of_disk().for_each(|record| apply(&image, &record).unwrap());
            let mut whole = vec![0; len];
            image.read(&mut whole, offset).unwrap();
            assert_eq!(part, whole);
            let end = offset + len as u64;
            assert_eq!(any, of_disk().any(|it| it.offset.max(offset) < it.end().min(end)));
        }
    }

    #[test]
    fn zeroing_keeps_the_length() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 300_000], 0).unwrap();
        file.zero(100, 250_000).unwrap();
        write_zeroes(&file, 280_000, 20_000).unwrap();
        let mut all = vec![9; 300_000];
        file.read(&mut all, 0).unwrap();
        let expected = |at: usize| u8::from(at < 100 || (250_100..280_000).contains(&at));
        assert!(all.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        assert_eq!(file.bytes().unwrap(), 300_000);
    }
}
