//! The record of a VM: a base, and every checkpoint that was committed since.
//!
//! A standby gets all that is needed to run a VM from any of its checkpoints, hundreds of times a second, and throws it
//! away with the next one. The [`Recorder`] writes it down instead: a copy of memory and disks, which it makes beside the
//! commits, and behind it each checkpoint as it came over the link, in the link's own format. [`Record`] plays it back.
//!
//! A record consists of *runs*. In a run there is no gap, so any checkpoint from its first to its last can be had. A
//! recorder that cannot keep up, or whose disk is full, ends its run and begins another one later: it never makes a commit
//! wait. What is older than the operator wants to keep is forgotten: the oldest checkpoints become part of the base.
//!
//! Bytes in, bytes out: this crate knows nothing of KVM and of links.

#![forbid(unsafe_code)]

mod base;
mod claim;
mod copying;
mod forget;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod places;
mod playback;
mod record;
mod recorder;
mod run;
mod segment;
mod source;
#[cfg(test)]
mod tests;

pub use claim::{ClaimError, check};
pub use forget::Keep;
pub use playback::{PlayError, Playback};
pub use record::{At, FindError, OpenError, Record};
pub use recorder::{Config, Recorder, Report, Session, Spawn, Told};
pub use run::{Found, Run, RunError};
pub use source::{Settled, Source};

pub(crate) use segment::disks as segment_disks;
