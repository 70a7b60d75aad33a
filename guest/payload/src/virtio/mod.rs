//! The virtio-mmio (version 2) network card and disk, driven by polling.
//!
//! A driver of our own, a few hundred lines, instead of a crate, because a crate would make checkpoints more
//! expensive in three ways: here a notification is one exit per *batch*, interrupts stay off with and without
//! EVENT_IDX, and the rings and small frames are packed into few pages, since each page that the guest
//! dirties is a write fault in every epoch.

mod blk;
mod mmio;
mod net;
mod queue;

pub use blk::Blk;
pub use net::Net;
