//! A checkpoint on its way from the commit to the log: a plain copy, in memory that is used again.

use std::time::SystemTime;

use outlive_epoch::{Checkpoint, PageEntry, RecordBuf, StateBuf, StateKind};

/// Bytes of each kind that a frame keeps when it is emptied, so that an extraordinary checkpoint is not kept several times.
const KEPT_BYTES: usize = 256 << 10;

/// What is recorded of a checkpoint.
#[derive(Default)]
pub(crate) struct Frame {
    pub(crate) generation: u64,
    pub(crate) number: u64,
    /// When it was committed, by this host's clock: microseconds since 1970.
    pub(crate) time_us: u64,
    pub(crate) entries: Vec<PageEntry>,
    pub(crate) data: Vec<u8>,
    /// Without constants and hashes.
    pub(crate) state: StateBuf,
    /// The primary's own hashes of memory and disks, if it was a self-check: a rewind compares itself with them.
    pub(crate) hashes: Box<StateBuf>,
    pub(crate) writes: RecordBuf,
    /// Bytes that it was counted with in the queue.
    pub(crate) queued: usize,
}

impl Frame {
    /// Bytes that a checkpoint takes in a queue.
    pub(crate) fn bytes_of(checkpoint: &Checkpoint<'_>) -> usize {
        let (entries, data) = checkpoint.raw_pages();
        size_of_val(entries) + data.len() + checkpoint.state().len() + checkpoint.disk_writes().len()
    }

    /// Copies a checkpoint into an empty frame. Returns false if there is not so much memory.
    pub(crate) fn fill(&mut self, checkpoint: &Checkpoint<'_>, time_us: u64) -> bool {
        let (entries, data) = checkpoint.raw_pages();
        let room = self.entries.try_reserve(entries.len()).is_ok()
            && self.data.try_reserve(data.len()).is_ok()
            && self.writes.try_copy_from(checkpoint.disk_writes()).is_ok();
        if !room {
            return false;
        }
        (self.generation, self.number) = (checkpoint.generation(), checkpoint.number());
        self.time_us = time_us;
        self.entries.extend_from_slice(entries);
        self.data.extend_from_slice(data);
        checkpoint
            .state()
            .sections()
            .filter(|section| section.kind.is_kept())
            .for_each(|section| self.state.push(section));
        let hashes = checkpoint.state().sections().filter(|section| section.kind == StateKind::Check);
        hashes.for_each(|section| self.hashes.push(section));
        true
    }

    /// Forgets the checkpoint; keeps a usual amount of memory.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.entries.shrink_to(KEPT_BYTES / size_of::<PageEntry>());
        self.data.clear();
        self.data.shrink_to(KEPT_BYTES);
        self.state.clear();
        self.hashes.clear();
        if self.writes.memory() > KEPT_BYTES {
            self.writes = RecordBuf::default();
        }
        self.writes.clear();
        self.queued = 0;
    }
}

/// Microseconds since 1970; 0 for a clock that stands before that.
pub(crate) fn micros(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
