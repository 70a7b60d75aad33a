//! The auditor's second half: it reads the primary's disks while the guest writes to them.
//!
//! What was read may have parts of writes that are in flight after the read, and of no others that no log has. Once
//! these are complete their records are in the logs up to the running epoch's. So what the disk has at that checkpoint,
//! or at any later one, is what was read, with all logs on top of it from that of the epoch in which the read began;
//! see `docs/audit.md`.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use outlive_epoch::ChunkRange;
use outlive_machine::PartLog;

use super::chunks::{ChunkSample, Whole};
use super::{Audit, DiskRate};
use crate::disk::{ChunkReader, Store, chunk_sum, chunks};

/// How many chunks are read without a rest: what a mechanical disk reads in the time of a seek.
const BURST: usize = 4;
/// How many chunks in a hole are one sample. A standby whose image has no holes must read as many.
const HOLE: u64 = 16;
/// How long nothing is read after the standby has left something out, at first and at most.
const REST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_secs(3);
/// Time between two looks at writes that a sample waits for.
const LOOK: Duration = Duration::from_millis(5);

/// Whether the log has a part of a disk; see [`AuditDisk::part_log`].
type AskLog = Box<dyn Fn(u64, u64, u64) -> PartLog + Send>;

/// A disk to compare: one that each host has an image of, and that the guest writes to.
pub(crate) struct AuditDisk<S = File> {
    /// Its position among the VM's disks.
    pub(crate) index: u16,
    /// Its length.
    pub(crate) bytes: u64,
    /// Its image.
    pub(crate) image: S,
    /// What the write log has of a part: [`BlockDevice::part_log`](outlive_machine::BlockDevice::part_log).
    pub(crate) part_log: AskLog,
}

/// Reads the disks, chunk by chunk, round after round.
pub(super) struct DiskAuditor<S = File> {
    audit: Arc<Audit>,
    disks: Vec<AuditDisk<S>>,
    rate: DiskRate,
    /// The disk and the chunk whose turn is next.
    at: (usize, u64),
    /// How many chunks are left of this round.
    left: u64,
    /// Until when the standby has its rest, and how long the last one was.
    rest: Option<(Instant, Duration)>,
    /// Whether an image could not be read in this round.
    complained: bool,
}

impl<S: Store> DiskAuditor<S> {
    /// Begins at any chunk; `seed` says at which.
    pub(super) fn new(audit: Arc<Audit>, disks: Vec<AuditDisk<S>>, seed: u64) -> Self {
        let at = (0, disks.first().map_or(0, |disk| seed % chunks(disk.bytes).max(1)));
        audit.count_disks(disks.iter().map(|disk| (disk.index, disk.bytes)));
        let rate = DiskRate::start();
        let mut auditor = Self { audit, disks, rate, at, left: 0, rest: None, complained: false };
        auditor.begin_round();
        auditor
    }

    /// Counts a round from here on.
    pub(super) fn begin_round(&mut self) {
        self.left = self.disks.iter().map(|disk| chunks(disk.bytes)).sum();
        self.complained = false;
        self.audit.disk_round_began();
    }

    /// Whether there is something to read now, and the disks have had their rest.
    pub(super) fn is_due(&self) -> bool {
        let rests = || self.rest.is_some_and(|(until, _)| Instant::now() < until);
        let waiting = self.audit.chunks();
        (self.left > 0 || waiting.count_again() > 0)
            && waiting.room() >= BURST
            && self.rate.wait().is_zero()
            && !rests()
    }

    /// How long the last rest was that the standby has taken.
    #[cfg(test)]
    pub(super) fn standby_rests(&self) -> Option<Duration> {
        self.rest.map(|(_, last)| last)
    }

    /// How long the disks rest from now on.
    #[cfg(test)]
    pub(super) fn rests(&self) -> Duration {
        self.rate.wait()
    }

    /// Takes the standby's answers, looks whether the log has what samples wait for, and ends a round of which nothing
    /// is left. Returns when it must look again.
    pub(super) fn look(&mut self, epoch: &dyn Fn() -> Option<u64>) -> Option<Duration> {
        if self.audit.chunks().take_broken() {
            self.begin_round();
        }
        self.take_answers();
        let unlogged: Vec<_> = self.audit.chunks().unlogged().collect();
        for &(chunks, last) in &unlogged {
            let Some(disk) = self.disks.iter().find(|disk| disk.index == chunks.disk) else { continue };
            let answer = (disk.part_log)(chunks.offset(), chunks.len(), last);
            // The epoch after the disk: the records of what it has no longer in flight are in the logs up to this one.
            match (answer, epoch()) {
                (PartLog::Has, Some(running)) => self.audit.chunks().logged(chunks, last, running),
                (PartLog::Waits(_), Some(_)) => {}
                (PartLog::Lacks, _) | (_, None) => self.audit.chunks().lacks(chunks),
            }
        }
        self.audit.chunks().expire(Instant::now());
        self.audit.note_outcomes();
        if self.left == 0 && !self.disks.is_empty() && self.audit.chunks().is_empty() {
            self.audit.disk_round_ended();
            self.begin_round();
        }
        (!unlogged.is_empty()).then_some(LOOK)
    }

