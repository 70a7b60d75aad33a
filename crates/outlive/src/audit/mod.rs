//! The audit: while the VM runs, some pages of both hosts are compared all the time.
//!
//! A page may be compared only as of one checkpoint. The primary's auditor (`auditor.rs`) reads pages while the
//! guest runs, and notes with each sum the epoch in which it has read the page, from the first byte to the last.
//! A page that the guest has not written in that epoch is, at the checkpoint that ends it, what was read; a page
//! that it has written is in that checkpoint, whole. So the sender, which has both, sends sums of the checkpoint
//! ([`Picked`]), and nothing of all this happens in the pause. The standby compares when it has applied that
//! checkpoint, before the next (`standby/audit.rs`).
//!
//! ```text
//! primary   auditor ──(epoch, page, sum)──► Audit ──► sender: what the checkpoint has itself is hashed there
//! standby   applier: applied N, compares, N+1 ──Audited──► primary: how far, how long it took, what differs
//! ```
//!
//! Disks have their turn in the same thread (`disks.rs`, `chunks.rs`), and a rule of their own, because a write to a
//! disk takes a while: see there. The standby's part is `disk/replica/compare.rs`.

mod auditor;
mod chunks;
#[cfg(test)]
mod disk_game;
#[cfg(test)]
mod disk_tests;
mod disks;
mod pace;
mod picked;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use outlive_epoch::{AuditRange, Audited, ChunkRange, DISK_CHUNK, DiskAudited, RecordBuf};
use outlive_machine::PAGE_SIZE;

pub(crate) use auditor::{AuditThread, Source};
pub(crate) use chunks::MOST_CHUNKS;
use chunks::{Answer, WaitingChunks};
pub(crate) use disks::AuditDisk;
pub(crate) use pace::{AuditShare, Budget, DiskRate, Pace, thread_time};
pub(crate) use picked::Picked;

/// Bytes of a disk's chunks, in words for an operator.
pub(crate) struct Place(pub(crate) ChunkRange);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ChunkRange { disk, .. } = self.0;
        write!(f, "disk {disk} in the {} KiB from byte {:#x} on", self.0.len() >> 10, self.0.offset())
    }
}

/// How many pages one checkpoint is compared by at most: the standby compares before it commits the next.
pub(crate) const MOST: usize = 1024;
const _: () = assert!(MOST <= outlive_epoch::MAX_AUDIT_SPANS);

/// As long as the comparison of a page on the other host is believed to take at most; far longer than on any host.
const LONGEST_COMPARISON_NS: u64 = 1_000_000;
/// The same of a chunk of a disk.
const LONGEST_COMPARISON_OF_CHUNK_NS: u64 = 16 * LONGEST_COMPARISON_NS;
/// As long as reading a chunk there is believed to take at most.
const LONGEST_READ_NS: u64 = 1_000_000_000;

/// A page, aligned so that it is read fast.
#[repr(C, align(64))]
pub(crate) struct Page(pub(crate) [u8; PAGE_SIZE]);

impl Page {
    /// One on the heap.
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self([0; PAGE_SIZE]))
    }
}

/// What was read of a page in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// The epoch in which the page was read, from the first byte to the last.
    pub(crate) epoch: u64,
    /// The page.
    pub(crate) gfn: u64,
    /// Its hash.
    pub(crate) sum: u64,
}

/// How far an audit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AuditProgress {
    /// Pages that the standby has compared, since this process became the active side.
    pub(crate) pages: u64,
    /// How often all pages have had their turn.
    pub(crate) rounds: u64,
    /// When the last of those rounds ended.
    pub(crate) round_ended: Option<SystemTime>,
    /// Bytes of disks that the standby has compared, in whole chunks.
    pub(crate) disk_bytes: u64,
    /// How often all of the disks have had their turn.
    pub(crate) disk_rounds: u64,
    /// When the last of those rounds ended.
    pub(crate) disk_round_ended: Option<SystemTime>,
    /// Bytes of disks that were left out of a round, in whole chunks: they could not be compared, however often they
    /// were tried.
    pub(crate) disk_left_out: u64,
    /// Those of the last whole round.
    pub(crate) disk_round_left_out: u64,
    /// How often a copy was found to differ.
    pub(crate) differences: u64,
}

/// What auditor and senders share; see the module.
#[derive(Default)]
pub(crate) struct Audit {
    waiting: Mutex<Waiting>,
    /// Links that take samples.
    takers: AtomicUsize,
    /// How long the standby needs for a page, in nanoseconds.
    theirs_ns: AtomicU64,
    /// Chunks of disks that were read.
    chunks: Mutex<WaitingChunks>,
    /// How long the standby needs for a chunk, in nanoseconds.
    theirs_of_chunk_ns: AtomicU64,
    /// How long the standby's disk needs to read one, in nanoseconds.
    their_read_ns: AtomicU64,
    progress: Mutex<Counted>,
}

