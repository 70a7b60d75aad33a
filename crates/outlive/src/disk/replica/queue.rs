//! The queue of the disks' thread.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, RecordBuf};
use outlive_machine::DiskHash;

use super::error::ReplicaError;
use super::reading::Read;
use crate::audit::Budget;
use crate::disk::image::{ImageReader, Sum};
use crate::disk::sidecar::CopyEnd;

/// How many bytes may wait to be written: data, and ranges to be made zero.
pub(super) const QUEUE_BYTES: usize = 256 << 20;
/// How long a committed write may wait for the disks' thread, as far as is known of the disks. A takeover waits for
/// everything in this queue, so this bounds the wait on a slow disk, where [`QUEUE_BYTES`] may take minutes.
pub(super) const QUEUE_TIME: Duration = Duration::from_secs(2);
/// What the disks did before they were busy for so long counts half: a disk that becomes slow is known as one within its
/// first slow commit.
const LATELY: Duration = Duration::from_millis(20);
/// Before they were busy for so long nothing is known of them.
const MEASURED: Duration = Duration::from_millis(5);
/// To make something durable takes about as long for one block as for so many bytes: they are what a mechanical disk
/// writes in the time of a seek.
const SYNC_BYTES: usize = 1 << 20;
/// How many checkpoints may wait to be audited, or be under way; the next ones are not.
const MOST_AUDITS: usize = 16;
/// How many buffers of records are kept for reuse.
const SPARE_BUFFERS: usize = 64;
/// A buffer that has grown larger than this is not kept.
const SPARE_BYTES: usize = 1 << 20;

/// What the disks' thread answers to whoever waits for it.
pub(super) type Answer = Result<(), Arc<ReplicaError>>;

pub(super) enum Job {
    Sums {
        disk: u16,
        first: u64,
        count: u32,
        sums: Option<Vec<Sum>>,
    },
    Blocks(RecordBuf),
    Commit {
        number: u64,
        base: bool,
        records: RecordBuf,
    },
    Check {
        number: u64,
        hashes: Vec<DiskHash>,
    },
    Audit {
        number: u64,
        ranges: Vec<AuditRange>,
        budget: Arc<Budget>,
    },
    Read(Read),
    /// Everything in front of this is to be in the images; then they are shown.
    Images {
        done: Sender<Vec<Option<ImageReader>>>,
    },
    Settle {
        checkpoint: u64,
    },
    Release,
    Leave {
        end: Option<CopyEnd>,
        done: Sender<Answer>,
    },
    BecomePrimary {
        generation: u64,
        done: Sender<Answer>,
    },
    Close,
}

impl Job {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Sums { sums, .. } => 64 + sums.as_ref().map_or(0, |sums| sums.len() * size_of::<Sum>()),
            Self::Blocks(records) => 64 + records.len(),
            // A takeover waits for all of it, so ranges of zeroes count by what they may cost.
            Self::Commit { records, .. } => records.work().saturating_add(64),
            Self::Check { .. }
            | Self::Audit { .. }
            | Self::Images { .. }
            | Self::Read(_)
            | Self::Settle { .. }
            | Self::Release
            | Self::Leave { .. }
            | Self::BecomePrimary { .. }
            | Self::Close => 0,
        }
    }
}

/// How fast committed writes get onto the disks, lately.
#[derive(Default)]
struct Pace {
    bytes: usize,
    busy: Duration,
}

impl Pace {
    /// So many bytes took so long.
    fn add(&mut self, bytes: usize, busy: Duration) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.busy += busy;
        while self.busy > LATELY {
            (self.bytes, self.busy) = (self.bytes / 2, self.busy / 2);
        }
    }

    /// How long so many bytes will take, if work has gone on for `now` without an end.
    fn time_for(&self, bytes: usize, now: Duration) -> Duration {
        let busy = self.busy + now;
        if busy < MEASURED || self.bytes == 0 {
            return Duration::ZERO;
        }
        busy.mul_f64(bytes as f64 / self.bytes as f64)
    }
}

#[derive(Default)]
pub(super) struct Waiting {
    /// With the time at which they came.
    jobs: VecDeque<(Instant, Job)>,
    pub(super) bytes: usize,
    pub(super) failed: Option<Arc<ReplicaError>>,
    /// A commit waits for room.
    pub(super) holds_back: bool,
    /// Since when the thread has worked on a job that must not take long.
    working: Option<Instant>,
    /// Since when the thread compares all of the disks with the VM's. That takes as long as reading them, and it ends
    /// when something urgent waits.
    checking: Option<Instant>,
    spare: Vec<RecordBuf>,
    pace: Pace,
    /// The thread works for committed writes, of so many bytes.
    paced: Option<usize>,
    /// Bytes of commits since something was made durable last.
    unsynced: usize,
    /// How many comparisons of parts the thread has begun, or will begin when it has time.
    auditing: usize,
    /// Since when a part is being read, by another thread.
    reading: Option<Instant>,
    /// What that thread has read.
    read: Option<Read>,
}

