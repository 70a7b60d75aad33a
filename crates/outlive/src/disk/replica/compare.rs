//! The standby's part of the audit of disks: chunks of its images are compared with the VM's as of a checkpoint.
//!
//! The disks' thread does its jobs in their order, so a comparison comes when the writes of its checkpoint are in the
//! journal and those of the next one are not. They may not be in the images yet: a chunk is what the image has, with
//! the writes on top of it that wait.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, DiskAudited};

use super::ReplicaDisk;
use crate::audit::{Budget, DiskRate, thread_time};
use crate::disk::apply::Applier;
use crate::disk::image::{ChunkReader, Store};
use crate::disk::{chunk_sum, overlay};

/// How far a comparison may be ahead of the rate at which disks are read: checkpoints come in bunches.
const AHEAD: Duration = Duration::from_millis(500);

/// What was compared so far.
pub(super) struct Comparing {
    rate: DiskRate,
    so_far: DiskAudited,
    /// What the primary was told.
    told: DiskAudited,
    /// Something of the checkpoint was left out.
    left_out: bool,
    chunk: Vec<u8>,
}

impl Comparing {
    pub(super) fn new() -> Self {
        let (so_far, told) = Default::default();
        Self { rate: DiskRate::start(), so_far, told, left_out: false, chunk: vec![0; DISK_CHUNK] }
    }

    /// Begins with the sums of a checkpoint. It counts as compared even if they are left out, so that the primary knows
    /// that they are.
    pub(super) fn begin(&mut self, checkpoint: u64) {
        self.left_out = false;
        self.so_far.checkpoint = checkpoint;
    }

    /// Compares chunks of a disk with the sum that they have at the checkpoint that came last, while `may_go_on`.
    /// Returns those that differ. A primary may want more than this host gives; the rest of the checkpoint's sums is
    /// left out then, so that the primary knows from their number which ones they are.
    ///
    /// # Errors
    /// The image cannot be read. The error says of which.
    pub(super) fn compare(
        &mut self,
        disk: &ReplicaDisk,
        applier: &Applier<impl Store>,
        range: &AuditRange,
        budget: &Arc<Budget>,
        may_go_on: impl Fn() -> bool,
    ) -> io::Result<Option<ChunkRange>> {
        let began = thread_time();
        let may_go_on = || may_go_on() && !budget.is_used_up();
        let differs = self.differs(disk, applier, range, may_go_on);
        let spent = thread_time().saturating_sub(began);
        budget.spend(spent);
        self.so_far.spent_ns += spent.as_nanos() as u64;
        if let Ok(Some(chunks)) = differs {
            self.so_far.differs = Some(chunks);
        }
        differs
    }

    fn differs(
        &mut self,
        disk: &ReplicaDisk,
        applier: &Applier<impl Store>,
        range: &AuditRange,
        may_go_on: impl Fn() -> bool,
    ) -> io::Result<Option<ChunkRange>> {
        let ChunkRange { disk: index, first, count } = range.chunks;
        let mut reader = ChunkReader::new(&disk.file, disk.bytes);
        for number in first..first + u64::from(count) {
            self.left_out |= self.rate.wait() > AHEAD || !may_go_on();
            if self.left_out {
                break;
            }
            let (offset, len) = reader.range(number);
            let chunk = &mut self.chunk[..len];
            if reader.is_hole(number)? {
                chunk.fill(0);
            } else {
                let began = Instant::now();
                let read = disk.file.read(chunk, offset);
                let took = began.elapsed();
                self.rate.charge(1, took);
                self.so_far.read_ns += took.as_nanos() as u64;
                read?;
            }
            for records in applier.waiting() {
                overlay(chunk, index, offset, records.iter());
            }
            self.so_far.chunks += 1;
            // Several have a sum of zeroes.
            if chunk_sum(number, chunk) != range.sum {
                return Ok(Some(ChunkRange { first: number, count: 1, ..range.chunks }));
            }
        }
        Ok(None)
    }

    /// What to tell the primary, which waits for an answer to each checkpoint's sums, and how many chunks it has not
    /// heard of.
    pub(super) fn due(&mut self) -> Option<(DiskAudited, u64)> {
        let told = std::mem::replace(&mut self.told, self.so_far);
        (told != self.so_far).then(|| (self.so_far, self.so_far.chunks - told.chunks))
    }
}
