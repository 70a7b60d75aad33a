//! The auditor's second half: it reads the primary's disks while the guest writes to them.
//!
//! A chunk has been read within one epoch if the same epoch ran before and after. If no write to it is in flight
//! after the read, all writes that can be in what was read are in the logs of this epoch and those before. So what
//! the disk has at the checkpoint is what was read, with the writes of this epoch's log on top of it; see
//! `docs/audit.md`.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use outlive_epoch::ChunkRange;

use super::chunks::ChunkSample;
use super::{Audit, DiskRate};
use crate::disk::{ChunkReader, Store, chunk_sum, chunks};

/// How many chunks are read without a rest: what a mechanical disk reads in the time of a seek.
const BURST: usize = 4;
/// How many chunks in a hole are one sample. A standby whose image has no holes must read as many.
const HOLE: u64 = 16;

/// A disk to compare: one that each host has an image of, and that the guest writes to.
pub(crate) struct AuditDisk<S = File> {
    /// Its position among the VM's disks.
    pub(crate) index: u16,
    /// Its length.
    pub(crate) bytes: u64,
    /// Its image.
    pub(crate) image: S,
    /// Whether a part of it, which was read before, has nothing but what the write log has:
    /// [`BlockDevice::is_steady`](outlive_machine::BlockDevice::is_steady).
    pub(crate) is_steady: Box<dyn Fn(u64, u64) -> bool + Send>,
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
    /// Whether an image could not be read in this round.
    complained: bool,
}

impl<S: Store> DiskAuditor<S> {
    /// Begins at any chunk; `seed` says at which.
    pub(super) fn new(audit: Arc<Audit>, disks: Vec<AuditDisk<S>>, seed: u64) -> Self {
        let at = (0, disks.first().map_or(0, |disk| seed % chunks(disk.bytes).max(1)));
        let mut auditor = Self { audit, disks, rate: DiskRate::start(), at, left: 0, complained: false };
        auditor.begin_round();
        auditor
    }

    /// Counts a round from here on.
    pub(super) fn begin_round(&mut self) {
        self.left = self.disks.iter().map(|disk| chunks(disk.bytes)).sum();
        self.complained = false;
    }

    /// Whether there is something to read now, and the disks have had their rest.
    pub(super) fn is_due(&self) -> bool {
        self.left > 0 && self.rate.wait().is_zero() && self.audit.chunks().room() >= BURST
    }

    /// How long the disks rest from now on.
    #[cfg(test)]
    pub(super) fn rests(&self) -> std::time::Duration {
        self.rate.wait()
    }

    /// Reads the chunks whose turn it is. Returns how many samples that makes.
    pub(super) fn burst(&mut self, epoch: &dyn Fn() -> Option<u64>) -> u32 {
        // What has to be tried again because of this burst waits for the next one: a write takes its time.
        let mut old = self.audit.chunks().count_again();
        for at in 0..BURST {
            let again = (old > 0).then(|| self.audit.chunks().next_again()).flatten();
            old = old.saturating_sub(1);
            let (chunks, tries) = again.unwrap_or_else(|| (self.turn(), 0));
            let began = Instant::now();
            let count = self.sample(chunks, tries, epoch);
            // The slower of both disks sets the pace, or the standby would leave chunks out.
            self.rate.charge(1, began.elapsed().max(self.audit.their_read()));
            match again {
                _ if count == 0 => return at as u32,
                None => self.went_on(count.into()),
                Some(_) if count < chunks.count => {
                    let (first, count) = (chunks.first + u64::from(count), chunks.count - count);
                    self.audit.chunks().put_back(ChunkRange { first, count, ..chunks }, tries);
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
        if self.left == 0 {
            self.audit.disk_round_ended();
            self.begin_round();
        }
    }

    /// Reads the first of these chunks, or as many of them as are in a hole, and has them wait for the checkpoint if
    /// what was read is of one epoch. Returns how many; 0 if there is nothing to compare them with now.
    pub(super) fn sample(&mut self, wanted: ChunkRange, tries: u8, epoch: &dyn Fn() -> Option<u64>) -> u32 {
        let Some(disk) = self.disks.iter().find(|disk| disk.index == wanted.disk) else { return 0 };
        let Some(running) = epoch() else { return 0 };
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
                self.audit.chunks().give_back(Some(bytes));
                return 1;
            }
        };
        let sum = buffer.as_ref().map_or(0, |bytes| chunk_sum(wanted.first, bytes));
        let chunks = ChunkRange { count, ..wanted };
        // What was read is older than what the disk and the epoch say. The disk first: a write that it no longer has
        // in flight is in the log of the running epoch, or of one before.
        fence(Ordering::Acquire);
        let is_of_it = (disk.is_steady)(chunks.offset(), chunks.len()) && epoch() == Some(running);
        let mut waiting = self.audit.chunks();
        if is_of_it {
            waiting.offer(ChunkSample { epoch: running, chunks, bytes: buffer, sum, tries });
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
