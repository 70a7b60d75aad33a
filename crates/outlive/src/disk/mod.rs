//! Disks on both hosts: each host has its own image, and the standby's moves from one committed checkpoint to
//! the next.
//!
//! ```text
//! primary   write log of the machine ──► sender ──► link          sync.rs: what differs, found by sums, sent in the background
//! standby   link ──► staged, acknowledged ──► replica.rs (a thread) ──► journal.rs ──► image.rs
//! both      sidecar.rs: whose copy an image is, and whether it is whole; sidecars.rs: a thread that keeps it said
//! ```
//!
//! Why an image is never between two checkpoints, not even after a loss of power (invariant 2):
//!
//! 1. The writes of a checkpoint are appended to the journal as one unit with a checksum over all of it.
//! 2. The journal is made durable. Several checkpoints are made durable together: at the latest after 50 ms,
//!    and at once when the guest asked for a flush.
//! 3. Only then the images are written, in the order of the checkpoints.
//! 4. Only when the images are durable, the journal is emptied.
//!
//! So whatever is in an image and not known to be durable is still in the journal. Whoever opens an image
//! next replays the journal from its start; writing the same bytes twice changes nothing.

mod apply;
mod hash;
mod image;
mod journal;
mod prepare;
mod replica;
mod sidecar;
mod sidecars;
mod sync;
#[cfg(test)]
mod tests;

pub(crate) use hash::contents as hash_contents;
pub(crate) use prepare::{
    check_generation, end_earlier_vms, for_run, for_standby, has_sidecar, mark_primary, refuse_unfinished,
};
pub(crate) use replica::{DiskEvent, Replica, ReplicaDisk};
pub(crate) use sidecars::{Saying, Sidecars};
pub(crate) use sync::{Changed, DiskSection, DiskSync, SourceDisk, SyncReport};
