//! How a primary introduces its VM. A standby builds its machine from this alone.

use outlive_epoch::{
    DeviceFlags, DeviceInfo, DeviceKind, GfnRange, Hello, Layout, LayoutError, Limits, VersionRange,
};
use outlive_machine::{Machine, SectorSize};

use super::limits::{self, MAX_STATE_BYTES, SLOTS};
use super::{Disk, Identity};
use crate::cli::{ActiveOptions, RunOptions};
use crate::process;

/// The queues of a device that always has the same number of them.
pub(crate) fn fixed_queues(kind: DeviceKind) -> Option<u16> {
    match kind {
        DeviceKind::Net | DeviceKind::Disk => None,
        DeviceKind::Rng => Some(1),
        DeviceKind::Console => Some(2),
        // Registers only.
        DeviceKind::Serial => Some(0),
    }
}

/// The devices of a machine in the order of their slots, and the serial port, which has no slot.
pub(crate) fn devices(machine: &Machine, options: &RunOptions, is_linux: bool) -> Vec<DeviceInfo> {
    let card = options.net.as_ref().map(|net| DeviceInfo {
        wiring: net.wiring(),
        ..DeviceInfo::new(DeviceKind::Net, net.queues.into())
    });
    let describe = |(index, disk): (usize, &Disk)| {
        let spec = options.disks.get(index);
        DeviceInfo {
            flags: DeviceFlags {
                read_only: disk.is_readonly(),
                shared: disk.is_shared(),
                large_sectors: disk.sector_size() == SectorSize::Large,
            },
            size: disk.capacity_bytes(),
            serial: spec.and_then(|spec| spec.serial.clone()).unwrap_or_default(),
            ..DeviceInfo::new(DeviceKind::Disk, spec.map_or(1, |spec| spec.queues.into()))
        }
    };
    let disks = machine.disks().iter().enumerate().map(describe);
    let linux = [DeviceKind::Rng, DeviceKind::Console, DeviceKind::Serial];
    let linux = linux.into_iter().filter(|_| is_linux);
    let linux = linux.map(|kind| DeviceInfo::new(kind, fixed_queues(kind).unwrap_or(1)));
    card.into_iter().chain(disks).chain(linux).collect()
}

/// Why a VM cannot be introduced: no standby could have a copy of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IntroductionError {
    /// Of its memory.
    #[error("guest memory has an impossible layout: {0}")]
    Layout(#[source] LayoutError),
    /// A checkpoint counts fewer pages.
    #[error("the VM has too much memory to be protected")]
    TooLarge,
}

/// The introduction.
///
/// # Errors
/// See [`IntroductionError`].
pub(crate) fn hello(
    machine: &Machine,
    identity: &Identity,
    options: &ActiveOptions,
) -> Result<Hello, IntroductionError> {
    let provenance = &identity.provenance;
    let ram = machine.ram();
    let ranges = ram.slots().iter().map(|s| GfnRange { start: s.base.0, pages: s.pages }).collect();
    let layout = Layout::new(ranges).map_err(IntroductionError::Layout)?;
    let firmware_bytes = (layout.pages() * outlive_machine::PAGE_SIZE as u64).saturating_sub(ram.bytes());
    let max_pages = u32::try_from(ram.pages()).map_err(|_| IntroductionError::TooLarge)?;
    Ok(Hello {
        vm: provenance.vm,
        generation: identity.generation,
        vcpus: identity.vcpus.into(),
        memory_bytes: ram.bytes(),
        layout,
        mac: identity.mac.map(|mac| mac.0),
        limits: Limits {
            max_pages,
            max_state_bytes: MAX_STATE_BYTES,
            slots: SLOTS as u32,
            max_disk_bytes: limits::max_disk_bytes(&identity.devices),
        },
        // Memory that is not the guest's own RAM holds what it boots from.
        firmware_bytes,
        devices: identity.devices.clone(),
        interval_us: options.epochs.ending().longest().as_micros() as u64,
        dead_after_us: options.dead_after.as_micros() as u64,
        name: provenance.name.clone(),
        host: process::host_name(),
        tracker: machine.tracker().kind().to_string(),
        vendor: process::vendor(),
        arbiter: provenance.arbiter.id().unwrap_or_default().to_owned(),
        lineage: provenance.lineage.clone(),
        versions: VersionRange::CURRENT,
        microcode: process::microcode(),
        vcpu: Some(machine.constant()),
        since: None,
    })
}
