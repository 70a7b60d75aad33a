//! A standby's disks: one thread compares, writes, journals and applies, so that neither the link nor the
//! VM's memory ever waits for a disk that is a little slow. A second one reads for the audit, and the first one waits for
//! no read.
//!
//! Jobs are done in the order in which they came. The queue is bounded: during base synchronisation by the
//! chunks that were asked for, afterwards by [`QUEUE_BYTES`](queue::QUEUE_BYTES) and
//! [`QUEUE_TIME`](queue::QUEUE_TIME). Beyond that the applier waits here. It then acknowledges no further
//! checkpoint, and so slows the guest down; the reader keeps reading the link meanwhile.

#[cfg(test)]
mod audit_game;
mod claims;
mod compare;
mod error;
mod queue;
mod reading;
mod worker;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use outlive_epoch::{AuditRange, ChunkRange, DiskAudited, DiskSums, DiskWant, RecordBuf, UncheckedRecords};
use outlive_machine::DiskHash;

use super::book::Book;
use super::image::{ImageReader, Store, Sum, chunks};
use super::provenance::{Accepted, Provenance};
use super::shared::Note;
use super::sidecar::CopyEnd;
use super::sidecars::{Image, Sidecars, SidecarsError};
use crate::audit::Budget;
use compare::Audits;
pub(crate) use error::{ReplicaEndError, ReplicaError, ReplicaStartError, UnfitError};
use queue::{Job, Queue};
pub(super) use reading::Source;
use worker::Worker;

/// Bytes of the base synchronisation that may wait: far more than a primary of this release ever sends
/// without an answer.
const BASE_BYTES: usize = 64 << 20;
/// A disk that has finished nothing in this time counts as broken. Linux gives a disk as long for one
/// command.
pub(crate) const STUCK: Duration = Duration::from_secs(30);

/// One image of the standby.
pub(crate) struct ReplicaDisk {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// The image, opened for writing unless the guest only reads it.
    pub(crate) file: File,
    /// Bytes of the disk.
    pub(crate) bytes: u64,
    /// The guest can only read the disk, so it is compared and never written.
    pub(crate) read_only: bool,
    /// What an operator has accepted so that it may be overwritten.
    pub(crate) accepted: Option<Accepted>,
    /// Its file system need not have room for all of it.
    pub(crate) thin: bool,
    /// What is known of its contents.
    pub(crate) book: Book,
}

/// What the disks report.
#[derive(Debug)]
pub(crate) enum DiskEvent {
    /// The answer to sums.
    Want(DiskWant),
    /// The disks were compared with the VM's.
    Checked {
        /// The checkpoint of the comparison.
        checkpoint: u64,
        /// How they differ, if they do; `Failed` follows.
        difference: Option<String>,
    },
    /// How far the audit is, and how many chunks were compared since the last word.
    Audited(DiskAudited, u64),
    /// The audit has found chunks of an image that are not the VM's. The disks are of no further use.
    Differs {
        /// The checkpoint of the comparison.
        checkpoint: u64,
        /// Where.
        chunks: ChunkRange,
        /// In words.
        why: Arc<ReplicaError>,
    },
    /// The images are at the last commit, durably.
    Settled {
        /// That commit.
        checkpoint: u64,
    },
    /// The sidecars say, durably, that the copy was given up; or why they do not.
    Released(Result<(), SidecarsError>),
    /// The disks are of no further use.
    Failed(Arc<ReplicaError>),
}

/// The standby's disks. Dropping it brings them to the last commit, durably, and ends the thread.
pub(crate) struct Replica {
    queue: Arc<Queue>,
    /// Bytes by disk, and whether it is written; `None` for a shared one.
    disks: Vec<Option<(u64, bool)>>,
    sidecars: Arc<Sidecars>,
    thread: Option<JoinHandle<()>>,
}

