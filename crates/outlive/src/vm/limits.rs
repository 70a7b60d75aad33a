//! How much a checkpoint may carry: what a primary of this release sends at most, and what a standby accepts.

use outlive_epoch::DeviceInfo;

/// How many checkpoints may be captured and not yet acknowledged: one in flight to the standby, one behind
/// it, and room for a hiccup.
pub(crate) const SLOTS: u64 = 4;
/// How many state bytes a checkpoint may have.
pub(crate) const MAX_STATE_BYTES: u32 = outlive_epoch::MAX_STATE_BYTES as u32;
/// How many bytes of disk records an epoch may have; with more it ends early.
pub(crate) const DISK_BYTES: usize = 8 << 20;

/// Pages of which the sender remembers what it has sent, if the VM has so many: 64 MiB, taken when the base is
/// sent and given back with the link.
pub(crate) const REMEMBERED_PAGES: usize = 16 * 1024;

/// State bytes of a checkpoint that a primary may ask room for.
pub(crate) const ACCEPTED_STATE_BYTES: u32 = MAX_STATE_BYTES;
/// How many bytes of disk writes of a checkpoint a primary may request room for.
pub(crate) const ACCEPTED_DISK_BYTES: u32 = 64 << 20;
/// How many state sections a checkpoint may have.
pub(crate) const ACCEPTED_STATE_SECTIONS: u32 = outlive_epoch::MAX_STATE_SECTIONS as u32;

/// How many bytes of disk records one checkpoint may have.
pub(crate) fn max_disk_bytes(devices: &[DeviceInfo]) -> u32 {
    if devices.iter().all(|device| device.replicated_bytes() == 0) {
        return 0;
    }
    DISK_BYTES as u32
}