    fn take_answers(&mut self) {
        for answer in self.audit.take_answers() {
            if self.audit.chunks().answered(answer) {
                self.rest = None;
                continue;
            }
            let last = self.rest.map_or(REST / 2, |(_, last)| last);
            let rest = (last * 2).min(LONGEST_REST);
            self.rest = Some((Instant::now() + rest, rest));
        }
    }

    /// Reads the chunks whose turn it is. Returns how many samples that makes.
    pub(super) fn burst(&mut self, epoch: &dyn Fn() -> Option<u64>) -> u32 {
        // What has to be tried again because of this burst waits for the next one: a write takes its time.
        let mut old = self.audit.chunks().count_again();
        for at in 0..BURST {
            let again = (old > 0).then(|| self.audit.chunks().next_again()).flatten();
            old = old.saturating_sub(1);
            if again.is_none() && (self.left == 0 || self.audit.chunks().is_behind()) {
                return at as u32;
            }
            let (chunks, tries) = again.unwrap_or_else(|| (self.turn(), 0));
            let began = Instant::now();
            let count = self.sample(chunks, tries, epoch);
            // The slower of both disks sets the pace, or the standby would leave chunks out.
            self.rate.charge(1, began.elapsed().max(self.audit.their_read()));
            match again {
                None if count == 0 => return at as u32,
                None => self.went_on(count.into()),
                Some(_) if count < chunks.count => {
                    let (first, rest) = (chunks.first + u64::from(count), chunks.count - count);
                    self.audit.chunks().put_back(ChunkRange { first, count: rest, ..chunks }, tries);
                    if count == 0 {
                        return at as u32;
                    }
                    old += 1;
                }
                Some(_) => {}
            }
        }
        BURST as u32
    }

    /// What has its turn: at most so many chunks.
    fn turn(&self) -> ChunkRange {
        let (disk, first) = self.at;
        let AuditDisk { index, bytes, .. } = &self.disks[disk];
        ChunkRange { disk: *index, first, count: (chunks(*bytes) - first).min(HOLE).min(self.left) as u32 }
    }

    fn went_on(&mut self, count: u64) {
        let (disk, first) = self.at;
        self.at = match first + count {
            next if next < chunks(self.disks[disk].bytes) => (disk, next),
            _ => ((disk + 1) % self.disks.len(), 0),
        };
        self.left = self.left.saturating_sub(count);
    }

    /// Reads the first of these chunks, or as many of them as are in a hole, and has them wait for a checkpoint that
    /// has all that was read. Returns how many; 0 if there is nothing to compare them with now.
    pub(super) fn sample(&mut self, wanted: ChunkRange, tries: u8, epoch: &dyn Fn() -> Option<u64>) -> u32 {
        let Some(disk) = self.disks.iter().find(|disk| disk.index == wanted.disk) else { return 0 };
        // Before the read: what is logged from now on goes on top of it.
        let Some(began) = epoch() else { return 0 };
        let Some(mut bytes) = self.audit.chunks().buffer() else { return 0 };
        let (count, buffer) = match read(disk, wanted, &mut bytes) {
            Ok((count, true)) => (count, Some(bytes)),
            Ok((count, false)) => {
                self.audit.chunks().give_back(Some(bytes));
                (count, None)
            }
            Err(error) => {
                // The guest may never ask for it.
                if !std::mem::replace(&mut self.complained, true) {
                    let (disk, chunk) = (wanted.disk, wanted.first);
                    tracing::warn!(disk, chunk, %error, "audit: a part of the image here cannot be read");
                }
                let mut waiting = self.audit.chunks();
                waiting.give_back(Some(bytes));
                waiting.leave_out(ChunkRange { count: 1, ..wanted });
                return 1;
            }
        };
        let sum = buffer.as_ref().map_or(0, |bytes| chunk_sum(wanted.first, bytes));
        let chunks = ChunkRange { count, ..wanted };
        // What was read is older than what the disk and the epoch say. The disk first: a write that it no longer has
        // in flight is in the log of the running epoch, or of one before.
        fence(Ordering::Acquire);
        let answer = (disk.part_log)(chunks.offset(), chunks.len(), u64::MAX);
        let whole = match (answer, epoch()) {
            (PartLog::Has, Some(running)) => Some(Whole::From(running)),
            (PartLog::Waits(last), Some(_)) => Some(Whole::After(last)),
            (PartLog::Lacks, _) | (_, None) => None,
        };
        let mut waiting = self.audit.chunks();
        if let Some(whole) = whole {
            let (next, read) = (began, Instant::now());
            let sample =
                ChunkSample { next, whole, chunks, bytes: buffer, sum, is_written: false, read, tries };
            waiting.offer(sample);
        } else {
            waiting.try_again(chunks, tries);
            waiting.give_back(buffer);
        }
        count
    }
}

/// Reads the first of these chunks, and says so; or says how many of them are in a hole.
fn read<S: Store>(disk: &AuditDisk<S>, wanted: ChunkRange, bytes: &mut Vec<u8>) -> io::Result<(u32, bool)> {
    let mut reader = ChunkReader::new(&disk.image, disk.bytes);
    let mut count = 0;
    while count < wanted.count && reader.is_hole(wanted.first + u64::from(count))? {
        count += 1;
    }
    if count > 0 {
        return Ok((count, false));
    }
    let (offset, len) = reader.range(wanted.first);
    bytes.truncate(len);
    disk.image.read(bytes, offset)?;
    Ok((1, true))
}