impl Waiting {
    /// Whether this many more bytes must wait.
    pub(super) fn is_full(&self, bytes: usize) -> bool {
        let late = || self.jobs.front().is_some_and(|(came, _)| came.elapsed() >= QUEUE_TIME);
        let all = self.bytes + bytes;
        let much = || all > QUEUE_BYTES || self.pace.time_for(all, self.paced_for()) > QUEUE_TIME;
        self.bytes > 0 && much() || self.checking.is_none() && late()
    }

    /// For how long the thread has worked for committed writes without an end.
    fn paced_for(&self) -> Duration {
        self.working.filter(|_| self.paced.is_some()).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Whether as many sums of the audit wait as ever may.
    pub(super) fn has_enough_to_audit(&self) -> bool {
        let come = self.jobs.iter().filter(|(_, job)| matches!(job, Job::Audit { .. }));
        self.auditing + come.count() >= MOST_AUDITS
    }

    /// The thread works without a job from now on: it makes durable what was committed.
    fn begin_sync(&mut self, now: Instant) {
        let unsynced = std::mem::take(&mut self.unsynced);
        (self.working, self.paced) = (Some(now), Some(SYNC_BYTES.saturating_sub(unsynced)));
    }

    /// Whether a comparison waits.
    pub(super) fn has_check(&self) -> bool {
        self.jobs.iter().any(|(_, job)| matches!(job, Job::Check { .. }))
    }
}

#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    came: Condvar,
    pub(super) room: Condvar,
    /// Bytes of chunks that were asked for and have not arrived.
    pub(super) wanted: AtomicU64,
    /// Whether the primary may have heard that the copy was given up.
    promised: AtomicBool,
}

impl Queue {
    pub(super) fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something waits that must not wait for a comparison: the end of the link or of the standby, or
    /// so many writes that the link would have to wait.
    pub(super) fn is_urgent(&self) -> bool {
        let waiting = self.lock();
        let ends = |job: &Job| {
            !matches!(
                job,
                Job::Sums { .. }
                    | Job::Blocks(_)
                    | Job::Commit { .. }
                    | Job::Check { .. }
                    | Job::Audit { .. }
                    | Job::Images { .. }
                    | Job::Read(_)
            )
        };
        waiting.bytes > QUEUE_BYTES / 2 || waiting.jobs.iter().any(|(_, job)| ends(job))
    }

    pub(super) fn promise(&self) {
        self.promised.store(true, Ordering::Release);
    }

    pub(super) fn is_promised(&self) -> bool {
        self.promised.load(Ordering::Acquire)
    }

