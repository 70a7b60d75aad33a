//! How much a checkpoint may carry: what a primary of this release sends at most, and what a standby accepts.

use outlive_epoch::DeviceInfo;

/// Checkpoints captured and not yet acknowledged: one on its way to the standby, one behind it, and room for
/// a hiccup.
pub(crate) const SLOTS: u64 = 4;
/// State bytes of a checkpoint at most.
pub(crate) const MAX_STATE_BYTES: u32 = outlive_epoch::MAX_STATE_BYTES as u32;
/// Bytes of records of what the guest writes to its disks in one epoch; at more the epoch ends early.
pub(crate) const DISK_BYTES: usize = 8 << 20;

/// State bytes of a checkpoint that a primary may ask room for.
pub(crate) const ACCEPTED_STATE_BYTES: u32 = MAX_STATE_BYTES;
/// Bytes of disk writes of a checkpoint that a primary may ask room for.
pub(crate) const ACCEPTED_DISK_BYTES: u32 = 64 << 20;
/// State sections of a checkpoint.
pub(crate) const ACCEPTED_STATE_SECTIONS: u32 = outlive_epoch::MAX_STATE_SECTIONS as u32;

/// Most bytes of disk records of one checkpoint.
pub(crate) fn max_disk_bytes(devices: &[DeviceInfo]) -> u32 {
    if devices.iter().all(|device| device.replicated_bytes() == 0) {
        return 0;
    }
    DISK_BYTES as u32
}
