//! Counters of the console.

use std::sync::atomic::{AtomicU64, Ordering};

/// What has gone through a console since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleStats {
    /// Bytes the guest has sent.
    pub tx_bytes: u64,
    /// Bytes the guest was given.
    pub rx_bytes: u64,
    /// Typed bytes that were thrown away because the guest did not run here or had no room.
    pub rx_dropped: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) tx_bytes: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self, rx_dropped: u64) -> ConsoleStats {
        ConsoleStats {
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
            rx_dropped,
        }
    }
}