impl Replica {
    /// The same without shared disks.
    #[cfg(test)]
    pub(crate) fn start(
        disks: Vec<Option<ReplicaDisk>>,
        provenance: Provenance,
        generation: u64,
        tell: impl Fn(DiskEvent) + Send + 'static,
    ) -> Result<Self, ReplicaStartError> {
        Self::with_shared(disks, Vec::new(), provenance, generation, tell)
    }

    /// Claims what the disks will need from their file systems and starts the thread. `disks` has `None` for
    /// a disk that both hosts share, and `shared` the paths of those.
    ///
    /// # Errors
    /// See [`ReplicaStartError`].
    pub(crate) fn with_shared(
        disks: Vec<Option<ReplicaDisk>>,
        shared: Vec<PathBuf>,
        provenance: Provenance,
        generation: u64,
        tell: impl Fn(DiskEvent) + Send + 'static,
    ) -> Result<Self, ReplicaStartError> {
        let sources =
            disks.iter().map(|disk| disk.as_ref().map(|it| Source::of(&it.file, it.bytes)).transpose());
        let sources = sources.collect::<Result<_, _>>().map_err(ReplicaStartError::NoThread)?;
        Self::begin(disks, shared, (provenance, generation), sources, tell)
    }

    /// The same, and `sources` is what the audit reads of the images.
    pub(super) fn begin(
        disks: Vec<Option<ReplicaDisk>>,
        shared: Vec<PathBuf>,
        (provenance, generation): (Provenance, u64),
        sources: Vec<Option<Source<impl Store + Sync + 'static>>>,
        tell: impl Fn(DiskEvent) + Send + 'static,
    ) -> Result<Self, ReplicaStartError> {
        let claimed = claims::claim(&disks)?;
        // Not before: a standby without room asks again every few seconds, and overwrites nothing.
        for ReplicaDisk { path, accepted, .. } in disks.iter().flatten() {
            if let Some(Accepted { about, .. }) = accepted {
                tracing::warn!(image = %path.display(), "OVERWRITTEN as asked for: {about}");
                // It is no shared disk any more.
                Note::remove(path)
                    .map_err(|source| ReplicaStartError::Note { image: path.clone(), source })?;
            }
        }
        let no_thread = ReplicaStartError::NoThread;
        let queue = Arc::new(Queue::default());
        let known = disks.iter().map(|disk| disk.as_ref().map(|d| (d.bytes, !d.read_only))).collect();
        let sizes = disks.iter().map(|disk| disk.as_ref().map_or(0, |disk| disk.bytes)).collect();
        let written = disks.iter().enumerate().filter_map(|(index, disk)| {
            let disk = disk.as_ref().filter(|disk| !disk.read_only)?;
            let (path, accepted) = (disk.path.clone(), disk.accepted.clone());
            Some(Image { disk: index as u16, path, accepted })
        });
        let vm = provenance.vm;
        let sidecars = Sidecars::with_shared(written.collect(), shared, provenance);
        let sidecars = Arc::new(sidecars.map_err(no_thread)?);
        let (orders, ordered) = channel();
        let answers = queue.clone();
        // Nobody ever waits for its end: a read may hang. It ends when the other one has ended.
        outlive_machine::spawn("disk-audit", move || reading::run(&sources, &ordered, &answers))
            .map_err(no_thread)?;
        let (audits, about) = (Audits::new(orders, sizes), (vm, generation));
        let worker = Worker::new(queue.clone(), disks, about, sidecars.clone(), claimed, audits, tell);
        let thread = outlive_machine::spawn("disks", move || {
            worker.run();
        });
        Ok(Self { queue, disks: known, sidecars, thread: Some(thread.map_err(no_thread)?) })
    }

    /// Bytes of each disk that is replicated; 0 for the others.
    pub(crate) fn sizes(&self) -> Vec<u64> {
        self.disks
            .iter()
            .map(|disk| disk.filter(|(_, written)| *written).map_or(0, |(bytes, _)| bytes))
            .collect()
    }

