//! The block device: virtio-blk in front of an image file or a block device of the host.
//!
//! ```text
//!  guest ── queues ──► thread ──► bounce buffers ──► engine (io_uring or threads) ──► image
//!                        │  ◄───────────────────────┘
//!                        └──► write log ──► checkpoint
//! ```
//!
//! - [`device`]: the machine's handle. [`config`]: what the guest is told, and the limits.
//! - `request`: what a driver asks for. `requests`: the path of a request, in short steps inside the gate;
//!   `table`: the requests in flight and the order of those that overlap; `job`: the operations of one
//!   request; `pool`: bounce buffers.
//! - `engine`: the host's kernel does the work, outside the gate. [`image`]: the image that it works on.
//! - [`log`]: what a checkpoint learns of completed writes. [`chunks`]: which parts of a disk were written.
//! - `hold`: writes to a shared disk wait for their commit.
//! - [`persist`]: the saved state, with the requests in flight.
//!
//! # Across a checkpoint
//!
//! A checkpoint does not wait for the disk. Requests in flight stay in flight; the checkpoint lists them, and
//! a VM that is resumed elsewhere issues them again, in order. Repeating a read is harmless. So is repeating
//! a write, because the driver leaves the data alone until the request is complete, and because requests that
//! overlap are carried out one after another, also across the repetition. As on any disk, it is undefined
//! what an interrupted write had done.
//!
//! # What a flush promises
//!
//! A guest's flush completes when the image *on the host where the VM runs* has been made durable
//! (`fdatasync`). The standby learns of it with the checkpoint of the epoch, in order with the writes before
//! it. The host that runs the VM after a failure has the disk of the last committed checkpoint, which holds
//! every write that was complete in it; what the guest told the outside world was held until then. So no one
//! outside can know of a flush that is missing. If all hosts lose power together, each image holds at least
//! what the guest flushed before the last checkpoint that this host has made durable; only the host where the
//! VM ran has all of it.
//!
//! # Limits
//!
//! 16 queues of 128 chains; 256 requests in flight; 126 buffers of 32 KiB in a request; 16 MiB of bounce
//! buffers. Anything more waits with the guest until there is room.

pub mod chunks;
pub mod config;
pub mod device;
mod disk;
mod engine;
mod hold;
pub mod image;
mod job;
pub mod log;
pub mod persist;
mod pool;
mod request;
mod requests;
pub mod stats;
mod table;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod tests;

pub use chunks::{CHUNK, ChunkSet};
pub use config::SectorSize;
pub use device::{BlockDevice, BlockError, DiskOptions, PartLog};
pub use disk::Disk;
pub use engine::EngineKind;
pub use hold::ReleasedWrites;
pub use image::{Image, ImageError, LockedImage};
pub use log::{LogMode, LogStats, MAX_RECORD, WriteLog};
pub use persist::{BlockState, DiskFacts, DiskState, InFlight, Misfit};
pub use stats::BlockStats;
pub use table::MAX_IN_FLIGHT;

/// Length of a serial number (virtio 1.2, 5.2.6).
pub const SERIAL_BYTES: usize = 20;
