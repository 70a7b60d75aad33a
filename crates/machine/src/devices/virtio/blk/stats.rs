//! What a disk counts.

use crate::devices::counters::counters;

counters! {
    /// Counters of a disk since its start.
    BlockStats, Counters:
    /// Reads that were reported to the guest as done.
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
    /// Requests that failed, because of the host's disk or because they were invalid.
    errors,
    /// Requests in flight now.
    in_flight,
    /// The most requests in flight at one time.
    most_in_flight,
    /// Requests that had to wait for an earlier one that they overlap.
    serialised,
    /// Writes to a shared disk that now wait for the commit of their epoch.
    held,
    /// Writes to a shared disk that were held and then let out.
    released,
    /// How often completed writes found the write log full.
    log_full,
    /// How often a request had to stay with the guest because no bounce buffer was free.
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
