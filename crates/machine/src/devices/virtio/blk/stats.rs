//! What a disk counts.

use crate::devices::counters::counters;

counters! {
    /// What has gone through a disk since its start.
    BlockStats, Counters:
    /// Reads that the guest was told are done.
    reads,
    /// Their bytes.
    read_bytes,
    /// Writes.
    writes,
    /// Their bytes.
    write_bytes,
    /// Flushes.
    flushes,
    /// Requests to discard.
    discards,
    /// Requests to write zeroes.
    zeroes,
    /// Requests that failed, because of the host's disk or because they made no sense.
    errors,
    /// Requests in flight now.
    in_flight,
    /// Most requests in flight at one time.
    most_in_flight,
    /// Requests that had to wait for an earlier one that they overlap.
    serialised,
    /// Writes to a shared disk that wait for the commit of their epoch now.
    held,
    /// Writes to a shared disk that were held and then let go.
    released,
    /// How often completed writes found the write log full.
    log_full,
    /// How often a request had to stay with the guest because bounce buffers were missing.
    no_room,
    /// Requests issued again after a restore.
    reissued,
}

impl Counters {
    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.set(count as u64);
        self.most_in_flight.raise(count as u64);
    }
}
