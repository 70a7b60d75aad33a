//! What the driver asks for: descriptor chains and the request in them.
//!
//! All of it is taken for hostile. A chain is walked once, with a bound on its descriptors, and every buffer
//! is checked to lie in guest memory. What makes the chain unusable stops the device ([`Broken`]); what is
//! only a bad request in a good chain fails with a status.

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::config::{MAX_DATA, MAX_DISCARD, MAX_RANGES, MAX_ZEROES, SECTOR};

/// Length of `struct virtio_blk_outhdr`.
pub(super) const HEADER: usize = 16;
/// Length of `struct virtio_blk_discard_write_zeroes`.
const RANGE: usize = 16;
/// Length of a descriptor.
const DESCRIPTOR: u32 = 16;

/// The outcome of a request, as the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// How the driver broke the rules; the device stops until it is reset.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("the queue cannot be used: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("a buffer lies outside guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("a buffer or a descriptor lies outside guest memory")]
    Outside,
    #[error("the available ring cannot be read")]
    Ring,
    #[error("a descriptor chain leads nowhere or has more descriptors than the queue")]
    Chain,
    #[error("an indirect descriptor table is not one")]
    Indirect,
    #[error("a buffer to read from follows one to write to")]
    Order,
    #[error("a request has no whole header")]
    NoHeader,
    #[error("a request has no byte for its status")]
    NoStatus,
    #[error("the chain {0} is offered while it is in flight")]
    Twice(u16),
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    at: GuestAddress,
    len: u32,
}

/// The buffers of a request, in order. At most as many as a queue has descriptors.
#[derive(Debug, Default)]
pub(super) struct Segments {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    /// Bytes of `readable`.
    pub(super) to_device: u64,
    /// Bytes of `writable`.
    pub(super) to_driver: u64,
}

impl Segments {
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.to_device = 0;
        self.to_driver = 0;
    }

    /// Walks the chain that begins at `head`.
    pub(super) fn gather<M: GuestMemory>(
        &mut self,
        memory: &M,
        queue: &Queue,
        head: u16,
    ) -> Result<(), Broken> {
        self.clear();
        let mut table = GuestAddress(queue.desc_table());
        let (mut size, mut index, mut indirect) = (u32::from(queue.size()), u32::from(head), false);
        // One step more than there may be descriptors: the one that leads to an indirect table is none.
        for _ in 0..=queue.size() {
            if index >= size {
                return Err(Broken::Chain);
            }
            let at = table.checked_add(u64::from(index * DESCRIPTOR)).ok_or(Broken::Outside)?;
            let descriptor: Descriptor = memory.read_obj(at)?;
            if descriptor.refers_to_indirect_table() {
                let len = descriptor.len();
                let fits = len.is_multiple_of(DESCRIPTOR) && (1..=0xffff).contains(&(len / DESCRIPTOR));
                if indirect || descriptor.has_next() || !fits {
                    return Err(Broken::Indirect);
                }
                (table, size, index, indirect) = (descriptor.addr(), len / DESCRIPTOR, 0, true);
                continue;
            }
            self.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
        Err(Broken::Chain)
    }

    fn add<M: GuestMemory>(&mut self, memory: &M, descriptor: &Descriptor) -> Result<(), Broken> {
        let segment = Segment { at: descriptor.addr(), len: descriptor.len() };
        let (list, sum, access) = if descriptor.is_write_only() {
            (&mut self.writable, &mut self.to_driver, Permissions::Write)
        } else if self.writable.is_empty() {
            (&mut self.readable, &mut self.to_device, Permissions::Read)
        } else {
            return Err(Broken::Order);
        };
        if segment.len > 0 && !memory.check_range(segment.at, segment.len as usize, access) {
            return Err(Broken::Outside);
        }
        *sum += u64::from(segment.len);
        list.push(segment);
        Ok(())
    }

    /// Copies from the driver's bytes, `skip` bytes in. The caller has seen that there are enough.
    pub(super) fn read<M: GuestMemory>(
        &self,
        memory: &M,
        skip: usize,
        mut to: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        for (at, len) in pieces(&self.readable, skip) {
            let (now, rest) = to.split_at_mut(len.min(to.len()));
            if now.is_empty() {
                break;
            }
            memory.read_slice(now, at)?;
            to = rest;
        }
        Ok(())
    }

    /// Copies to the driver's bytes, `skip` bytes in. The caller has seen that there is room.
    pub(super) fn write<M: GuestMemory>(
        &self,
        memory: &M,
        skip: usize,
        mut from: &[u8],
    ) -> Result<(), GuestMemoryError> {
        for (at, len) in pieces(&self.writable, skip) {
            let (now, rest) = from.split_at(len.min(from.len()));
            if now.is_empty() {
                break;
            }
            memory.write_slice(now, at)?;
            from = rest;
        }
        Ok(())
    }

    /// Writes the last of the driver's bytes: the status.
    pub(super) fn write_status<M: GuestMemory>(
        &self,
        memory: &M,
        status: Status,
    ) -> Result<(), GuestMemoryError> {
        // `to_driver` is at most as many descriptors as 4 GiB: it fits.
        self.write(memory, (self.to_driver - 1) as usize, &[status as u8])
    }
}

