//! Any number of threads take pages before the epoch ends: live migration while the guest runs, or many
//! threads that share the work of a stop. This is KVM_MT_SUBLIST_FETCH of 2016.
// UNSAFETY: lends the list of what is to be armed to the back end, as a slice.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::stats::add;
use super::{Token, Tracker};
use crate::layout::Gfn;
use crate::source::{HarvestError, Plan, RearmError};

/// How to fetch. Begin from [`Fetch::default`], which neither waits nor re-arms.
///
/// # Several threads
///
/// Two threads that fetch at the same time may get the same page one after the other: A fetches P and reads
/// it, the guest writes P, B fetches P, reads and sends it, and A sends its older copy last. So either one
/// lock covers fetching, reading *and* sending, or each thread fetches a [`Shard`] of its own and sends over
/// a connection of its own. The base copy is a reader like any other: it takes the same lock, or each thread
/// copies the pages of its own shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetch {
    /// Waits this long for a dirty page (MT_FETCH_WAIT); None does not wait. KVM announces no new page, so a
    /// wait checks every 100 µs, less often where checking costs more, and at once when a vCPU finds its ring
    /// full. The trigger and [`Tracker::wake_fetchers`] end it, too.
    pub wait: Option<Duration>,
    /// Re-arms the pages before it returns (MT_FETCH_REARM), so that [`Fetched::rearm`] has nothing left to
    /// do.
    pub rearm: bool,
    /// A wait continues until this many pages of the VM, over all shards, are dirty. Only the ring knows this
    /// without a system call; with the other back ends a wait ends at the first page.
    pub at_least: usize,
    /// Only pages of this part of the VM; None means all of it.
    pub shard: Option<Shard>,
}

/// One of several parts of all pages, for threads that fetch side by side: a page is always in the same part,
/// so the thread that fetches this part is the only one that ever reads and sends it, and no older copy can
/// overtake a newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: u32,
    of: u32,
}

impl Shard {
    /// Neighbouring pages in the same part: 2 MiB.
    const RUN: u64 = 512;

    /// Part `index`, from 0, of `of`. None if there is no such part.
    pub const fn new(index: u32, of: u32) -> Option<Shard> {
        if index < of { Some(Shard { index, of }) } else { None }
    }

    /// Whether the page is in this part. Runs of 2 MiB go to the parts in turn.
    pub const fn has(self, gfn: Gfn) -> bool {
        gfn.0 / Self::RUN % self.of as u64 == self.index as u64
    }
}

/// How often a wait checks, at most.
const LOOK: Duration = Duration::from_micros(100);
/// A wait sleeps this many times the duration of the last check, so that it costs a tenth of a processor at
/// most.
const REST: u32 = 10;

/// Rung when a check is certainly worthwhile.
#[derive(Default)]
pub(super) struct Bell {
    lock: Mutex<()>,
    rung: Condvar,
    waiting: AtomicUsize,
    /// How often all waits were ended.
    woken: AtomicU64,
}

impl Bell {
    pub(super) fn ring(&self) {
        if self.waiting.load(Ordering::SeqCst) != 0 {
            // A thread that is about to wait has the lock, and is woken once it waits.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.rung.notify_all();
        }
    }

    /// Ends every present wait.
    fn wake(&self) {
        self.woken.fetch_add(1, Ordering::SeqCst);
        self.ring();
    }

