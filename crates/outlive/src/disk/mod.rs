//! Disks on both hosts: each host has its own image, and the standby's moves from one committed checkpoint to
//! the next.
//!
//! ```text
//! primary   write log of the machine ──► sender ──► link          sync.rs: what differs, found by sums, sent in the background
//! standby   link ──► staged, acknowledged ──► replica.rs (a thread) ──► journal.rs ──► image.rs
//! both      book.rs: what this process knows of its images' contents, so that it need not read all of them again
//!           sidecar.rs: whose copy an image is, and whether it is whole; shared.rs: who uses a shared disk;
//!           sidecars.rs: the thread that writes both
//! a start   prepare.rs: brings images to their last commit; standing.rs: whether the VM may go on with them;
//!           start.rs: as which VM, in which generation; descendant.rs: the same for a VM that begins from another one's past;
//!           overwrite.rs, blank.rs: what a standby may overwrite;
//!           format.rs: images that are not raw
//! before    import.rs: makes an image of a file in another format, and a disk for cloud-init
//! ```
//!
//! Why an image is never between two checkpoints, not even after a loss of power (invariant 2):
//!
//! 1. The writes of a checkpoint are appended to the journal as one unit with a checksum over all of it.
//! 2. The journal is made durable. Several checkpoints are made durable together: at the latest after 50 ms,
//!    and at once when the guest asked for a flush.
//! 3. Only then are the images written, in the order of the checkpoints.
//! 4. Only when the images are durable is the journal emptied.
//!
//! So whatever in an image is not known to be durable is still in the journal. The next process that opens
//! the image replays the journal from its start; writing the same bytes twice changes nothing.

mod apply;
mod blank;
mod book;
mod command;
mod descendant;
mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod hash;
mod image;
mod import;
mod journal;
mod overwrite;
mod part;
mod prepare;
mod provenance;
mod replica;
mod shared;
mod sidecar;
mod sidecars;
mod stamp;
mod standing;
mod start;
mod sync;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use book::{Book, Books};
pub(crate) use command::command;
pub(crate) use descendant::{Newborn, NewbornError, descendant, write_sidecars};
pub(crate) use format::{NotRaw, refuse_other_formats};
pub(crate) use hash::{chunk as chunk_sum, contents as hash_contents};
pub(crate) use image::{ChunkReader, ImageReader, Store, apply, chunks, overlay};
pub(crate) use overwrite::{OverwriteError, Target};
pub(crate) use part::{Part, PartError};
pub(crate) use prepare::{Held, PrepareError, for_run, for_standby, refuse_shared_in_use, refuse_unfinished};
pub use provenance::DangerKind;
pub(crate) use provenance::{Accepted, Provenance};
pub(crate) use replica::{DiskEvent, Replica, ReplicaDisk, ReplicaEndError, ReplicaStartError, STUCK};
pub(crate) use shared::{Note, is_noted_here_only};
pub(crate) use sidecar::{CopyEnd, STATE_DIR};
pub(crate) use sidecars::{Image, Saying, Sidecars};
pub(crate) use start::{Start, StartError};
pub(crate) use sync::{Changed, DiskSection, DiskSync, SourceDisk, SyncReport};