    /// For how long the thread has worked on a job that must not take long, or has not come for one.
    pub(super) fn working_for(&self) -> Duration {
        let waiting = self.lock();
        let next = waiting.jobs.front().map(|(pushed, _)| *pushed).filter(|_| waiting.checking.is_none());
        waiting.working.or(next).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// So many comparisons of parts are not over, and whether a part of them is being read.
    pub(super) fn audits(&self, count: usize, is_reading: bool) {
        let mut waiting = self.lock();
        waiting.auditing = count;
        waiting.reading = is_reading.then(|| waiting.reading.unwrap_or_else(Instant::now));
    }

    /// For how long a part of a disk is being read.
    pub(super) fn reading_for(&self) -> Duration {
        self.lock().reading.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// A part was read. It comes before every job, because what is written until then makes it worthless.
    pub(super) fn read(&self, read: Read) {
        self.lock().read = Some(read);
        self.came.notify_one();
    }

    /// An empty buffer for records, a used one if possible.
    pub(super) fn buffer(&self) -> RecordBuf {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Takes back a buffer of records.
    pub(super) fn give_back(&self, mut buffer: RecordBuf) {
        let mut waiting = self.lock();
        if buffer.memory() <= SPARE_BYTES && waiting.spare.len() < SPARE_BUFFERS {
            buffer.clear();
            waiting.spare.push(buffer);
        }
    }

    pub(super) fn push(&self, mut waiting: MutexGuard<'_, Waiting>, job: Job) {
        waiting.bytes += job.bytes();
        waiting.jobs.push_back((Instant::now(), job));
        self.came.notify_one();
    }

    /// The next job. `None` if none came until `soft`, or if `hard` is over, whatever waits.
    pub(super) fn pop(&self, soft: Option<Instant>, hard: Option<Instant>) -> Option<Job> {
        let mut waiting = self.lock();
        if let Some(since) = waiting.checking.take() {
            // That they waited for a comparison says nothing about how fast the disks write.
            let waited = |came: Instant| since.max(came).elapsed();
            waiting.jobs.iter_mut().for_each(|(came, _)| *came += waited(*came));
        }
        let took = waiting.paced_for();
        if let Some(bytes) = waiting.paced.take() {
            waiting.pace.add(bytes, took);
        }
        waiting.working = None;
        loop {
            let now = Instant::now();
            if let Some(read) = waiting.read.take() {
                (waiting.working, waiting.reading) = (Some(now), None);
                return Some(Job::Read(read));
            }
            if hard.is_some_and(|hard| now >= hard) {
                waiting.begin_sync(now);
                return None;
            }
            if let Some((_, job)) = waiting.jobs.pop_front() {
                waiting.bytes -= job.bytes();
                // A commit waits for no comparison as long as there is room.
                waiting.checking = matches!(job, Job::Check { .. }).then_some(now);
                waiting.working = waiting.checking.is_none().then_some(now);
                waiting.paced = matches!(job, Job::Commit { .. }).then(|| job.bytes());
                // Until the thread says how many there are.
                waiting.auditing += usize::from(matches!(job, Job::Audit { .. }));
                waiting.unsynced = waiting.unsynced.saturating_add(waiting.paced.unwrap_or(0));
                self.room.notify_all();
                return Some(job);
            }
            waiting = match soft.map(|soft| soft.saturating_duration_since(now)) {
                Some(Duration::ZERO) => {
                    waiting.begin_sync(now);
                    return None;
                }
                Some(time) => self.came.wait_timeout(waiting, time).unwrap_or_else(PoisonError::into_inner).0,
                None => self.came.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use outlive_epoch::{DiskOp, DiskRecord};

    use super::super::STUCK;
    use super::super::reading::Found;
    use super::*;

    fn records(bytes: usize) -> RecordBuf {
        let mut records = RecordBuf::default();
        records.empty_for(bytes).unwrap();
        records
    }

    fn waiting(since: Duration, bytes: usize) -> Waiting {
        let mut waiting = Waiting { bytes, ..Waiting::default() };
        let job = Job::Commit { number: 1, base: false, records: RecordBuf::default() };
        waiting.jobs.push_back((Instant::now().checked_sub(since).unwrap(), job));
        waiting
    }

    #[test]
    fn what_waits_is_bounded_in_bytes_and_in_time() {
        assert!(
            !Waiting::default().is_full(QUEUE_BYTES * 2),
            "what is too large alone must come all the same"
        );
        let now = Duration::ZERO;
        assert!(!waiting(now, QUEUE_BYTES / 2).is_full(QUEUE_BYTES / 2));
        assert!(waiting(now, QUEUE_BYTES / 2).is_full(QUEUE_BYTES / 2 + 1));
        assert!(!waiting(QUEUE_TIME / 2, 5).is_full(1));
        assert!(waiting(QUEUE_TIME, 5).is_full(1), "a slow disk");
        // A long comparison is no sign of a slow disk: it ends when enough waits.
        assert!(!Waiting { checking: Some(Instant::now()), ..waiting(QUEUE_TIME, 5) }.is_full(1));
    }

    /// A guest that writes much faster than a disk would have more waiting within those two seconds than the disk takes in
    /// a minute.
    #[test]
    fn what_waits_is_bounded_by_what_the_disks_have_done_lately() {
        let second = Duration::from_secs(1);
        let ago = |time| Instant::now().checked_sub(time).unwrap();
        let mut waiting = waiting(Duration::ZERO, 1_000_000);
        waiting.pace.add(20_000_000, second);
        assert!(!waiting.is_full(38_000_000) && waiting.is_full(40_000_000));
        // Work that does not end says so before it ends, but comparing has nothing to do with it.
        waiting.working = Some(ago(second));
        assert!(!waiting.is_full(38_000_000));
        waiting.paced = Some(0);
        assert!(waiting.is_full(20_000_000));
        (waiting.working, waiting.paced) = (None, None);
        // They are as fast as they were before.
        waiting.pace.add(500_000_000, second);
        assert!(!waiting.is_full(QUEUE_BYTES / 2));
        let alone = Waiting { bytes: 0, ..Waiting::default() };
        assert!(
            !Waiting { pace: waiting.pace, ..alone }.is_full(QUEUE_BYTES),
            "one alone must come all the same"
        );
    }

    #[test]
    fn the_pace_is_that_of_commits_and_of_what_they_leave_to_do() {
        let queue = Queue::default();
        let commit = || Job::Commit { number: 1, base: false, records: records(5) };
        queue.push(queue.lock(), commit());
        queue.pop(None, None);
        let known = |queue: &Queue| {
            let waiting = queue.lock();
            (waiting.pace.bytes, !waiting.pace.busy.is_zero())
        };
        assert_eq!(known(&queue), (0, false), "it is not done yet");
        assert!(queue.pop(Some(Instant::now()), None).is_none());
        assert_eq!(known(&queue), (commit().bytes(), true));
        let before = queue.lock().pace.busy;
        queue.push(queue.lock(), Job::Check { number: 1, hashes: Vec::new() });
        queue.pop(None, None);
        let after = queue.lock().pace.busy;
        assert!(after > before, "what was done without a job counts");
        assert_eq!(queue.lock().pace.bytes, SYNC_BYTES, "and with it, what it could have carried");
        queue.push(queue.lock(), Job::Release);
        queue.pop(None, None);
        assert_eq!(queue.lock().pace.busy, after, "a comparison does not");
    }

    /// A guest that discards its disk writes a few bytes for each gigabyte.
    #[test]
    fn ranges_of_zeroes_count_by_their_length() {
        let queue = Queue::default();
        let mut records = records(1000);
        assert!(records.push(DiskRecord { disk: 0, offset: 0, op: DiskOp::Zero(1 << 30) }));
        let work = records.work();
        assert!(!queue.lock().is_full(work), "one alone must come all the same");
        queue.push(queue.lock(), Job::Commit { number: 1, base: false, records });
        assert!(queue.lock().is_full(1));
        assert!(matches!(queue.pop(None, None), Some(Job::Commit { .. })));
        assert_eq!(queue.lock().bytes, 0);
    }

    #[test]
    fn a_thread_that_does_not_come_is_at_work_too() {
        let queue = Queue::default();
        assert_eq!(queue.working_for(), Duration::ZERO);
        *queue.lock() = waiting(QUEUE_TIME, 1 << 20);
        assert!(queue.working_for() >= QUEUE_TIME);
        queue.pop(None, None);
        assert!(queue.working_for() < QUEUE_TIME);
        *queue.lock() = Waiting { checking: Some(Instant::now()), ..waiting(QUEUE_TIME, 1 << 20) };
        assert_eq!(queue.working_for(), Duration::ZERO, "comparing takes its time");
    }

    #[test]
    fn the_time_of_a_job_is_known_but_not_that_of_a_comparison() {
        let queue = Queue::default();
        let is_working = || queue.lock().working.is_some();
        let records = records(5);
        queue.push(queue.lock(), Job::Commit { number: 1, base: false, records });
        queue.push(queue.lock(), Job::Check { number: 1, hashes: Vec::new() });
        assert!(!is_working());
        queue.pop(None, None);
        assert!(is_working());
        queue.pop(None, None);
        assert!(!is_working() && queue.lock().checking.is_some());
        // Work that is due without a job.
        assert!(queue.pop(Some(Instant::now()), None).is_none());
        assert!(is_working() && queue.lock().checking.is_none());
        assert!(queue.pop(Some(Instant::now()), Some(Instant::now())).is_none());
        assert!(is_working());
    }

    /// A comparison of whole disks takes long, and the guest must not notice.
    #[test]
    fn commits_wait_for_no_comparison_unless_there_is_no_room() {
        let ago = |time| Instant::now().checked_sub(time).unwrap();
        let check = || Job::Check { number: 1, hashes: Vec::new() };
        let queue = Queue::default();
        queue.push(queue.lock(), check());
        assert!(matches!(queue.pop(None, None), Some(Job::Check { .. })));
        // It takes long, and commits come meanwhile.
        let commit = |came| {
            let job = Job::Commit { number: 1, base: false, records: RecordBuf::default() };
            let mut waiting = queue.lock();
            waiting.bytes += job.bytes();
            waiting.jobs.push_back((came, job));
        };
        queue.lock().checking = Some(ago(QUEUE_TIME * 2));
        commit(ago(QUEUE_TIME * 3));
        commit(ago(QUEUE_TIME));
        assert!(!queue.lock().is_full(1) && queue.lock().is_full(QUEUE_BYTES));
        // When it is over they have not waited, but for what came before it.
        queue.pop(None, None);
        let waited = |queue: &Queue| queue.lock().jobs[0].0.elapsed();
        assert!(waited(&queue) < QUEUE_TIME / 2 && !queue.lock().is_full(1));
        // A disk that is slow all the time stays known as one, however often it is compared.
        *queue.lock() = waiting(QUEUE_TIME, 1 << 20);
        queue.lock().jobs.push_front((ago(QUEUE_TIME), check()));
        queue.pop(None, None);
        queue.lock().jobs.push_front((Instant::now(), check()));
        queue.pop(None, None);
        queue.lock().checking = None;
        assert!(waited(&queue) >= QUEUE_TIME && queue.lock().is_full(1));
    }

    /// The audit's part of a broken disk may hang. The thread of the disks does not.
    #[test]
    fn a_read_that_hangs_is_none_of_the_work_and_comes_first_when_it_is_over() {
        let queue = Queue::default();
        let commit = || Job::Commit { number: 1, base: false, records: records(5) };
        queue.audits(3, true);
        queue.lock().reading = Instant::now().checked_sub(STUCK);
        queue.audits(4, true);
        assert!(queue.reading_for() >= STUCK && queue.working_for() < STUCK);
        assert!(!queue.lock().is_full(1) && !queue.is_urgent());
        queue.push(queue.lock(), commit());
        let read = |ticket| Read {
            ticket,
            found: Ok(Found::Data),
            buffer: Vec::new(),
            took: Duration::ZERO,
            spent: Duration::ZERO,
        };
        queue.read(read(7));
        let now = Instant::now();
        assert!(matches!(queue.pop(Some(now), Some(now)), Some(Job::Read(Read { ticket: 7, .. }))));
        assert_eq!(queue.reading_for(), Duration::ZERO);
        assert!(matches!(queue.pop(None, None), Some(Job::Commit { .. })));
        // As many are on their way as ever may, begun or not.
        let audit =
            || Job::Audit { number: 1, ranges: Vec::new(), budget: Budget::start("1".parse().unwrap()) };
        queue.push(queue.lock(), audit());
        queue.audits(MOST_AUDITS - 2, true);
        assert!(!queue.lock().has_enough_to_audit());
        queue.push(queue.lock(), audit());
        assert!(queue.lock().has_enough_to_audit());
        queue.audits(0, false);
        assert!(!queue.lock().has_enough_to_audit() && queue.reading_for().is_zero());
    }

    /// To make a few bytes durable takes as long as to make many so, and says nothing of how fast the disk is.
    #[test]
    fn a_guest_that_writes_rarely_makes_no_disk_look_slow() {
        let paced = |took: Duration| {
            let queue = Queue::default();
            for _ in 0..50 {
                queue.push(queue.lock(), Job::Commit { number: 1, base: false, records: records(5) });
                queue.pop(None, None);
                assert!(queue.pop(Some(Instant::now()), None).is_none());
                queue.lock().working = Instant::now().checked_sub(took);
            }
            queue.push(queue.lock(), Job::Release);
            queue.pop(None, None);
            queue
        };
        let is_full = |queue: &Queue, bytes| {
            queue.lock().bytes = 1;
            queue.lock().is_full(bytes)
        };
        // The seek of a mechanical disk: 100 MB/s are known of it at least.
        assert!(!is_full(&paced(Duration::from_millis(10)), 100 << 20));
        // One that takes far longer for it is slow.
        let slow = paced(Duration::from_secs(1));
        assert!(!is_full(&slow, 1 << 20) && is_full(&slow, 3 << 20));
        // Many bytes count as what they are.
        let mut many = records(1000);
        assert!(many.push(DiskRecord { disk: 0, offset: 0, op: DiskOp::Zero(8 << 20) }));
        let queue = Queue::default();
        queue.push(queue.lock(), Job::Commit { number: 1, base: false, records: many });
        queue.pop(None, None);
        queue.pop(Some(Instant::now()), None);
        assert_eq!(queue.lock().paced, Some(0));
    }

    #[test]
    fn buffers_are_used_again_unless_they_are_large() {
        let queue = Queue::default();
        let mut buffer = queue.buffer();
        buffer.empty_for(5000).unwrap();
        assert!(buffer.push(DiskRecord { disk: 0, offset: 0, op: DiskOp::Flush }));
        queue.give_back(buffer);
        let again = queue.buffer();
        assert!(again.is_empty() && again.memory() >= 5000);
        queue.give_back(records(SPARE_BYTES + 1));
        assert_eq!(queue.buffer().memory(), 0);
    }
}
