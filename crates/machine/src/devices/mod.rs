//! Device models: what the guest sees beside memory and vCPUs.
//!
//! Device threads do their work in short batches inside a [`gate::DeviceGate`]. A checkpoint closes the gate,
//! so between two batches every device is at rest: nothing half done in guest memory, no lock held.

pub(crate) mod complaints;
pub(crate) mod counters;
pub mod gate;
pub mod line_log;
pub mod port;
pub mod serial;
pub mod valve;
pub mod virtio;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::SharedDevice;

/// A device in one of the machine's slots, as the machine sees it.
///
/// [`save`](Self::save), [`restore`](Self::restore) and [`reset`](Self::reset) are called by the coordinator
/// with all vCPUs stopped and the gate closed.
pub trait Device: Send + Sync {
    /// The register window, for the MMIO bus; [`WINDOW`](virtio::mmio::WINDOW) bytes long.
    fn registers(&self) -> SharedDevice;

    /// One eventfd for each queue, for KVM to write when the driver writes the queue's number to
    /// [`QUEUE_NOTIFY`](virtio::mmio::QUEUE_NOTIFY). They stay the same for the life of the device.
    fn kicks(&self) -> &[EventFd];

    /// The machine begins to run here: the device checks every queue and raises its interrupt once, because
    /// wakes under way are not state. With `announce` it tells the outside where the guest went. The gate may
    /// be closed or open.
    fn go_live(&self, announce: bool);

    /// How many bytes [`save`](Self::save) appends at most.
    fn state_bytes(&self) -> usize;

    /// Appends the state to `out`; does not allocate if there is room for [`state_bytes`](Self::state_bytes).
    fn save(&self, out: &mut Vec<u8>);

    /// Loads a saved state; guest memory must be in place. [`go_live`](Self::go_live) must follow before the
    /// vCPUs run.
    ///
    /// # Errors
    /// When the bytes are no state of this device; the device is then as after a reset.
    fn restore(&self, bytes: &[u8]) -> Result<(), DeviceRestoreError>;

    /// Back to the state after power-on, for a reboot of the guest.
    fn reset(&self);
}

/// Why a device could not load a saved state.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {source}")]
pub struct DeviceRestoreError {
    /// Name of the device.
    pub device: &'static str,
    /// What is wrong with the state.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The primitives the gate is made of. The model test puts the ones of its checker in their place.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
}

#[cfg(test)]
mod gate_model;
#[cfg(test)]
mod gate_tests;
