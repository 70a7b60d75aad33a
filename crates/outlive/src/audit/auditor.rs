//! The thread that reads the primary's pages and disks for the audit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use outlive_dirty::Gfn;
use outlive_epoch::AuditSpan;
use outlive_machine::{Ram, TouchedPages, page_sum};

use super::disks::DiskAuditor;
use super::{Audit, AuditDisk, AuditShare, Pace, Page, Sample, thread_time};

/// Time between two looks whether there is anything to compare.
const IDLE: Duration = Duration::from_millis(200);
/// The shortest rest of a thread that waits for an epoch to end.
const FULL: Duration = Duration::from_millis(2);
/// How often a page is read again because an epoch ended meanwhile; then it has its turn later.
const TRIES: u32 = 3;
/// How long the end of the VM here waits for this thread, which may be in an image on a disk that is slow, and how
/// often it looks. A process that becomes a standby opens the same images, so they must be free.
const LAST: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(1);

/// What the auditor reads.
pub(crate) struct Source {
    /// The VM's memory.
    pub(crate) ram: Arc<Ram>,
    /// The running epoch, while there is one whose writes are listed; see
    /// [`Valve::running_epoch`](outlive_machine::Valve::running_epoch).
    pub(crate) epoch: Box<dyn Fn() -> Option<u64> + Send>,
}

/// The thread. Dropping this ends it, and it lets go of the VM's memory and its images.
pub(crate) struct AuditThread {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl AuditThread {
    /// Starts it.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(
        audit: Arc<Audit>,
        source: Source,
        disks: Vec<AuditDisk>,
        share: AuditShare,
    ) -> io::Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = outlive_machine::spawn("audit", move || {
            let disks = DiskAuditor::new(audit.clone(), disks, fastrand::u64(..));
            let memory = Auditor::new(audit, source, fastrand::u64(..));
            let (pace, rests) = (Pace::start(share), Instant::now());
            let mut turns = Turns { memory, disks, pace, ahead: Duration::ZERO, rests };
            while !stopped.load(Ordering::Acquire) {
                thread::park_timeout(turns.step());
            }
        })?;
        Ok(Self { stop, thread })
    }
}

impl Drop for AuditThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        let until = Instant::now() + LAST;
        while !self.thread.is_finished() && Instant::now() < until {
            thread::sleep(LOOK);
        }
    }
}

/// The thread's work: memory and disks take turns, so that each has half of the share if both need it.
struct Turns {
    memory: Auditor,
    disks: DiskAuditor,
    pace: Pace,
    /// How much more the disks have had.
    ahead: Duration,
    /// Until when nothing is read.
    rests: Instant,
}

impl Turns {
    /// Does a little, and returns how long to wait.
    fn step(&mut self) -> Duration {
        if !self.memory.audit.is_wanted() || (self.memory.source.epoch)().is_none() {
            self.pace.rest(Duration::ZERO);
            // What was compared with a copy that is gone is no part of a round.
            self.memory.left = self.memory.spans;
            self.disks.begin_round();
            return IDLE;
        }
        let looks = self.disks.look(&self.memory.source.epoch);
        let now = Instant::now();
        if self.rests <= now {
            self.rests = now + self.read();
        }
        let rest = self.rests.saturating_duration_since(now);
        looks.map_or(rest, |looks| looks.min(rest))
    }

    /// Reads something, and returns how long to rest.
    fn read(&mut self) -> Duration {
        let Self { memory, disks, pace, ahead, .. } = self;
        let is_full = memory.audit.room() < AuditSpan::PAGES as usize;
        let began = thread_time();
        if disks.is_due() && (ahead.is_zero() || is_full) {
            let theirs = memory.audit.theirs_of_chunk() * disks.burst(&memory.source.epoch);
            *ahead += (thread_time() - began).max(theirs);
            return pace.rest(theirs);
        }
        if is_full {
            return pace.rest(Duration::ZERO).max(FULL);
        }
        let theirs = memory.audit.theirs() * memory.sample_next();
        *ahead = ahead.saturating_sub((thread_time() - began).max(theirs));
        pace.rest(theirs)
    }
}

/// Reads memory.
pub(super) struct Auditor {
    audit: Arc<Audit>,
    source: Source,
    touched: TouchedPages,
    page: Box<Page>,
    /// Samples of one epoch that are not handed in yet.
    samples: Vec<Sample>,
    /// How many spans the VM's memory has.
    spans: u64,
    /// The span whose turn is next.
    at: u64,
    /// How many spans are left of this round.
    left: u64,
}

impl Auditor {
    /// Begins at any span; `seed` says at which.
    pub(super) fn new(audit: Arc<Audit>, source: Source, seed: u64) -> Self {
        let spans = source.ram.pages() / AuditSpan::PAGES;
        Self {
            audit,
            source,
            touched: TouchedPages::open(),
            page: Page::new(),
            samples: Vec::with_capacity(AuditSpan::PAGES as usize),
            spans,
            at: seed % spans.max(1),
            left: spans,
        }
    }

    /// Reads the pages whose turn it is. Returns how many there are.
    pub(super) fn sample_next(&mut self) -> u32 {
        if let Some(gfn) = self.audit.missed() {
            let first = gfn - gfn % AuditSpan::PAGES;
            return self.sample(first, 1 << (gfn - first));
        }
        let first = self.first_of(self.at);
        self.at = (self.at + 1) % self.spans.max(1);
        let pages = self.sample(first, u64::MAX);
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            self.left = self.spans;
            self.audit.round_ended();
        }
        pages
    }

    /// The first page of a span. Every region is a whole number of spans, because its length is one of mebibytes.
    fn first_of(&self, span: u64) -> u64 {
        let mut page = span * AuditSpan::PAGES;
        for slot in self.source.ram.slots() {
            if page < slot.pages {
                return slot.base.0 + page;
            }
            page -= slot.pages;
        }
        0
    }

    /// Reads those pages of a span, and hands in what is of one epoch.
    pub(super) fn sample(&mut self, first: u64, mask: u64) -> u32 {
        let span = AuditSpan { first, mask, sum: 0 };
        let Some((mut epoch, mut touched)) = self.epoch(first) else { return 0 };
        for gfn in span.gfns() {
            for _ in 0..TRIES {
                let sum = self.read(gfn, touched >> (gfn - first) & 1 == 1);
                // Before the look at the epoch: what was read is older than what it says.
                fence(Ordering::Acquire);
                if (self.source.epoch)() == Some(epoch) {
                    self.samples.push(Sample { epoch, gfn, sum });
                    break;
                }
                self.audit.offer(&mut self.samples);
                // The epoch first: a page that was untouched in the one before may have been written in it.
                match self.epoch(first) {
                    Some(next) => (epoch, touched) = next,
                    None => return 0,
                }
            }
        }
        self.audit.offer(&mut self.samples);
        mask.count_ones()
    }

    /// The running epoch, and which pages of the span were touched before, or in it.
    fn epoch(&self, first: u64) -> Option<(u64, u64)> {
        let epoch = (self.source.epoch)()?;
        Some((epoch, self.touched.of(&self.source.ram, Gfn(first))))
    }

    fn read(&mut self, gfn: u64, touched: bool) -> u64 {
        let is_there = touched && self.source.ram.read_page(Gfn(gfn), &mut self.page.0);
        if is_there { page_sum(Gfn(gfn), &self.page.0) } else { 0 }
    }
}