    /// Waits for the bell, unless `is_over` says under its lock that there is nothing to wait for.
    fn wait(&self, time: Duration, is_over: impl FnOnce() -> bool) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_over() {
            drop(self.rung.wait_timeout(lock, time));
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Tracker {
    /// Takes dirty pages of this epoch, as many as there are and the buffer holds, while the guest runs or is
    /// stopped. Any number of threads can do this at once, with shards of their own: see [`Fetch`].
    ///
    /// A page that was fetched is no longer part of the epoch: the caller has it and copies it after
    /// [`Fetched::rearm`]. From then on its next write is caught, and it is fetched or harvested again. A
    /// page that becomes hot ([`Tracker::age`]) is fetched once more and then comes when the epoch ends.
    /// Where the back end searches a bitmap (not with the ring), every fetch searches it too.
    ///
    /// With a [`Shard`], fewer pages than the buffer holds do not mean that nothing is left: pages of other
    /// shards took the other places, and are marked for their own fetches. Fetch again until nothing comes; a
    /// later fetch or the epoch brings what is left even then.
    ///
    /// Returns nothing, after the wait, while an epoch is being ended.
    ///
    /// # Errors
    /// As [`crate::Epoch::harvest`]; what was taken before the error comes with the next fetch or harvest.
    pub fn fetch<'b>(&self, buffer: &'b mut [Gfn], how: Fetch) -> Result<Fetched<'_, 'b>, HarvestError> {
        let mut fetched =
            Fetched { tracker: self, buffer, trapped: 0, len: 0, foreign: 0, shard: how.shard, held: false };
        let end = how.wait.and_then(|wait| Instant::now().checked_add(wait));
        let woken = self.bell.woken.load(Ordering::SeqCst);
        loop {
            let began = Instant::now();
            let left = end.map_or(Duration::ZERO, |end| end.saturating_duration_since(began));
            let is_over = || self.should_stop() || self.bell.woken.load(Ordering::SeqCst) != woken;
            // Taken pages are not held during a wait: otherwise an epoch could not end meanwhile.
            let few = self.source.counts() && self.pending() < how.at_least;
            if !few || left.is_zero() || is_over() {
                fetched.take_or_nothing()?;
            }
            if fetched.len != 0 || left.is_zero() || is_over() {
                break;
            }
            self.bell.wait(left.min(LOOK.max(began.elapsed() * REST)), is_over);
        }
        if how.rearm {
            fetched.arm().map_err(|_| HarvestError::Failed)?;
        }
        Ok(fetched)
    }

    /// Ends the wait of every [`Tracker::fetch`] and [`Tracker::wait_for_room`] that waits now, for a thread
    /// that is about to stop the VM. A wait that begins after this is not ended: set your flag first, and keep
    /// waits short.
    pub fn wake_fetchers(&self) {
        self.bell.wake();
        self.room_bell.wake();
    }

    /// Waits until the ring of this vCPU has room, at most this long, and returns whether it has. For a
    /// vCPU's thread that got [`super::RingExit::DirtyLogFull`] from [`Tracker::ring_full`] while other
    /// threads fetch: the pages that they take and re-arm make room, and until then KVM would return at once,
    /// again and again. Returns true at once with the other back ends.
    ///
    /// [`Tracker::wake_fetchers`] ends the wait, so check your own flags when this returns.
    ///
    /// # Errors
    /// Tracking has failed for good.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn wait_for_room(&self, vcpu: usize, wait: Duration) -> Result<bool, HarvestError> {
        assert!(vcpu < self.vcpus(), "there is no vCPU {vcpu}");
        let end = Instant::now().checked_add(wait);
        let woken = self.room_bell.woken.load(Ordering::SeqCst);
        loop {
            self.check()?;
            if self.source.has_room(vcpu) || self.gate.is_off() {
                return Ok(true);
            }
            let left = end.map_or(LOOK, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() || self.room_bell.woken.load(Ordering::SeqCst) != woken {
                return Ok(false);
            }
            self.bell.ring();
            self.room_bell.wait(left, || {
                self.source.has_room(vcpu) || self.room_bell.woken.load(Ordering::SeqCst) != woken
            });
        }
    }
}

/// Fetched pages. They become visible only after [`Fetched::rearm`], because a page read before it is armed
/// may be written afterwards without anybody noticing. If this is dropped instead, they come again.
#[must_use = "pages that are not re-armed come again"]
pub struct Fetched<'t, 'b> {
    tracker: &'t Tracker,
    /// `trapped` pages that are unarmed, then up to `len` pages that were marked; at the end, backwards,
    /// `foreign` ones that are unarmed and of another shard.
    buffer: &'b mut [Gfn],
    trapped: usize,
    len: usize,
    foreign: usize,
    shard: Option<Shard>,
    /// Counted among the fetchers: some pages are not armed, or soon will not be.
    held: bool,
}

impl<'b> Fetched<'_, 'b> {
    /// How many pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Arms the pages, unless the fetch has done so, and lends them for reading.
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
        // Announced before a list is owned: an epoch that finds no list owned finds this.
        self.tracker.fetchers.fetch_add(1, Ordering::AcqRel);
        self.held = true;
        fence(Ordering::SeqCst);
        self.take()?;
        if self.len == 0 {
            self.arm().map_err(|_| HarvestError::Failed)?;
        }
        Ok(())
    }

    fn is_ours(&self, gfn: Gfn) -> bool {
        self.shard.is_none_or(|shard| shard.has(gfn))
    }

    fn has_space(&self) -> bool {
        self.len + self.foreign < self.buffer.len()
    }

    /// Fills the buffer: from the vCPUs' lists and rings, then from what belongs to no vCPU.
    fn take(&mut self) -> Result<(), HarvestError> {
        let tracker = self.tracker;
        if !tracker.gate.is_open() {
            return Ok(());
        }
        let lanes = tracker.lanes().len();
        let first = tracker.next_lane.fetch_add(1, Ordering::Relaxed);
        for vcpu in (0..lanes).map(|index| (first + index) % lanes) {
            // A list that another thread is using is that thread's.
            let Some(owner) = tracker.lanes()[vcpu].own() else { continue };
            if !tracker.gate.is_open() {
                return Ok(());
            }
            while self.has_space() {
                let Some(gfn) = owner.pop() else { break };
                self.push_trapped(gfn);
            }
            tracker.take_vcpu(vcpu, |gfn| self.push_trapped(gfn))?;
        }
        let Some(_owner) = tracker.shared.own() else { return Ok(()) };
        if !tracker.gate.is_open() || !self.has_space() {
            return Ok(());
        }
        tracker.take_shared(|gfn| self.push_trapped(gfn))?;
        tracker.take_armed(false, |gfn| tracker.global.record(gfn))?;
        self.take_marked();
        Ok(())
    }

    fn push_trapped(&mut self, gfn: Gfn) -> bool {
        let fits = self.has_space();
        if !fits {
        } else if self.is_ours(gfn) {
            self.buffer[self.len] = gfn;
            self.len += 1;
            self.trapped += 1;
        } else {
            self.foreign += 1;
            let place = self.buffer.len() - self.foreign;
            self.buffer[place] = gfn;
        }
        fits
    }

    fn take_marked(&mut self) {
        let tracker = self.tracker;
        let first = self.len;
        let mut ignored = 0;
        tracker.global.drain_while(|gfn| {
            if !tracker.slots().contains(gfn) {
                ignored += 1;
            } else if tracker.trapped.is_claimed(gfn) {
                // It is unarmed, so it is in a list, is fetched or is hot, and its copy comes later: after
                // its bit is released. The release comes after this check, and so after the write that was
                // marked.
            } else if self.is_ours(gfn) && self.has_space() {
                self.buffer[self.len] = gfn;
                self.len += 1;
            } else {
                // It belongs to another shard: it stays marked. Its hint goes to a place of the list that was
                // already read.
                tracker.global.record(gfn);
            }
            self.has_space()
        });
        add(&tracker.counters.ignored, ignored);
        // Asked afterwards: a thread that is unsure says so before it marks. Such pages may be writable
        // without a trap, and only an epoch, which arms everything, may take them.
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
        let foreign = self.buffer.len() - self.foreign..;
        let armed = tracker
            .arm_fetched(&mut self.buffer[..self.trapped])
            .and_then(|()| tracker.arm_fetched(&mut self.buffer[foreign.clone()]));
        // Armed and not read: they are marked, for a fetch of their shard or the epoch. Only after they are
        // armed, because a thread that finds a mark takes its page for armed.
        self.buffer[foreign].iter().for_each(|&gfn| tracker.global.record(gfn));
        add(&tracker.counters.fetched, self.len as u64);
        tracker.fetched.fetch_add(self.trapped + self.foreign, Ordering::Relaxed);
        self.foreign = 0;
        tracker.fetchers.fetch_sub(1, Ordering::AcqRel);
        tracker.room_bell.ring();
        armed
    }
}

