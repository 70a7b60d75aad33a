//! Pages taken while the epoch goes on, by any number of threads: live migration while the guest runs, or
//! many threads sharing the work of a stop. KVM_MT_SUBLIST_FETCH of 2016.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Tracker;
use super::stats::add;
use crate::layout::Gfn;
use crate::source::{HarvestError, Plan, RearmError};

/// How to fetch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetch {
    /// Waits so long for a dirty page (MT_FETCH_WAIT); None does not wait. KVM tells nobody of a new ring
    /// entry, so a wait looks every 100 µs, and at once when a vCPU finds its ring full. The trigger ends it,
    /// too.
    pub wait: Option<Duration>,
    /// Re-arms the pages before it returns (MT_FETCH_REARM), so that [`Fetched::rearm`] has nothing left to
    /// do.
    pub rearm: bool,
}

/// How often a wait looks.
const LOOK: Duration = Duration::from_micros(100);

/// Rung when there is certainly something to fetch.
#[derive(Default)]
pub(super) struct Bell {
    lock: Mutex<()>,
    rung: Condvar,
    waiting: AtomicUsize,
}

impl Bell {
    pub(super) fn ring(&self) {
        if self.waiting.load(Ordering::Acquire) != 0 {
            self.rung.notify_all();
        }
    }

    fn wait(&self, time: Duration) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.rung.wait_timeout(lock, time));
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Tracker {
    /// Takes dirty pages of this epoch, as many as there are and the buffer holds, while the guest runs or
    /// while it is stopped. Any number of threads at once; each page goes to one of them.
    ///
    /// A page that was fetched is not part of the epoch any more: the caller has it and copies it after
    /// [`Fetched::rearm`]. From then on its next write is caught, and it is fetched or harvested again. Hot
    /// pages are not fetched: they come when the epoch ends. Where the back end searches a bitmap (not the
    /// ring), so does every fetch.
    ///
    /// Returns nothing, after the wait, while an epoch is being ended.
    ///
    /// # Errors
    /// As [`crate::Epoch::harvest`]; what was taken before the error comes with the next fetch or harvest.
    pub fn fetch<'b>(&self, buffer: &'b mut [Gfn], how: Fetch) -> Result<Fetched<'_, 'b>, HarvestError> {
        let mut fetched = Fetched { tracker: self, buffer, trapped: 0, len: 0, held: false };
        let end = how.wait.and_then(|wait| Instant::now().checked_add(wait));
        loop {
            fetched.take_or_nothing()?;
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            match left {
                Some(left) if fetched.len == 0 && !left.is_zero() && !self.should_stop() => {
                    self.bell.wait(left.min(LOOK));
                }
                _ => break,
            }
        }
        if how.rearm {
            fetched.arm().map_err(|_| HarvestError::Failed)?;
        }
        Ok(fetched)
    }
}

/// Pages that were fetched. They can be seen only after [`Fetched::rearm`], because a page read before it is
/// armed may be written afterwards and nobody would know. Dropped instead, they come again.
#[must_use = "pages that are not re-armed come again"]
pub struct Fetched<'t, 'b> {
    tracker: &'t Tracker,
    /// `trapped` pages that are unarmed, then up to `len` pages that were marked.
    buffer: &'b mut [Gfn],
    trapped: usize,
    len: usize,
    /// Counted among the fetchers: there are pages, or soon will be, that are not armed.
    held: bool,
}

