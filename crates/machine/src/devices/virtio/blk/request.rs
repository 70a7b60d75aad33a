//! What the driver asks for: the request in a chain of buffers.
//!
//! The driver may be hostile. A chain that is unusable stops the device ([`Broken`]); a bad request in a good
//! chain only fails with a status.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{GuestMemory, GuestMemoryError};

use super::config::{MAX_DATA, MAX_DISCARD, MAX_RANGES, MAX_ZEROES, SECTOR};
use crate::devices::virtio::chain::{Broken, Chain};

/// Length of `struct virtio_blk_outhdr`.
pub(super) const HEADER: usize = 16;
/// Length of `struct virtio_blk_discard_write_zeroes`.
const RANGE: usize = 16;

/// The outcome of a request, as the driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl Status {
    /// Writes it to the last byte that the device may write in the chain; there is one.
    pub(super) fn write<M: GuestMemory>(self, memory: &M, chain: &Chain) -> Result<(), GuestMemoryError> {
        // A chain has at most as many descriptors of 4 GiB as the queue, so the position fits.
        chain.write(memory, (chain.driver_bytes() - 1) as usize, &[self as u8])
    }
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Whether the driver allows the space to be given back.
    pub(super) unmap: bool,
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// A request that is work for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestType {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl RequestType {
    /// Whether it changes the disk.
    pub(super) fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }
}

/// What a request wants.
#[derive(Debug)]
pub(super) enum Wanted {
    /// Work for the disk. `span` is the part of the disk that it concerns, from the first byte to the last.
    Disk { kind: RequestType, span: Extent, len: usize },
    /// The serial number.
    Serial,
    /// A request that this disk does not support.
    Refused(Status),
}

/// The properties of a disk that decide which requests are valid.
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

    /// Reads the request in a chain. The ranges to discard or to zero go to `ranges`.
    pub(super) fn judge<M: GuestMemory>(
        &self,
        memory: &M,
        chain: &Chain,
        ranges: &mut Vec<Extent>,
    ) -> Result<Wanted, Broken> {
        ranges.clear();
        if chain.device_bytes() < HEADER as u64 {
            return Err(Broken::Rule("a request has no whole header"));
        }
        if chain.driver_bytes() == 0 {
            return Err(Broken::Rule("a request has no byte for its status"));
        }
        let mut header = [0; HEADER];
        chain.read(memory, 0, &mut header)?;
        let [kind, _] = [0, 4].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])));
        let sector = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| header[8 + i]));
        let out = chain.device_bytes() - HEADER as u64;
        Ok(match kind {
            VIRTIO_BLK_T_IN => self.transfer(RequestType::Read, sector, chain.driver_bytes() - 1),
            VIRTIO_BLK_T_OUT => self.transfer(RequestType::Write, sector, out),
            VIRTIO_BLK_T_FLUSH => Wanted::Disk {
                kind: RequestType::Flush,
                span: Extent { offset: 0, len: 0, unmap: false },
                len: 0,
            },
            VIRTIO_BLK_T_GET_ID => Wanted::Serial,
            VIRTIO_BLK_T_DISCARD => self.ranges(RequestType::Discard, memory, chain, out, ranges)?,
            VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(RequestType::WriteZeroes, memory, chain, out, ranges)?,
            _ => Wanted::Refused(Status::Unsupported),
        })
    }

    fn transfer(&self, kind: RequestType, sector: u64, len: u64) -> Wanted {
        let fits = len > 0
            && len <= MAX_DATA as u64
            && len.is_multiple_of(SECTOR)
            && self.contains(sector, len / SECTOR);
        if !fits || (kind == RequestType::Write && self.readonly) {
            return Wanted::Refused(Status::IoError);
        }
        let span = Extent { offset: sector * SECTOR, len, unmap: false };
        Wanted::Disk { kind, span, len: len as usize }
    }

    fn ranges<M: GuestMemory>(
        &self,
        kind: RequestType,
        memory: &M,
        chain: &Chain,
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
            chain.read(memory, HEADER + index * RANGE, &mut bytes)?;
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

    fn range(&self, kind: RequestType, bytes: &[u8; RANGE]) -> Result<Extent, Status> {
        let sector = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| bytes[i]));
        let [count, flags] = [8, 12].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i])));
        // The only flag belongs to write-zeroes (virtio 1.2, 5.2.6.2).
        let (known, most) = match kind {
            RequestType::WriteZeroes => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_ZEROES),
            _ => (0, MAX_DISCARD),
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if count > most || !self.contains(sector, u64::from(count)) {
            return Err(Status::IoError);
        }
        let unmap = kind == RequestType::Discard || flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        Ok(Extent { offset: sector * SECTOR, len: u64::from(count) * SECTOR, unmap })
    }
}
