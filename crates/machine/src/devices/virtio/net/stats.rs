//! What a network card counts.

use crate::devices::counters::counters;

counters! {
    /// What has gone through a network card since its start. What became of sent frames is counted by the
    /// output.
    NetStats, Counters:
    /// Frames the guest received.
    rx_frames,
    /// Their bytes.
    rx_bytes,
    /// Frames among them, or dropped, that came from another host's tail and not from the port.
    rx_given,
    /// Frames that the guest could not take: longer than its buffers, or with work left that its driver has
    /// not agreed to do.
    rx_dropped,
    /// Frames the guest sent.
    tx_frames,
    /// Their bytes.
    tx_bytes,
    /// Frames of the guest shorter than an Ethernet header: not sent.
    tx_runts,
    /// Frames of the guest whose header claims what it must not: not sent.
    tx_bad_headers,
    /// Frames that had waited in the tap since before the machine went live: dropped.
    stale,
}