impl<'b> Fetched<'_, 'b> {
    /// How many pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Arms the pages, unless the fetch has, and lends them for reading.
    ///
    /// # Errors
    /// As [`crate::Epoch::rearm`]: tracking is over.
    pub fn rearm(mut self) -> Result<&'b [Gfn], RearmError> {
        self.arm()?;
        let buffer = std::mem::take(&mut self.buffer);
        Ok(&buffer[..self.len])
    }

    fn take_or_nothing(&mut self) -> Result<(), HarvestError> {
        let tracker = self.tracker;
        tracker.check()?;
        if tracker.gate.is_off() {
            return Err(HarvestError::NotEnabled);
        }
        if !tracker.gate.is_open() {
            return Ok(());
        }
        // Said before a list is owned: an epoch that finds no list owned finds this.
        self.tracker.fetchers.fetch_add(1, Ordering::AcqRel);
        self.held = true;
        self.take()?;
        if self.len == 0 {
            self.held = false;
            self.tracker.fetchers.fetch_sub(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Fills the buffer: from the vCPUs' lists and rings, then from what belongs to no vCPU.
    fn take(&mut self) -> Result<(), HarvestError> {
        let tracker = self.tracker;
        if !tracker.gate.is_open() {
            return Ok(());
        }
        let lanes = tracker.lanes.len();
        let first = tracker.next_lane.fetch_add(1, Ordering::Relaxed);
        for vcpu in (0..lanes).map(|index| (first + index) % lanes) {
            // A list that another thread is at work in is that thread's.
            let Some(owner) = tracker.lanes[vcpu].own() else { continue };
            if !tracker.gate.is_open() {
                return Ok(());
            }
            while self.len < self.buffer.len() {
                let Some(gfn) = owner.pop() else { break };
                self.push_trapped(gfn);
            }
            tracker.take_vcpu(vcpu, |gfn| self.push_trapped(gfn))?;
        }
        let Some(_owner) = tracker.shared.own() else { return Ok(()) };
        if !tracker.gate.is_open() || self.len == self.buffer.len() {
            return Ok(());
        }
        if tracker.source.arms_when_taken() {
            tracker.take_armed(|gfn| tracker.global.record(gfn))?;
        } else {
            tracker.take_shared(|gfn| self.push_trapped(gfn))?;
        }
        self.take_marked();
        Ok(())
    }

    fn push_trapped(&mut self, gfn: Gfn) -> bool {
        let fits = self.len < self.buffer.len();
        if fits {
            self.buffer[self.len] = gfn;
            self.len += 1;
            self.trapped += 1;
        }
        fits
    }

    fn take_marked(&mut self) {
        let tracker = self.tracker;
        let first = self.len;
        let mut ignored = 0;
        tracker.global.drain(|gfn| {
            if !tracker.layout.contains(gfn) {
                ignored += 1;
            } else if tracker.trapped.is_claimed(gfn) {
                // It is unarmed, so it is in a list, is fetched or is hot, and its copy is still to be made:
                // after its bit is released, which comes after this look at it, and so with the write that
                // was marked.
            } else if self.len < self.buffer.len() {
                self.buffer[self.len] = gfn;
                self.len += 1;
            } else {
                // No room: it stays marked. Its hint goes to a place of the list that was read already.
                tracker.global.record(gfn);
            }
        });
        add(&tracker.counters.ignored, ignored);
        // Asked afterwards: who is in doubt says so before he marks. Such pages may be writable without a
        // trap, and only an epoch, which arms everything, may take them.
        if tracker.doubtful.load(Ordering::Acquire) {
            self.buffer[first..self.len].iter().for_each(|&gfn| tracker.global.record(gfn));
            self.len = first;
        }
    }

    fn arm(&mut self) -> Result<(), RearmError> {
        if !std::mem::take(&mut self.held) {
            return Ok(());
        }
        let tracker = self.tracker;
        let armed = tracker.arm_fetched(&self.buffer[..self.trapped]);
        add(&tracker.counters.fetched, self.len as u64);
        tracker.fetched.fetch_add(self.trapped, Ordering::Relaxed);
        tracker.fetchers.fetch_sub(1, Ordering::AcqRel);
        armed
    }
}

impl Tracker {
    fn arm_fetched(&self, pages: &[Gfn]) -> Result<(), RearmError> {
        // The bits go first: a write that is trapped after it was armed must be listed anew.
        for &gfn in pages {
            self.trapped.release(gfn);
        }
        self.unarmed.fetch_sub(pages.len(), Ordering::AcqRel);
        if pages.is_empty() {
            return Ok(());
        }
        let armed = self.arm_all_of(pages, Plan::RUNNING)?;
        if armed.doubtful {
            // Some of them may be writable without a trap: the epoch reports them and then arms everything.
            self.doubtful.store(true, Ordering::Release);
            pages.iter().for_each(|&gfn| self.global.record(gfn));
        }
        Ok(())
    }
}

impl Drop for Fetched<'_, '_> {
    fn drop(&mut self) {
        // A failure is on record, and said by the next fetch or harvest.
        self.arm().ok();
        // Armed and not read: they are marked, and come with the next fetch or harvest. `rearm` has taken the
        // buffer.
        let unread = self.len.min(self.buffer.len());
        self.buffer[..unread].iter().for_each(|&gfn| self.tracker.global.record(gfn));
    }
}

impl fmt::Debug for Fetched<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetched").field("len", &self.len).finish_non_exhaustive()
    }
}
