//! The virtio-mmio (version 2) net device, driven by polling.
//!
//! An own driver of a few hundred lines instead of a crate, for three reasons that all cost checkpoints
//! otherwise: a notification is one exit per *batch* here, interrupts stay off with and without EVENT_IDX,
//! and the rings and small frames are packed into few pages, because each page the guest dirties is a write
//! fault in every epoch.

mod mmio;
mod net;
mod queue;

pub use net::Net;
