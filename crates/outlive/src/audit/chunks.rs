//! Chunks of disks, from the read until the standby's answer.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, RecordBuf};

use crate::disk::{chunk_sum, overlay};

/// How many sums may be on their way, from the read until the standby's answer, and so how many a checkpoint is compared
/// by at most.
pub(crate) const MOST_CHUNKS: usize = 16;
const _: () = assert!(MOST_CHUNKS <= outlive_epoch::MAX_AUDIT_RANGES);
/// How often a chunk has its turn in a round, if it could not be compared; after that it is left out of the round.
pub(super) const TRIES: u8 = 20;
/// While so many wait for their next turn, the round does not go on.
const MOST_AGAIN: usize = 64;
/// How long a sample waits for the writes that it may have seen.
const WRITE: Duration = Duration::from_secs(2);
/// How long the standby may take to answer: longer than a disk that is not broken needs for a read. One that compares
/// nothing never answers.
const ANSWER: Duration = Duration::from_secs(35);

/// What was read of a disk.
pub(super) struct ChunkSample {
    /// The checkpoint whose writes belong on top of it next; at first that of the epoch in which the read began.
    pub(super) next: u64,
    /// The first checkpoint that has all writes that the read may have seen.
    pub(super) whole: Whole,
    /// One chunk, or several in a hole.
    pub(super) chunks: ChunkRange,
    /// The chunk's bytes; `None` for a hole.
    pub(super) bytes: Option<Vec<u8>>,
    /// The hash of what was read.
    pub(super) sum: u64,
    /// Whether writes have changed it since.
    pub(super) is_written: bool,
    /// When it was read.
    pub(super) read: Instant,
    /// How often it was tried before.
    pub(super) tries: u8,
}

/// From when on a sample has what the log has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    /// From this checkpoint on.
    From(u64),
    /// Once the requests up to this number are no longer in flight.
    After(u64),
}

/// A sum that the standby has not answered.
struct Sent {
    checkpoint: u64,
    at: Instant,
    chunks: ChunkRange,
    tries: u8,
}

/// The standby's answer to the sums of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// It has done with all sums up to this checkpoint.
    pub(super) checkpoint: u64,
    /// How many chunks it has compared.
    pub(super) compared: u64,
    /// It has read something, and compared nothing: a write has overtaken the read of the first chunk.
    pub(super) overtaken: bool,
}

/// What became of a disk's chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// How many the standby has compared.
    pub(super) compared: u64,
    /// How many were left out of the round.
    pub(super) left_out: u64,
}

/// Chunks on their way: read, and waiting for a checkpoint that has all that was read; sent, and waiting for the
/// standby's answer; or waiting for another turn. Samples keep what was read, because checkpoints have writes to parts
/// of it.
pub(super) struct WaitingChunks {
    samples: Vec<ChunkSample>,
    sent: VecDeque<Sent>,
    spare: Vec<Vec<u8>>,
    /// Buffers that there are.
    buffers: usize,
    /// What has its turn again, and how often it was tried.
    again: VecDeque<(ChunkRange, u8)>,
    /// By disk, since it was last asked for.
    outcomes: Vec<(u16, Outcome)>,
    /// Something was forgotten, so the round is not whole.
    is_broken: bool,
}

impl Default for WaitingChunks {
    /// Room for all of it: the sender allocates nothing.
    fn default() -> Self {
        Self {
            samples: Vec::with_capacity(MOST_CHUNKS),
            sent: VecDeque::with_capacity(MOST_CHUNKS),
            spare: Vec::with_capacity(MOST_CHUNKS),
            buffers: 0,
            again: VecDeque::with_capacity(MOST_AGAIN + 2 * MOST_CHUNKS),
            outcomes: Vec::new(),
            is_broken: false,
        }
    }
}

impl WaitingChunks {
    /// From now on these disks are counted.
    pub(super) fn count(&mut self, disks: impl Iterator<Item = u16>) {
        self.outcomes = disks.map(|disk| (disk, Outcome::default())).collect();
    }

