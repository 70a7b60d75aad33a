//! The parts of a disk, which its requests, its held writes and its device work with.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::engine::{Engine, Submission};
use super::image::Image;
use super::log::WriteLog;
use super::request::Geometry;
use super::stats::Counters;
use crate::devices::complaints::Complaints;
use crate::devices::valve::Permit;
use crate::event::EventSink;

/// What is special about a disk.
///
/// The submitting thread holds `submissions` over system calls; it is locked before the device's lock.
pub struct Disk {
    /// Which disk of the machine it is.
    pub(super) index: u16,
    pub(super) image: Arc<Image>,
    pub(super) geometry: Geometry,
    pub(super) queues: u16,
    /// Whether a write is output.
    pub(super) shared: bool,
    /// When writes to a shared disk may leave.
    pub(super) permit: Arc<Permit>,
    pub(super) engine: Box<dyn Engine>,
    pub(super) log: Arc<WriteLog>,
    /// Written when a full log has room again.
    pub(super) room: EventFd,
    pub(super) counters: Counters,
    /// About the disk's failures.
    pub(super) complaints: Complaints,
    /// Is told of requests that the host's disk has failed, and decides when the guest hears of them. Without
    /// it the guest hears at once.
    pub(super) faults: OnceLock<EventSink>,
    /// Notified after each batch while somebody waits for the disk to rest.
    pub(super) calm: Condvar,
    pub(super) submissions: Mutex<Vec<Submission>>,
}

impl Disk {
    /// The right to submit, with the pending submissions.
    pub(super) fn sending(&self) -> MutexGuard<'_, Vec<Submission>> {
        self.submissions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
