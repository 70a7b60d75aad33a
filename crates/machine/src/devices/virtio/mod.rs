//! virtio devices: what they have in common.
//!
//! ```text
//! slot     the device as the machine has it: thread, lock, going live, saved state; what differs is a Model
//! mmio     its registers          ring, chain   its queues, and the buffers in them
//! worker   its thread             persist       the bytes of its state
//! ```
//!
//! Saving and restoring is done by the coordinator with all vCPUs stopped and the device gate closed, so that
//! no one else is in any of these objects.

pub mod blk;
pub mod chain;
pub mod console;
pub mod mmio;
pub mod net;
pub mod persist;
pub mod ring;
pub mod rng;
pub mod slot;
pub(crate) mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::gate::DeviceGate;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
pub(crate) mod hostile;
#[cfg(test)]
mod mmio_tests;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod rig;

/// Most queues a device of ours may have: bounds the saved state. A network card with eight pairs has 17.
pub const MAX_QUEUES: usize = 18;

/// The feature bits every device of ours offers: modern virtio, indirect descriptors, event index.
pub const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Carries an interrupt to the guest: an irqfd, and whatever wakes an idle vCPU.
pub trait Interrupt: Send + Sync {
    /// Raises the interrupt. Called with locks held and inside the device gate: must not block.
    fn trigger(&self);
}

/// Wakes a guest that polls its devices and has asked to be idled.
pub trait Waker: Send + Sync {
    /// Wakes the guest, or makes its next idle call return at once. Must not block.
    fn wake(&self);
}

/// What the machine lends a device.
#[derive(Clone)]
pub struct DeviceHost<M> {
    /// Guest memory.
    pub memory: Arc<M>,
    /// The gate the device works behind.
    pub gate: Arc<DeviceGate>,
    /// Raises the device's interrupt.
    pub interrupt: Arc<dyn Interrupt>,
    /// Wakes a guest that polls, whether its driver wants an interrupt or not.
    pub waker: Arc<dyn Waker>,
}

/// Why a device did not start when the driver said it was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ActivateError {
    /// The driver did not set up a queue the device needs.
    #[error("the driver did not set up queue {0}")]
    QueueNotReady(usize),
}

/// What transport and device share: the interrupt status and the device's cry for help.
pub struct InterruptLine {
    /// The InterruptStatus register.
    status: AtomicU32,
    /// DEVICE_NEEDS_RESET: the driver broke the rules and the device has stopped.
    needs_reset: AtomicBool,
    interrupt: Arc<dyn Interrupt>,
}

impl InterruptLine {
    /// A quiet line that ends in `interrupt`.
    pub fn new(interrupt: Arc<dyn Interrupt>) -> Self {
        Self { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), interrupt }
    }

    /// Tells the driver that buffers were used.
    pub fn signal_used(&self) {
        self.signal(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration or the device status changed.
    pub fn signal_config(&self) {
        self.signal(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Declares the device broken until the driver resets it.
    pub fn fail(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.signal_config();
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    fn signal(&self, bit: u32) {
        // Release: the driver that reads the status sees the used ring that goes with it.
        self.status.fetch_or(bit, Ordering::Release);
        self.interrupt.trigger();
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    fn set(&self, status: u32, needs_reset: bool) {
        self.status.store(status, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }
}

impl std::fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InterruptLine")
            .field("status", &self.status())
            .field("needs_reset", &self.needs_reset())
            .finish_non_exhaustive()
    }
}
