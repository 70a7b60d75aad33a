//! Counters of the entropy device.

use std::sync::atomic::{AtomicU64, Ordering};

/// What an entropy device has given since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngStats {
    /// Requests answered.
    pub requests: u64,
    /// Random bytes given.
    pub bytes: u64,
    /// Times that the guest had to wait because it asked too fast.
    pub throttled: u64,
    /// Times that the host had no random bytes.
    pub failed: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) throttled: AtomicU64,
    pub(super) failed: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self) -> RngStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RngStats {
            requests: get(&self.requests),
            bytes: get(&self.bytes),
            throttled: get(&self.throttled),
            failed: get(&self.failed),
        }
    }
}