    /// How many more may be on their way.
    pub(super) fn room(&self) -> usize {
        MOST_CHUNKS.saturating_sub(self.samples.len() + self.sent.len())
    }

    /// Whether nothing is on its way, and nothing has its turn again.
    pub(super) fn is_empty(&self) -> bool {
        self.samples.is_empty() && self.sent.is_empty() && self.again.is_empty()
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

    /// What could not be compared has its turn again, but not for ever.
    pub(super) fn try_again(&mut self, chunks: ChunkRange, tries: u8) {
        if tries + 1 < TRIES {
            self.again.push_back((chunks, tries + 1));
        } else {
            self.leave_out(chunks);
        }
    }

    /// It is no part of this round.
    pub(super) fn leave_out(&mut self, chunks: ChunkRange) {
        if let Some(outcome) = self.outcome(chunks.disk) {
            outcome.left_out += u64::from(chunks.count);
        }
    }

    fn outcome(&mut self, index: u16) -> Option<&mut Outcome> {
        self.outcomes.iter_mut().find(|(disk, _)| *disk == index).map(|(_, outcome)| outcome)
    }

    /// What became of each disk's chunks since the last call.
    pub(super) fn take_outcomes(&mut self) -> impl Iterator<Item = (u16, Outcome)> {
        self.outcomes.iter_mut().map(|(disk, outcome)| (*disk, std::mem::take(outcome)))
    }

    /// As if so many had been compared, and left out.
    #[cfg(test)]
    pub(super) fn pretend(&mut self, compared: u64, left_out: u64) {
        self.outcomes[0].1 = Outcome { compared, left_out };
    }

    /// How many have their turn again.
    pub(super) fn count_again(&self) -> usize {
        self.again.len()
    }

    /// Whether so many do that nothing new has its turn.
    pub(super) fn is_behind(&self) -> bool {
        self.again.len() >= MOST_AGAIN
    }

    /// What has its turn again, in its order.
    pub(super) fn next_again(&mut self) -> Option<(ChunkRange, u8)> {
        self.again.pop_front()
    }

    /// What is left of it has its turn next.
    pub(super) fn put_back(&mut self, chunks: ChunkRange, tries: u8) {
        self.again.push_front((chunks, tries));
    }

    /// Samples that may have seen writes that are still in flight: what was read, and the number of the newest request.
    pub(super) fn unlogged(&self) -> impl Iterator<Item = (ChunkRange, u64)> {
        self.samples.iter().filter_map(|sample| match sample.whole {
            Whole::After(last) => Some((sample.chunks, last)),
            Whole::From(_) => None,
        })
    }

    /// All writes that this sample may have seen are in the logs up to this epoch.
    pub(super) fn logged(&mut self, chunks: ChunkRange, last: u64, epoch: u64) {
        let is_it = |it: &&mut ChunkSample| it.chunks == chunks && it.whole == Whole::After(last);
        if let Some(sample) = self.samples.iter_mut().find(is_it) {
            sample.whole = Whole::From(epoch);
        }
    }

    /// The log will never have what this sample may have seen.
    pub(super) fn lacks(&mut self, chunks: ChunkRange) {
        if let Some(at) = self.samples.iter().position(|sample| sample.chunks == chunks) {
            self.drop_sample(at);
        }
    }

    /// Gives up what has waited for too long: for a write that the disk does not finish, or for an answer.
    pub(super) fn expire(&mut self, now: Instant) {
        let age = |since: Instant| now.saturating_duration_since(since);
        for at in (0..self.samples.len()).rev() {
            if matches!(self.samples[at].whole, Whole::After(_)) && age(self.samples[at].read) > WRITE {
                self.drop_sample(at);
            }
        }
        while self.sent.front().is_some_and(|sent| age(sent.at) > ANSWER) {
            let Some(Sent { chunks, tries, .. }) = self.sent.pop_front() else { break };
            self.try_again(chunks, tries);
        }
    }

    fn drop_sample(&mut self, at: usize) {
        let ChunkSample { chunks, tries, bytes, .. } = self.samples.swap_remove(at);
        self.give_back(bytes);
        self.try_again(chunks, tries);
    }

    /// The checkpoint that ends this epoch has these writes. Puts what it is to be compared by into `ranges`. Samples
    /// that lack the writes of an earlier checkpoint are of no use any more.
    pub(super) fn take(&mut self, epoch: u64, writes: &RecordBuf, ranges: &mut Vec<AuditRange>) {
        ranges.clear();
        let at_now = Instant::now();
        for at in (0..self.samples.len()).rev() {
            let sample = &mut self.samples[at];
            if sample.next > epoch {
                continue;
            }
            if sample.next < epoch || !sample.add(writes) {
                self.drop_sample(at);
                continue;
            }
            sample.next = epoch + 1;
            if matches!(sample.whole, Whole::From(first) if first <= epoch) {
                let sample = self.samples.swap_remove(at);
                let (chunks, tries) = (sample.chunks, sample.tries);
                ranges.push(AuditRange { chunks, sum: sample.sum_now() });
                self.sent.push_back(Sent { checkpoint: epoch, at: at_now, chunks, tries });
                self.give_back(sample.bytes);
            }
        }
        // As they are on the standby's disk; it answers in this order.
        let place = |chunks: &ChunkRange| (chunks.disk, chunks.first);
        ranges.sort_unstable_by_key(|range| place(&range.chunks));
        let old = self.sent.len() - ranges.len();
        self.sent.make_contiguous()[old..].sort_unstable_by_key(|sent| place(&sent.chunks));
    }

    /// The standby has answered. What it has compared are the first of those chunks that it had not answered. Returns
    /// whether these were all.
    pub(super) fn answered(&mut self, answer: Answer) -> bool {
        let Answer { checkpoint, mut compared, mut overtaken } = answer;
        let mut all = true;
        while self.sent.front().is_some_and(|sent| sent.checkpoint <= checkpoint) {
            let Some(Sent { chunks, tries, .. }) = self.sent.pop_front() else { break };
            let done = compared.min(chunks.count.into()) as u32;
            compared -= u64::from(done);
            if let Some(outcome) = self.outcome(chunks.disk) {
                outcome.compared += u64::from(done);
            }
            if done < chunks.count {
                all = false;
                if std::mem::take(&mut overtaken) {
                    // A chunk that the guest always writes, on a disk that is slow to read, would have its turn for ever.
                    self.try_again(chunks, tries);
                    continue;
                }
                let (first, count) = (chunks.first + u64::from(done), chunks.count - done);
                // That is no fault of theirs, and the standby is asked at its pace.
                self.again.push_back((ChunkRange { first, count, ..chunks }, tries));
            }
        }
        all
    }

    /// Nothing that waits is of use: the copy is another one.
    pub(super) fn forget(&mut self) {
        while let Some(sample) = self.samples.pop() {
            self.give_back(sample.bytes);
        }
        self.sent.clear();
        self.again.clear();
        self.is_broken = true;
    }

    /// Whether something was forgotten since the last call.
    pub(super) fn take_broken(&mut self) -> bool {
        std::mem::take(&mut self.is_broken)
    }
}

impl ChunkSample {
    /// Puts the next checkpoint's writes on top. Returns whether it still is what it was: a hole that is written is none.
    fn add(&mut self, writes: &RecordBuf) -> bool {
        let ChunkRange { disk, .. } = self.chunks;
        let Some(bytes) = &mut self.bytes else {
            let end = self.chunks.offset() + self.chunks.len();
            let hits = |offset: u64, to: u64| offset < end && self.chunks.offset() < to;
            return !writes.iter().any(|it| it.disk == disk && hits(it.offset, it.end()));
        };
        self.is_written |= overlay(bytes, disk, self.chunks.offset(), writes.iter());
        true
    }

    fn sum_now(&self) -> u64 {
        match &self.bytes {
            Some(bytes) if self.is_written => chunk_sum(self.chunks.first, bytes),
            Some(_) => self.sum,
            None => 0,
        }
    }
}