/// How far the audit of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskProgress {
    /// Its position among the VM's disks.
    pub(crate) index: u16,
    /// Its length.
    pub(crate) bytes: u64,
    /// Bytes that the standby has compared, in whole chunks.
    pub(crate) compared: u64,
    /// Bytes that were left out of a round.
    pub(crate) left_out: u64,
    /// When the standby last compared something of it.
    pub(crate) compared_at: Option<SystemTime>,
    /// Since when it could have.
    pub(crate) since: Option<SystemTime>,
}

/// What was compared, and the standby's last words.
#[derive(Default)]
struct Counted {
    progress: AuditProgress,
    disks: Vec<DiskProgress>,
    /// What was left out before this round.
    left_out_before: u64,
    pages: Audited,
    chunks: DiskAudited,
    /// Answers that the auditor has not taken: of which checkpoint, and how many chunks.
    answers: Vec<Answer>,
}

/// How many answers may wait for the auditor; later ones count with the next.
const MOST_ANSWERS: usize = 256;

/// Samples that wait for the checkpoint of their epoch.
#[derive(Default)]
struct Waiting {
    samples: Vec<Sample>,
    /// Pages whose samples came too late.
    missed: Vec<u64>,
}

/// While a link has this, samples are taken for it.
pub(crate) struct Taking(Arc<Audit>);

impl Taking {
    /// Takes from now on, and nothing that waits from before.
    pub(crate) fn start(audit: Arc<Audit>) -> Self {
        audit.waiting().samples.clear();
        audit.chunks().forget();
        audit.takers.fetch_add(1, Ordering::Relaxed);
        audit.link_begins();
        Self(audit)
    }

    /// Takes the sums for the checkpoint that ends this epoch. Samples of earlier epochs are of no use any more.
    pub(crate) fn take(&self, epoch: u64, picked: &mut Picked) {
        let mut waiting = self.0.waiting();
        let Waiting { samples, missed } = &mut *waiting;
        let of_it = samples.iter().filter(|sample| sample.epoch == epoch);
        picked.begin(of_it.map(|sample| (sample.gfn, sample.sum)));
        let late = samples.iter().filter(|sample| sample.epoch < epoch);
        missed.extend(late.take(MOST.saturating_sub(missed.len())).map(|sample| sample.gfn));
        samples.retain(|sample| sample.epoch > epoch);
    }

    /// The same for disks. The checkpoint has these writes.
    pub(crate) fn take_chunks(&self, epoch: u64, writes: &RecordBuf, ranges: &mut Vec<AuditRange>) {
        self.0.chunks().take(epoch, writes, ranges);
    }

    /// A base begins: whatever waits is of another copy.
    pub(crate) fn forget(&self) {
        self.0.waiting().samples.clear();
        self.0.chunks().forget();
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        if self.0.takers.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.link_ended();
        }
    }
}

impl Audit {
    /// Whether a link takes samples.
    fn is_wanted(&self) -> bool {
        self.takers.load(Ordering::Relaxed) > 0
    }

    /// How many more samples may wait.
    fn room(&self) -> usize {
        MOST.saturating_sub(self.waiting().samples.len())
    }

    /// Has samples wait for their checkpoints.
    fn offer(&self, samples: &mut Vec<Sample>) {
        self.waiting().samples.append(samples);
    }

    /// Takes a page whose sample came too late.
    fn missed(&self) -> Option<u64> {
        self.waiting().missed.pop()
    }

    /// How long the standby needs for a page.
    fn theirs(&self) -> Duration {
        Duration::from_nanos(self.theirs_ns.load(Ordering::Relaxed))
    }

    /// How long the standby needs for a chunk.
    fn theirs_of_chunk(&self) -> Duration {
        Duration::from_nanos(self.theirs_of_chunk_ns.load(Ordering::Relaxed))
    }

    /// How long the standby's disk needs to read one.
    fn their_read(&self) -> Duration {
        Duration::from_nanos(self.their_read_ns.load(Ordering::Relaxed))
    }

    /// These disks are compared.
    fn count_disks(&self, disks: impl Iterator<Item = (u16, u64)> + Clone) {
        self.chunks().count(disks.clone().map(|(index, _)| index));
        let mut counted = self.counted();
        // A link that has begun already has found none of them.
        let since = self.is_wanted().then(SystemTime::now);
        let zero = |(index, bytes)| DiskProgress {
            index,
            bytes,
            compared: 0,
            left_out: 0,
            compared_at: None,
            since,
        };
        counted.disks = disks.map(zero).collect();
    }

    /// A link begins, whose standby counts anew.
    fn link_begins(&self) {
        let Counted { pages, chunks, answers, disks, .. } = &mut *self.counted();
        (*pages, *chunks) = Default::default();
        answers.clear();
        disks.iter_mut().for_each(|disk| disk.since = Some(SystemTime::now()));
    }