/// The pieces of guest memory from `skip` bytes on.
fn pieces(segments: &[Segment], mut skip: usize) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
    segments.iter().filter_map(move |segment| {
        let len = segment.len as usize;
        let from = skip.min(len);
        skip -= from;
        (from < len).then(|| (segment.at.unchecked_add(from as u64), len - from))
    })
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The driver does not mind if the space is given back.
    pub(super) unmap: bool,
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// A request that is work for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Kind {
    /// Whether it changes the disk.
    pub(super) fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }
}

/// What a request wants.
#[derive(Debug)]
pub(super) enum Wanted {
    /// Work for the disk. `span` is all of the disk it concerns, from the first byte to the last.
    Disk { kind: Kind, span: Extent, len: usize },
    /// The serial number.
    Serial,
    /// Nothing that this disk does.
    Refused(Status),
}

/// What a disk is, as far as requests are judged by it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) sectors: u64,
    pub(super) readonly: bool,
}

impl Geometry {
    /// Whether `sectors` from `first` on are all on the disk.
    fn contains(&self, first: u64, sectors: u64) -> bool {
        first.checked_add(sectors).is_some_and(|end| end <= self.sectors)
    }

    /// Reads the request in a chain. Ranges to discard or to zero go to `ranges`.
    pub(super) fn judge<M: GuestMemory>(
        &self,
        memory: &M,
        segments: &Segments,
        ranges: &mut Vec<Extent>,
    ) -> Result<Wanted, Broken> {
        ranges.clear();
        if segments.to_device < HEADER as u64 {
            return Err(Broken::NoHeader);
        }
        if segments.to_driver == 0 {
            return Err(Broken::NoStatus);
        }
        let mut header = [0; HEADER];
        segments.read(memory, 0, &mut header)?;
        let [kind, _] = [0, 4].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])));
        let sector = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| header[8 + i]));
        let out = segments.to_device - HEADER as u64;
        Ok(match kind {
            VIRTIO_BLK_T_IN => self.transfer(Kind::Read, sector, segments.to_driver - 1),
            VIRTIO_BLK_T_OUT => self.transfer(Kind::Write, sector, out),
            VIRTIO_BLK_T_FLUSH => {
                Wanted::Disk { kind: Kind::Flush, span: Extent { offset: 0, len: 0, unmap: false }, len: 0 }
            }
            VIRTIO_BLK_T_GET_ID => Wanted::Serial,
            VIRTIO_BLK_T_DISCARD => self.ranges(Kind::Discard, memory, segments, out, ranges)?,
            VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(Kind::WriteZeroes, memory, segments, out, ranges)?,
            _ => Wanted::Refused(Status::Unsupported),
        })
    }

    fn transfer(&self, kind: Kind, sector: u64, len: u64) -> Wanted {
        let fits = len > 0
            && len <= MAX_DATA as u64
            && len.is_multiple_of(SECTOR)
            && self.contains(sector, len / SECTOR);
        if !fits || (kind == Kind::Write && self.readonly) {
            return Wanted::Refused(Status::IoError);
        }
        let span = Extent { offset: sector * SECTOR, len, unmap: false };
        Wanted::Disk { kind, span, len: len as usize }
    }

    fn ranges<M: GuestMemory>(
        &self,
        kind: Kind,
        memory: &M,
        segments: &Segments,
        len: u64,
        ranges: &mut Vec<Extent>,
    ) -> Result<Wanted, Broken> {
        if self.readonly || len == 0 || !len.is_multiple_of(RANGE as u64) {
            return Ok(Wanted::Refused(Status::IoError));
        }
        if len > (RANGE * MAX_RANGES) as u64 {
            return Ok(Wanted::Refused(Status::IoError));
        }
        for index in 0..len as usize / RANGE {
            let mut bytes = [0; RANGE];
            segments.read(memory, HEADER + index * RANGE, &mut bytes)?;
            match self.range(kind, &bytes) {
                Ok(extent) => ranges.push(extent),
                Err(status) => return Ok(Wanted::Refused(status)),
            }
        }
        let touched = || ranges.iter().filter(|range| range.len > 0);
        let first = touched().map(|range| range.offset).min().unwrap_or(0);
        let end = touched().map(Extent::end).max().unwrap_or(0);
        Ok(Wanted::Disk { kind, span: Extent { offset: first, len: end - first, unmap: false }, len: 0 })
    }

    fn range(&self, kind: Kind, bytes: &[u8; RANGE]) -> Result<Extent, Status> {
        let sector = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| bytes[i]));
        let [count, flags] = [8, 12].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i])));
        // The only flag there is belongs to write-zeroes (virtio 1.2, 5.2.6.2).
        let (known, most) = match kind {
            Kind::WriteZeroes => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_ZEROES),
            _ => (0, MAX_DISCARD),
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if count > most || !self.contains(sector, u64::from(count)) {
            return Err(Status::IoError);
        }
        let unmap = kind == Kind::Discard || flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        Ok(Extent { offset: sector * SECTOR, len: u64::from(count) * SECTOR, unmap })
    }
}
