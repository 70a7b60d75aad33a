//! What the network device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a network device since its start. What became of sent frames is counted by the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Frames the guest received.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames that the guest could not take: longer than its buffers, or with work left that its driver has
    /// not agreed to do.
    pub rx_dropped: u64,
    /// Frames the guest sent.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest shorter than an Ethernet header: not sent.
    pub tx_runts: u64,
    /// Frames of the guest whose header claims what it must not: not sent.
    pub tx_bad_headers: u64,
    /// Frames that had waited in the tap since before the machine went live: dropped.
    pub stale: u64,
}

/// The counters at work: written by the device thread, read by anyone.
#[derive(Debug, Default)]
pub(super) struct Counters {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    pub(super) tx_runts: AtomicU64,
    pub(super) tx_bad_headers: AtomicU64,
    pub(super) stale: AtomicU64,
}

impl Counters {
    pub(super) fn rx(&self, len: usize) {
        self.rx_frames.fetch_add(1, Ordering::Relaxed);
        self.rx_bytes.fetch_add(len as u64, Ordering::Relaxed);
    }

    pub(super) fn drop_received(&self) {
        self.rx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn tx(&self, len: usize) {
        self.tx_frames.fetch_add(1, Ordering::Relaxed);
        self.tx_bytes.fetch_add(len as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> NetStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetStats {
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            rx_dropped: get(&self.rx_dropped),
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            tx_runts: get(&self.tx_runts),
            tx_bad_headers: get(&self.tx_bad_headers),
            stale: get(&self.stale),
        }
    }
}
