//! Device models: what the guest sees beside memory and vCPUs.
//!
//! Device threads do their work in short batches inside a [`gate::DeviceGate`]. A checkpoint closes the gate,
//! so between two batches every device is at rest: nothing half done in guest memory, no lock held.

pub mod gate;
pub mod virtio;

/// The primitives the gate is made of. The model test puts the ones of its checker in their place.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
}

#[cfg(test)]
mod gate_model;
#[cfg(test)]
mod gate_tests;
