//! The devices of a VM as its primary introduces them. A standby builds its machine from this list alone.

use outlive_epoch::{DeviceFlags, DeviceInfo, DeviceKind};
use outlive_machine::Machine;

use super::disks::Disk;
use crate::cli::RunOptions;

/// Queues of a device that always has the same number.
pub(crate) fn fixed_queues(kind: DeviceKind) -> Option<u16> {
    match kind {
        DeviceKind::Net | DeviceKind::Disk => None,
        DeviceKind::Rng => Some(1),
        DeviceKind::Console => Some(2),
        // Registers alone.
        DeviceKind::Serial => Some(0),
    }
}

/// The devices of a machine in the order of their slots, and the serial port, which has none.
pub(super) fn of(machine: &Machine, options: &RunOptions, is_linux: bool) -> Vec<DeviceInfo> {
    let card = options.net.as_ref().map(|net| DeviceInfo::new(DeviceKind::Net, net.queues.into()));
    let describe = |(index, disk): (usize, &Disk)| {
        let spec = options.disks.get(index);
        DeviceInfo {
            kind: DeviceKind::Disk,
            flags: DeviceFlags { read_only: disk.is_readonly(), shared: disk.is_shared() },
            queues: spec.map_or(1, |spec| spec.queues.into()),
            size: disk.capacity_bytes(),
            serial: spec.and_then(|spec| spec.serial.clone()).unwrap_or_default(),
        }
    };
    let disks = machine.disks().iter().enumerate().map(describe);
    let linux = [DeviceKind::Rng, DeviceKind::Console, DeviceKind::Serial];
    let linux = linux.into_iter().filter(|_| is_linux);
    let linux = linux.map(|kind| DeviceInfo::new(kind, fixed_queues(kind).unwrap_or(1)));
    card.into_iter().chain(disks).chain(linux).collect()
}
