//! The virtio-mmio (version 2) net device, driven by polling.
//!
//! A driver of our own, a few hundred lines, instead of a crate, because a crate would make checkpoints more
//! expensive in three ways: here a notification is one exit per *batch*, interrupts stay off with and without
//! EVENT_IDX, and the rings and small frames are packed into few pages, since each page that the guest
//! dirties is a write fault in every epoch.

mod mmio;
mod net;
mod queue;

pub use net::Net;