    /// The last link has ended: nobody compares anything.
    fn link_ended(&self) {
        self.counted().disks.iter_mut().for_each(|disk| disk.since = None);
    }

    /// A round over the disks begins.
    fn disk_round_began(&self) {
        let counted = &mut *self.counted();
        counted.left_out_before = counted.progress.disk_left_out;
    }

    /// All of the disks have had their turn.
    fn disk_round_ended(&self) {
        let Counted { progress, left_out_before, .. } = &mut *self.counted();
        progress.disk_rounds += 1;
        progress.disk_round_ended = Some(SystemTime::now());
        progress.disk_round_left_out = progress.disk_left_out - *left_out_before;
    }

    /// Counts what has become of chunks.
    fn note_outcomes(&self) {
        let (mut waiting, mut counted) = (self.chunks(), self.counted());
        let Counted { progress, disks, .. } = &mut *counted;
        for ((_, outcome), disk) in waiting.take_outcomes().zip(disks) {
            let [compared, left_out] =
                [outcome.compared, outcome.left_out].map(|chunks| chunks * DISK_CHUNK as u64);
            disk.compared += compared;
            disk.left_out += left_out;
            progress.disk_left_out += left_out;
            if compared > 0 {
                disk.compared_at = Some(SystemTime::now());
            }
        }
    }

    /// The standby's answers since the last call.
    fn take_answers(&self) -> Vec<Answer> {
        std::mem::take(&mut self.counted().answers)
    }

    /// As if so many chunks of a disk had been compared, and left out, and the last of it so long ago.
    #[cfg(test)]
    pub(crate) fn pretend_disk(&self, index: u16, bytes: u64, compared: u64, left_out: u64, ago: Duration) {
        self.count_disks([(index, bytes)].into_iter());
        self.link_begins();
        self.chunks().pretend(compared, left_out);
        self.note_outcomes();
        let disk = &mut self.counted().disks[0];
        (disk.since, disk.compared_at) = (Some(SystemTime::now() - ago), None);
    }

    /// How far it is with each disk.
    pub(crate) fn disks(&self) -> Vec<DiskProgress> {
        self.counted().disks.clone()
    }

    /// All pages have had their turn.
    fn round_ended(&self) {
        let progress = &mut self.counted().progress;
        progress.rounds += 1;
        progress.round_ended = Some(SystemTime::now());
    }

    /// Takes the standby's word. One that lies about its time must not keep this host from auditing for ever.
    pub(crate) fn heard(&self, word: &Audited) {
        let Counted { progress, pages: before, .. } = &mut *self.counted();
        // A new link counts anew.
        let earlier = if word.pages >= before.pages { *before } else { Audited::default() };
        let pages = word.pages - earlier.pages;
        // What a peer counts may be nonsense.
        progress.pages = progress.pages.saturating_add(pages);
        progress.differences += u64::from(word.differs.is_some());
        *before = *word;
        if let Some(each) = word.spent_ns.saturating_sub(earlier.spent_ns).checked_div(pages) {
            self.theirs_ns.store(each.min(LONGEST_COMPARISON_NS), Ordering::Relaxed);
        }
    }

    /// Takes the standby's word about disks. As above, it may be nonsense.
    pub(crate) fn heard_of_disks(&self, word: &DiskAudited) {
        let Counted { progress, chunks: before, answers, .. } = &mut *self.counted();
        let earlier = if word.chunks >= before.chunks { *before } else { DiskAudited::default() };
        let chunks = word.chunks - earlier.chunks;
        let is_full = answers.len() >= MOST_ANSWERS;
        let (checkpoint, compared) = (word.checkpoint, chunks);
        let overtaken = chunks == 0 && word.read_ns > earlier.read_ns;
        match answers.last_mut() {
            Some(last) if is_full => {
                let compared = last.compared.saturating_add(compared);
                *last = Answer { checkpoint, compared, overtaken: false };
            }
            _ => answers.push(Answer { checkpoint, compared, overtaken }),
        }
        progress.disk_bytes = progress.disk_bytes.saturating_add(chunks.saturating_mul(DISK_CHUNK as u64));
        progress.differences += u64::from(word.differs.is_some());
        *before = *word;
        let each = |now: u64, before: u64| now.saturating_sub(before).checked_div(chunks);
        if let Some(each) = each(word.spent_ns, earlier.spent_ns) {
            self.theirs_of_chunk_ns.store(each.min(LONGEST_COMPARISON_OF_CHUNK_NS), Ordering::Relaxed);
        }
        if let Some(each) = each(word.read_ns, earlier.read_ns) {
            self.their_read_ns.store(each.min(LONGEST_READ_NS), Ordering::Relaxed);
        }
    }

    /// How far it is.
    pub(crate) fn progress(&self) -> AuditProgress {
        self.counted().progress
    }

    fn chunks(&self) -> MutexGuard<'_, WaitingChunks> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
