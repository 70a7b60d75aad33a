//! What the guest is told: the configuration space, the features and the limits (virtio 1.2, 5.2).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::devices::virtio::COMMON_FEATURES;
use crate::devices::virtio::slot::CONFIG_BYTES;

/// Bytes of a sector, the unit of addresses and lengths.
pub const SECTOR: u64 = 512;

/// Bytes of the blocks in which a guest divides its disk: partition tables count in them, and file systems
/// write no smaller ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum SectorSize {
    /// 512, which almost every disk has or pretends to have.
    #[default]
    Small = 512,
    /// 4096: disks that are called 4Kn.
    Large = 4096,
}

impl SectorSize {
    /// How many bytes it has.
    pub fn bytes(self) -> u64 {
        self as u64
    }

    /// The size with this many bytes.
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        [Self::Small, Self::Large].into_iter().find(|size| size.bytes() == bytes)
    }
}

/// Bytes that the host's storage writes as a whole, or a multiple of it.
const HOST_BLOCK: u64 = 4096;
/// Most queues of a disk.
pub const MAX_DISK_QUEUES: u16 = 16;
/// Largest size of a queue.
pub const QUEUE_SIZE: u16 = 128;
/// Most buffers of a request besides its header and its status.
pub const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Largest buffer.
pub const SEGMENT_BYTES: u32 = 32 << 10;
/// Most bytes a request reads or writes.
pub const MAX_DATA: usize = SEGMENTS as usize * SEGMENT_BYTES as usize;
/// Most ranges of one discard or write-zeroes request.
pub const MAX_RANGES: usize = 16;
/// Most sectors of one range to discard: 1 GiB.
pub const MAX_DISCARD: u32 = 1 << 21;
/// Most sectors of one range of zeroes: 64 MiB, because some file systems have to write the zeroes.
pub const MAX_ZEROES: u32 = 1 << 17;

/// Offset of the field `writeback`, the only one that a driver writes.
pub(super) const WRITEBACK: usize = 32;

/// What a disk offers its driver.
pub(super) fn features(readonly: bool) -> u64 {
    let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1 << bit);
    let always = [VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY];
    let writable =
        [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
    let more = if readonly { bits(&[VIRTIO_BLK_F_RO]) } else { bits(&writable) };
    COMMON_FEATURES | bits(&always) | 1 << VIRTIO_BLK_F_MQ | more
}

/// Whether a driver that accepted `features` and set `writeback` expects a write to be durable on completion,
/// without a flush (virtio 1.2, 5.2.6.2).
pub(super) fn writes_through(features: u64, writeback: bool) -> bool {
    let has = |bit: u32| features & 1 << bit != 0;
    if has(VIRTIO_BLK_F_CONFIG_WCE) { !writeback } else { !has(VIRTIO_BLK_F_FLUSH) }
}

/// The configuration space: `struct virtio_blk_config`.
pub(super) fn space(sectors: u64, size: SectorSize, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(8, &SEGMENT_BYTES.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(size as u32).to_le_bytes());
    // Topology, in sectors of that size: how many make a physical block, as a power of two, and the least that
    // should be written at once. So file systems are laid out for the host's pages.
    let blocks = HOST_BLOCK / size.bytes();
    put(24, &[blocks.trailing_zeros() as u8, 0]);
    put(26, &(blocks as u16).to_le_bytes());
    put(WRITEBACK, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    put(36, &MAX_DISCARD.to_le_bytes());
    put(40, &(MAX_RANGES as u32).to_le_bytes());
    // The alignment of discards, in units of 512 bytes.
    put(44, &((HOST_BLOCK / SECTOR) as u32).to_le_bytes());
    put(48, &MAX_ZEROES.to_le_bytes());
    put(52, &(MAX_RANGES as u32).to_le_bytes());
    put(56, &[1]);
    config
}
