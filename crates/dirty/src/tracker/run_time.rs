//! How long the guest ran in an epoch.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Written by the thread that holds the epoch.
pub(super) struct RunTime {
    start: Instant,
    /// When the epoch began, in nanoseconds since `start`.
    began: AtomicU64,
    /// What the guest had of it.
    ran: AtomicU64,
}

impl Default for RunTime {
    fn default() -> Self {
        RunTime { start: Instant::now(), began: AtomicU64::new(0), ran: AtomicU64::new(0) }
    }
}

impl RunTime {
    /// The guest is about to run.
    pub(super) fn begins(&self) {
        self.began.store(self.now(), Ordering::Relaxed);
    }

    /// The guest has stopped. Called again in the same epoch, it counts what the guest ran since.
    pub(super) fn ended(&self) {
        let ran = self.now().saturating_sub(self.began.load(Ordering::Relaxed));
        self.ran.store(ran, Ordering::Relaxed);
    }

    /// Nanoseconds that the guest ran in the epoch that has ended.
    pub(super) fn take(&self) -> u64 {
        self.ran.swap(0, Ordering::Relaxed)
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}
