//! What waits for the thread of the disks.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_machine::DiskHash;

use crate::disk::image::Sum;

/// Bytes of committed writes that may wait. Enough for a disk that does not answer for a second.
pub(super) const QUEUE_BYTES: usize = 256 << 20;

pub(super) enum Job {
    Sums { disk: u16, first: u64, count: u32, sums: Option<Vec<Sum>> },
    Blocks(Vec<u8>),
    Commit { number: u64, base: bool, records: Vec<u8> },
    Check { number: u64, hashes: Vec<DiskHash> },
    Settle { checkpoint: u64 },
    Leave(Sender<Result<(), String>>),
    BecomePrimary { generation: u64, done: Sender<Result<(), String>> },
    Close,
}

impl Job {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Sums { sums, .. } => 64 + sums.as_ref().map_or(0, |sums| sums.len() * size_of::<Sum>()),
            Self::Blocks(records) | Self::Commit { records, .. } => 64 + records.len(),
            Self::Check { .. }
            | Self::Settle { .. }
            | Self::Leave(_)
            | Self::BecomePrimary { .. }
            | Self::Close => 0,
        }
    }
}

#[derive(Default)]
pub(super) struct Waiting {
    pub(super) jobs: VecDeque<Job>,
    pub(super) bytes: usize,
    pub(super) failed: Option<String>,
}

#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    came: Condvar,
    pub(super) room: Condvar,
    /// Bytes of chunks that were asked for and have not come.
    pub(super) wanted: AtomicU64,
}

impl Queue {
    pub(super) fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something waits that must not wait for a comparison: the end of the link or of the standby, or
    /// so many writes that the link would have to.
    pub(super) fn is_urgent(&self) -> bool {
        let waiting = self.lock();
        let ends = |job: &Job| {
            matches!(job, Job::Settle { .. } | Job::Leave(_) | Job::BecomePrimary { .. } | Job::Close)
        };
        waiting.bytes > QUEUE_BYTES / 2 || waiting.jobs.iter().any(ends)
    }

    pub(super) fn push(&self, mut waiting: MutexGuard<'_, Waiting>, job: Job) {
        waiting.bytes += job.bytes();
        waiting.jobs.push_back(job);
        self.came.notify_one();
    }

    /// The next job, `None` when none came until `soft`, or, however many there are, when `hard` is over.
    pub(super) fn pop(&self, soft: Option<Instant>, hard: Option<Instant>) -> Option<Job> {
        let mut waiting = self.lock();
        loop {
            let now = Instant::now();
            if hard.is_some_and(|hard| now >= hard) {
                return None;
            }
            if let Some(job) = waiting.jobs.pop_front() {
                waiting.bytes -= job.bytes();
                self.room.notify_all();
                return Some(job);
            }
            waiting = match soft.map(|soft| soft.saturating_duration_since(now)) {
                Some(Duration::ZERO) => return None,
                Some(time) => self.came.wait_timeout(waiting, time).unwrap_or_else(PoisonError::into_inner).0,
                None => self.came.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}
