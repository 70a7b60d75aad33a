//! How much a checkpoint may carry: what a primary of this release sends at most, and what a standby accepts.

use outlive_epoch::{DISK_RECORD_LEN, DeviceInfo};
use outlive_machine::WriteBuffer;

/// Checkpoints captured and not yet acknowledged: one on its way to the standby, one behind it, and room for
/// a hiccup.
pub(crate) const SLOTS: u64 = 4;
/// State bytes of a checkpoint at most: 32 vCPUs with CPUID and 16 KiB each, the VM, the devices.
pub(crate) const MAX_STATE_BYTES: u32 = 4 << 20;
/// Bytes that the guest may write to its disks in one epoch; at more the epoch ends early.
pub(crate) const DISK_BYTES: usize = 8 << 20;

/// State bytes of a checkpoint that a primary may ask room for.
pub(crate) const ACCEPTED_STATE_BYTES: u32 = 16 << 20;
/// Bytes of disk writes of a checkpoint that a primary may ask room for.
pub(crate) const ACCEPTED_DISK_BYTES: u32 = 64 << 20;
/// State sections of a checkpoint: constants and registers of 32 vCPUs, the VM, and 32 devices, with room to
/// spare.
pub(crate) const ACCEPTED_STATE_SECTIONS: u32 = 128;

/// Most bytes that the records of one full log take on the wire.
pub(crate) fn max_disk_bytes(devices: &[DeviceInfo]) -> u32 {
    if devices.iter().all(|device| device.replicated_bytes() == 0) {
        return 0;
    }
    // Records have other heads on the wire than in the log.
    (DISK_BYTES.div_ceil(WriteBuffer::RECORD) * DISK_RECORD_LEN) as u32
}
