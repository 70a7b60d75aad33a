//! What a disk counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a disk since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Reads that the guest was told are done.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Their bytes.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests to discard.
    pub discards: u64,
    /// Requests to write zeroes.
    pub zeroes: u64,
    /// Requests that failed, because of the host's disk or because they made no sense.
    pub errors: u64,
    /// Requests in flight now.
    pub in_flight: u64,
    /// Most requests in flight at one time.
    pub most_in_flight: u64,
    /// Requests that had to wait for an earlier one that they overlap.
    pub serialised: u64,
    /// Writes to a shared disk that wait for the commit of their epoch now.
    pub held: u64,
    /// Writes to a shared disk that were held and then let go.
    pub released: u64,
    /// How often completed writes found the write log full.
    pub log_full: u64,
    /// How often a request had to stay with the guest for want of bounce buffers.
    pub no_room: u64,
    /// Requests issued again after a restore.
    pub reissued: u64,
}

/// The counters at work: written under the device's lock, read by anyone.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) discards: AtomicU64,
    pub(super) zeroes: AtomicU64,
    pub(super) errors: AtomicU64,
    in_flight: AtomicU64,
    most_in_flight: AtomicU64,
    pub(super) serialised: AtomicU64,
    pub(super) held: AtomicU64,
    pub(super) released: AtomicU64,
    pub(super) log_full: AtomicU64,
    pub(super) no_room: AtomicU64,
    pub(super) reissued: AtomicU64,
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count as u64, Ordering::Relaxed);
        self.most_in_flight.fetch_max(count as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> BlockStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockStats {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            write_bytes: get(&self.write_bytes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            zeroes: get(&self.zeroes),
            errors: get(&self.errors),
            in_flight: get(&self.in_flight),
            most_in_flight: get(&self.most_in_flight),
            serialised: get(&self.serialised),
            held: get(&self.held),
            released: get(&self.released),
            log_full: get(&self.log_full),
            no_room: get(&self.no_room),
            reissued: get(&self.reissued),
        }
    }
}
