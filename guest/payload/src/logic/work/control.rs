//! How vCPU 0 gives orders to the workers, and how they report. Atomics only: the vCPUs share nothing else.

use core::sync::atomic::Ordering::{Release, SeqCst};
use core::sync::atomic::{AtomicU32, AtomicU64};

use super::MAX_WORKERS;

/// The order of `WORK SET`, over all workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// Pages written to; 0 is off.
    pub pages: u64,
    /// Share of the writes that go to the hot tenth of the pages, 0 to 100.
    pub hot_percent: u32,
    /// Writes per second; 0 means as many as possible.
    pub rate: u64,
}

/// A worker's results since the last `WORK SET`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Writes.
    pub writes: u64,
    /// Pages compared.
    pub checked: u64,
    /// Pages that held an old version.
    pub stale: u64,
    /// Pages that held something else.
    pub torn: u64,
}

#[derive(Debug, Default)]
struct Board {
    writes: AtomicU64,
    checked: AtomicU64,
    stale: AtomicU64,
    torn: AtomicU64,
    /// Last setting the worker took over.
    setting_seen: AtomicU32,
    /// Last verification the worker finished.
    verified: AtomicU32,
}

impl Board {
    const fn new() -> Self {
        Self {
            writes: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            torn: AtomicU64::new(0),
            setting_seen: AtomicU32::new(0),
            verified: AtomicU32::new(0),
        }
    }
}

/// The board on the wall.
#[derive(Debug, Default)]
pub struct Control {
    /// Odd while the setting is being written; grows by two with each.
    sequence: AtomicU32,
    pages: AtomicU64,
    hot_percent: AtomicU32,
    rate: AtomicU64,
    verification: AtomicU32,
    boards: [Board; MAX_WORKERS],
}

impl Control {
    /// An empty board: no work.
    pub const fn new() -> Self {
        Self {
            sequence: AtomicU32::new(0),
            pages: AtomicU64::new(0),
            hot_percent: AtomicU32::new(0),
            rate: AtomicU64::new(0),
            verification: AtomicU32::new(0),
            boards: [const { Board::new() }; MAX_WORKERS],
        }
    }

    /// Publishes a setting. Only vCPU 0 calls it.
    pub fn set(&self, setting: Setting) {
        self.sequence.fetch_add(1, SeqCst);
        self.pages.store(setting.pages, SeqCst);
        self.hot_percent.store(setting.hot_percent, SeqCst);
        self.rate.store(setting.rate, SeqCst);
        self.sequence.fetch_add(1, SeqCst);
    }

    /// The setting and its sequence number, or `None` in the middle of a change.
    pub fn setting(&self) -> Option<(u32, Setting)> {
        let sequence = self.sequence.load(SeqCst);
        let setting = Setting {
            pages: self.pages.load(SeqCst),
            hot_percent: self.hot_percent.load(SeqCst),
            rate: self.rate.load(SeqCst),
        };
        (sequence & 1 == 0 && self.sequence.load(SeqCst) == sequence).then_some((sequence, setting))
    }

    /// Sequence number of the last setting; it changes with each.
    pub fn sequence(&self) -> u32 {
        self.sequence.load(SeqCst)
    }

    /// Asks all workers for a verification and returns its number. Only vCPU 0 calls it.
    pub fn request_verification(&self) -> u32 {
        self.verification.fetch_add(1, SeqCst).wrapping_add(1)
    }

    /// Number of the last verification asked for.
    pub fn verification(&self) -> u32 {
        self.verification.load(SeqCst)
    }

    /// True when the first `workers` workers have finished verification `number`.
    pub fn is_verified(&self, workers: usize, number: u32) -> bool {
        let done = |board: &Board| board.verified.load(SeqCst).wrapping_sub(number) as i32 >= 0;
        self.boards[..workers].iter().all(done)
    }

    /// True when the first `workers` workers follow the last setting.
    pub fn is_settled(&self, workers: usize) -> bool {
        self.boards[..workers].iter().all(|board| board.setting_seen.load(SeqCst) == self.sequence())
    }

    /// The report of worker `worker`.
    pub fn stat(&self, worker: usize) -> Stat {
        let board = &self.boards[worker];
        Stat {
            writes: board.writes.load(SeqCst),
            checked: board.checked.load(SeqCst),
            stale: board.stale.load(SeqCst),
            torn: board.torn.load(SeqCst),
        }
    }

    /// Worker `worker` reports.
    pub(super) fn report(&self, worker: usize, stat: Stat, setting_seen: u32, verified: u32) {
        let board = &self.boards[worker];
        // Plain stores except the last: x86 keeps their order, and the last publishes the others.
        board.writes.store(stat.writes, Release);
        board.checked.store(stat.checked, Release);
        board.stale.store(stat.stale, Release);
        board.torn.store(stat.torn, Release);
        board.setting_seen.store(setting_seen, Release);
        board.verified.store(verified, Release);
    }
}