    /// Takes sums of the base synchronisation.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn sums(&self, window: &DiskSums<'_>) -> Result<(), UnfitError> {
        let DiskSums { disk, first, count, sums } = *window;
        let known = self.disks.get(usize::from(disk)).copied().flatten();
        let (bytes, _) = known.ok_or(UnfitError::SumsOfNone(disk))?;
        let has = chunks(bytes);
        if first + u64::from(count) > has {
            return Err(UnfitError::SumsBeyond { disk, first, count, has });
        }
        self.push_base(Job::Sums { disk, first, count, sums: sums.map(<[Sum]>::to_vec) })
    }

    /// Takes chunks of the base synchronisation.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn blocks(&self, blocks: UncheckedRecords<'_>) -> Result<(), UnfitError> {
        let mut records = self.queue.buffer();
        records.empty_for(blocks.len()).map_err(|_| UnfitError::NoMemory)?;
        records.check_and_append(blocks, &self.sizes())?;
        if records.has_flush() {
            return Err(UnfitError::Flush);
        }
        let bytes = records.iter().map(|block| block.len()).sum();
        let wanted =
            self.queue.wanted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |w| w.checked_sub(bytes));
        wanted.map_err(|_| UnfitError::NotWanted)?;
        self.push_base(Job::Blocks(records))
    }

    fn push_base(&self, job: Job) -> Result<(), UnfitError> {
        let waiting = self.queue.lock();
        if waiting.bytes + job.bytes() > BASE_BYTES {
            return Err(UnfitError::TooMuch);
        }
        self.queue.push(waiting, job);
        Ok(())
    }

    /// An empty buffer, to be exchanged for the writes of a checkpoint.
    pub(crate) fn buffer(&self) -> RecordBuf {
        self.queue.buffer()
    }

    /// Takes the writes of a committed checkpoint; they are on their way into the images when this returns.
    /// Waits while too many bytes are under way, or one write has been for too long.
    pub(crate) fn commit(&self, number: u64, base: bool, records: RecordBuf) {
        let replicated = self.disks.iter().flatten().any(|(_, written)| *written);
        if !replicated || records.is_empty() && !base {
            return self.queue.give_back(records);
        }
        let mut waiting = self.queue.lock();
        while waiting.is_full(records.work()) && waiting.failed.is_none() {
            waiting.holds_back = true;
            waiting = self.queue.room.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        waiting.holds_back = false;
        self.queue.push(waiting, Job::Commit { number, base, records });
    }

    /// Whether the disks have finished nothing for [`STUCK`], or have not answered a read of the audit for so long.
    pub(crate) fn is_stuck(&self) -> bool {
        self.hangs() || self.queue.reading_for() >= STUCK
    }

    /// Whether the thread of the disks has. Nothing but that must keep anybody from ending a copy.
    fn hangs(&self) -> bool {
        self.queue.working_for() >= STUCK
    }

    /// Whether these can be hashes of the disks.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn check_hashes(&self, hashes: &[DiskHash]) -> Result<(), UnfitError> {
        let sizes = self.sizes();
        match hashes.iter().find(|it| sizes.get(usize::from(it.disk)).is_none_or(|size| *size == 0)) {
            Some(it) => Err(UnfitError::HashOfNone(it.disk)),
            None => Ok(()),
        }
    }

    /// Whether a commit waits, because too much is under way to the disks.
    pub(crate) fn holds_back(&self) -> bool {
        self.queue.lock().holds_back
    }

    /// For how long the disks have not finished what they are at.
    pub(crate) fn working_for(&self) -> Duration {
        self.queue.working_for()
    }

    /// Compares the disks, as of the newest committed checkpoint, with the VM's, whose hashes must have been
    /// [checked](Self::check_hashes). An event has the result.
    pub(crate) fn check(&self, number: u64, hashes: Vec<DiskHash>) {
        let waiting = self.queue.lock();
        if waiting.has_check() {
            tracing::debug!(checkpoint = number, "self-check: skipped, because the last one has not begun");
        } else {
            self.queue.push(waiting, Job::Check { number, hashes });
        }
    }

    /// Compares parts of the images, as of the newest committed checkpoint, with the VM's. Each must lie within its
    /// disk. Events have the result. What would be too much is left out.
    pub(crate) fn audit(&self, number: u64, ranges: &[AuditRange], budget: &Arc<Budget>) {
        if ranges.is_empty() || budget.is_off() {
            return;
        }
        let waiting = self.queue.lock();
        if !waiting.has_enough_to_audit() {
            self.queue.push(waiting, Job::Audit { number, ranges: ranges.to_vec(), budget: budget.clone() });
        }
    }

    /// Readers of all images, as soon as everything that was committed so far is in them. Commits go on, and the images
    /// with them. Nothing comes if the disks fail.
    pub(crate) fn images(&self) -> Receiver<Vec<Option<ImageReader>>> {
        let (done, images) = channel();
        self.queue.push(self.queue.lock(), Job::Images { done });
        images
    }

    /// Brings the images to the last commit, which is `checkpoint`, durably. Then [`DiskEvent::Settled`] says
    /// so, or [`DiskEvent::Failed`] why not.
    pub(crate) fn settle(&self, checkpoint: u64) {
        self.queue.push(self.queue.lock(), Job::Settle { checkpoint });
    }

    /// Brings the images to the last commit, durably, and has their sidecars say that the copy was given up.
    /// Then [`DiskEvent::Released`] says so, or why not. A takeover is still possible, a commit is not.
    pub(crate) fn release(&self) {
        self.queue.push(self.queue.lock(), Job::Release);
    }

    /// The primary may have heard that the copy was given up: what [`release`](Self::release) has written stays. Without
    /// this word it is taken back when the copy goes.
    pub(crate) fn promise(&self) {
        self.queue.promise();
    }

    /// Ends the standby in order: brings its images to the last commit, durably, and removes the journal. After
    /// [`release`](Self::release) the sidecars say what `end` says: `Released` only if the primary may have heard.
    /// Waits as long as that takes, unless a disk finishes nothing at all.
    ///
    /// # Errors
    /// What failed, now or before.
    pub(crate) fn leave(&self, end: Option<CopyEnd>) -> Result<(), ReplicaEndError> {
        let (done, answer) = channel();
        self.queue.push(self.queue.lock(), Job::Leave { end, done });
        loop {
            match answer.recv_timeout(Duration::from_millis(100)) {
                Ok(result) => return Ok(result?),
                Err(RecvTimeoutError::Timeout) if self.hangs() => return Err(ReplicaEndError::NoAnswer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(ReplicaEndError::NoThread),
            }
        }
    }

    /// Brings the images to the last commit, durably, and makes them the VM's disks in a new generation. The
    /// guest may write to them when this has returned, and not before: the journal must be empty by then, or
    /// replaying it after a loss of power would undo what the guest wrote.
    ///
    /// # Errors
    /// What failed, now or before. That a sidecar cannot be written is no failure.
    pub(crate) fn become_primary(&self, generation: u64) -> Result<(), ReplicaEndError> {
        let (done, answer) = channel();
        self.queue.push(self.queue.lock(), Job::BecomePrimary { generation, done });
        Ok(answer.recv().map_err(|_| ReplicaEndError::NoThread)??)
    }

    /// The keeper of the images' sidecars, which outlives this.
    pub(crate) fn sidecars(&self) -> Arc<Sidecars> {
        self.sidecars.clone()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.queue.push(self.queue.lock(), Job::Close);
        if let Some(thread) = self.thread.take()
            && !self.hangs()
        {
            thread.join().ok();
        }
    }
}
