//! Chunks of disks that were read in an epoch, on their way into the checkpoint that ends it.

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, RecordBuf};

use crate::disk::{chunk_sum, overlay};

/// How many samples may wait, and so how many chunks a checkpoint is compared by at most.
pub(crate) const MOST_CHUNKS: usize = 16;
const _: () = assert!(MOST_CHUNKS <= outlive_epoch::MAX_AUDIT_RANGES);
/// How often a chunk has its turn anew at once, because a write to it was in flight or its checkpoint had gone.
const TRIES: u8 = 4;
/// How many may wait for that.
const MOST_AGAIN: usize = 64;

/// What was read of a disk in an epoch.
pub(super) struct ChunkSample {
    /// The epoch in which it was read, from the first byte to the last. No write to it was in flight after that.
    pub(super) epoch: u64,
    /// One chunk, or several in a hole.
    pub(super) chunks: ChunkRange,
    /// The chunk's bytes; `None` for a hole.
    pub(super) bytes: Option<Vec<u8>>,
    /// The hash.
    pub(super) sum: u64,
    /// How often it was tried before.
    pub(super) tries: u8,
}

/// Samples that wait for the checkpoint of their epoch. They keep what was read, because the checkpoint may have
/// writes to a part of it.
pub(super) struct WaitingChunks {
    samples: Vec<ChunkSample>,
    spare: Vec<Vec<u8>>,
    /// Buffers that there are.
    buffers: usize,
    /// What has its turn again, and how often it was tried.
    again: Vec<(ChunkRange, u8)>,
}

impl Default for WaitingChunks {
    /// Room for all of it: the sender allocates nothing.
    fn default() -> Self {
        let (samples, spare) = (Vec::with_capacity(MOST_CHUNKS), Vec::with_capacity(MOST_CHUNKS));
        Self { samples, spare, buffers: 0, again: Vec::with_capacity(MOST_AGAIN + 1) }
    }
}

impl WaitingChunks {
    /// How many more samples may wait.
    pub(super) fn room(&self) -> usize {
        MOST_CHUNKS.saturating_sub(self.samples.len())
    }

    /// A buffer of one chunk; none if all wait.
    pub(super) fn buffer(&mut self) -> Option<Vec<u8>> {
        let spare = self.spare.pop();
        if spare.is_none() && self.buffers < MOST_CHUNKS {
            self.buffers += 1;
            return Some(vec![0; DISK_CHUNK]);
        }
        spare
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&mut self, bytes: Option<Vec<u8>>) {
        if let Some(mut bytes) = bytes {
            bytes.resize(DISK_CHUNK, 0);
            self.spare.push(bytes);
        }
    }

    /// Has a sample wait for its checkpoint.
    pub(super) fn offer(&mut self, sample: ChunkSample) {
        self.samples.push(sample);
    }

    /// What could not be compared has its turn again, but not for ever: where a write is always in flight, nothing
    /// is compared.
    pub(super) fn try_again(&mut self, chunks: ChunkRange, tries: u8) {
        if tries < TRIES && self.again.len() < MOST_AGAIN {
            self.again.push((chunks, tries + 1));
        }
    }

    /// How many have their turn again.
    pub(super) fn count_again(&self) -> usize {
        self.again.len()
    }

    /// What has its turn again, in its order.
    pub(super) fn next_again(&mut self) -> Option<(ChunkRange, u8)> {
        (!self.again.is_empty()).then(|| self.again.remove(0))
    }

    /// What is left of it has its turn next.
    pub(super) fn put_back(&mut self, chunks: ChunkRange, tries: u8) {
        self.again.insert(0, (chunks, tries));
    }

    /// The checkpoint that ends this epoch has these writes. Puts what it is to be compared by into `ranges`. Samples
    /// of earlier epochs are of no use any more.
    pub(super) fn take(&mut self, epoch: u64, writes: &RecordBuf, ranges: &mut Vec<AuditRange>) {
        ranges.clear();
        for at in (0..self.samples.len()).rev() {
            if self.samples[at].epoch > epoch {
                continue;
            }
            let mut sample = self.samples.swap_remove(at);
            match sample.at_its_end(epoch, writes) {
                Some(sum) => ranges.push(AuditRange { chunks: sample.chunks, sum }),
                None => self.try_again(sample.chunks, sample.tries),
            }
            self.give_back(sample.bytes);
        }
        // As they are on the standby's disk.
        ranges.sort_unstable_by_key(|range| (range.chunks.disk, range.chunks.first));
    }

    /// Says that all samples are of this epoch.
    #[cfg(test)]
    pub(super) fn pretend(&mut self, epoch: u64) {
        self.samples.iter_mut().for_each(|sample| sample.epoch = epoch);
    }

    /// Nothing that waits is of use: the copy is another one.
    pub(super) fn forget(&mut self) {
        while let Some(sample) = self.samples.pop() {
            self.give_back(sample.bytes);
        }
        self.again.clear();
    }
}

impl ChunkSample {
    /// The hash of what the disk has at the end of the epoch, if it is known.
    fn at_its_end(&mut self, epoch: u64, writes: &RecordBuf) -> Option<u64> {
        if self.epoch != epoch {
            return None;
        }
        let ChunkRange { disk, first, .. } = self.chunks;
        match &mut self.bytes {
            Some(bytes) => {
                let written = overlay(bytes, disk, self.chunks.offset(), writes.iter());
                Some(if written { chunk_sum(first, bytes) } else { self.sum })
            }
            None => {
                let end = self.chunks.offset() + self.chunks.len();
                let hits = |offset: u64, to: u64| offset < end && self.chunks.offset() < to;
                let written = writes.iter().any(|it| it.disk == disk && hits(it.offset, it.end()));
                (!written).then_some(0)
            }
        }
    }
}