impl Tracker {
    /// Arms fetched pages, except those that are hot from now on. Changes their order.
    fn arm_fetched(&self, pages: &mut [Gfn]) -> Result<(), RearmError> {
        let cold = self.heat(pages);
        let pages = &pages[..cold];
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

    /// Moves pages that are hot from now on behind the others, and returns how many others there are. Hot
    /// pages stay unarmed, and every epoch reports them until they cool.
    fn heat(&self, pages: &mut [Gfn]) -> usize {
        // Two threads do not wait for each other: a page that is not examined is armed like any other.
        let (Some(hot), Some(_owner)) = (self.heating_set(), self.heating.own()) else { return pages.len() };
        let mut cold = 0;
        for index in 0..pages.len() {
            if !hot.trapped(pages[index]) {
                pages.swap(cold, index);
                cold += 1;
            }
        }
        cold
    }

    /// Lets the rule for hot pages advance one step, as the end of an epoch does, without stopping anybody:
    /// for a migration, which fetches in one long epoch. Pages that cool are armed and come with the next
    /// fetch. Call it once for each pass over the dirty pages. Nothing happens while an epoch is open.
    ///
    /// # Errors
    /// As [`crate::Epoch::rearm`]: tracking is over.
    pub fn age(&self) -> Result<(), RearmError> {
        let Some(hot) = &self.hot else { return Ok(()) };
        let Some(_token) = Token::take(self).filter(|_| self.gate.is_open()) else { return Ok(()) };
        let Some(_owner) = self.heating.own() else { return Ok(()) };
        hot.cool(|gfn| self.to_arm.push(gfn));
        self.run_time.ended();
        hot.begin(self.most_traps(0), self.run_time.take());
        self.run_time.begins();
        let pages = self.to_arm.len();
        if pages == 0 {
            return Ok(());
        }
        self.to_arm.for_each(|gfn| _ = self.trapped.release(gfn));
        self.unarmed.fetch_sub(pages, Ordering::AcqRel);
        // SAFETY: only the holder of the token stores to the list, and that is this thread.
        let armed = self.arm_all_of(unsafe { self.to_arm.slice() }, Plan::RUNNING)?;
        if armed.doubtful {
            self.doubtful.store(true, Ordering::Release);
        }
        // They may have changed since they were last read.
        self.to_arm.for_each(|gfn| self.global.record(gfn));
        self.to_arm.clear();
        Ok(())
    }
}

impl Drop for Fetched<'_, '_> {
    fn drop(&mut self) {
        // A failure is recorded, and the next fetch or harvest reports it.
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
