//! The cycle of an epoch: harvest, re-arm, begin the next.
// UNSAFETY: lends the list of what is to be armed to the back end, as a slice.
#![allow(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::Tracker;
use super::stats::add;
use crate::flat::Flat;
use crate::hot::Comparison;
use crate::layout::Gfn;
use crate::source::{Armed, HarvestError, Plan, RearmError};

impl Tracker {
    /// Moves the logged pages of vCPU `vcpu` into its own list, and returns how many entries there were.
    ///
    /// For the thread of that vCPU, after KVM_RUN and after it has read the vCPU's state (some vCPU ioctls
    /// write guest memory). All vCPUs can do this at once, without a lock and without allocation, even in the
    /// middle of an epoch. Entries that do not fit into the list stay in the ring until the epoch ends. When
    /// the epoch is harvested but [`crate::Epoch::run`] has not been called yet, and while tracking is off,
    /// this leaves everything where it is and returns 0.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn harvest_vcpu(&self, vcpu: usize) -> Result<usize, HarvestError> {
        let owner = self.lanes()[vcpu].own().ok_or(HarvestError::Busy { vcpu })?;
        if !self.gate.is_open() {
            return Ok(0);
        }
        self.check()?;
        let mut spilled = false;
        let taken = self.take_vcpu(vcpu, |gfn| {
            spilled = owner.is_full();
            !spilled && {
                owner.push(gfn);
                true
            }
        });
        add(&self.counters.spilled, spilled.into());
        taken
    }

    /// Takes everything dirty into one list. On an error, and if the epoch is dropped, that list stays and
    /// the next harvest continues it.
    pub(crate) fn harvest(&self) -> Result<(), HarvestError> {
        if self.gate.is_off() {
            return Err(HarvestError::NotEnabled);
        }
        self.check()?;
        self.gate.close();
        self.run_time.ended();
        // Either a thread that begins to fetch sees the gate closed, or it is counted here.
        fence(Ordering::SeqCst);
        // Threads that fetch find the gate closed; earlier ones need some microseconds.
        let idle = soon(|| (self.fetchers.load(Ordering::Acquire) == 0).then_some(()));
        idle.ok_or(HarvestError::Fetching)?;
        self.flat.truncate(self.trapped_len.load(Ordering::Relaxed));
        let taken = self.take_everything();
        self.trapped_len.store(self.flat.len(), Ordering::Relaxed);
        taken?;
        self.list_marked();
        self.written_len.store(self.flat.len(), Ordering::Relaxed);
        if let Some(hot) = &self.hot {
            // A page that leaves the set has not been armed yet: it may have changed as well.
            hot.cool(|gfn| self.to_arm.push(gfn));
            self.to_arm.for_each(|gfn| self.flat.push(gfn));
            self.first_hot.store(self.flat.len(), Ordering::Relaxed);
            self.flat.extend(hot.pages());
        }
        Ok(())
    }

    /// Trapped pages go to `flat`, marked ones to `marked`.
    fn take_everything(&self) -> Result<(), HarvestError> {
        for (vcpu, lane) in self.lanes().iter().enumerate() {
            let owner = soon(|| lane.own()).ok_or(HarvestError::Busy { vcpu })?;
            owner.drain(|gfn| self.flat.push(gfn));
            self.take_vcpu(vcpu, |gfn| {
                self.flat.push(gfn);
                true
            })?;
        }
        let _owner = self.shared.own().ok_or(HarvestError::Fetching)?;
        self.take_shared(|gfn| {
            self.flat.push(gfn);
            true
        })?;
        self.take_armed(true, |gfn| self.mark(gfn))?;
        let mut ignored = 0;
        self.global.drain(|gfn| if self.slots().contains(gfn) { self.mark(gfn) } else { ignored += 1 });
        add(&self.counters.ignored, ignored);
        if self.all.swap(false, Ordering::AcqRel) {
            for slot in self.slots().slots() {
                (slot.base.0..slot.end()).for_each(|gfn| self.mark(Gfn(gfn)));
            }
        }
        Ok(())
    }

    /// Lists a page that is dirty and armed.
    fn mark(&self, gfn: Gfn) {
        if self.seen.claim(gfn) {
            self.marked.push(gfn);
        } else {
            add(&self.counters.duplicates, 1);
        }
    }

    /// Adds the marked pages to the list, except those that are in it as trapped pages or will be as hot
    /// ones.
    fn list_marked(&self) {
        let mut repeated = 0;
        let any_unarmed = self.unarmed.load(Ordering::Relaxed) != 0;
        self.marked.for_each(|gfn| {
            if any_unarmed && self.trapped.peek(gfn) {
                repeated += 1;
            } else {
                self.flat.push(gfn);
            }
        });
        add(&self.counters.duplicates, repeated);
    }

    /// Takes a vCPU's entries. `keep` gets each page that became unarmed; false leaves the entry where it is.
    pub(super) fn take_vcpu(
        &self,
        vcpu: usize,
        mut keep: impl FnMut(Gfn) -> bool,
    ) -> Result<usize, HarvestError> {
        let mut count = Taken::default();
        let taken = self
            .source
            .take_vcpu(self.slots(), vcpu, &|gfn| self.trapped.prefetch(gfn), &mut |page| {
                count.page(self, page, &mut keep)
            })
            .map_err(|error| self.noted(error));
        count.note(self);
        self.lanes()[vcpu].count_traps(count.new + count.repeated as usize);
        taken
    }

    /// The same for the log that belongs to no vCPU, with a back end that leaves pages unarmed.
    pub(super) fn take_shared(&self, mut keep: impl FnMut(Gfn) -> bool) -> Result<usize, HarvestError> {
        let mut count = Taken::default();
        let taken = self.source.take_shared(self.slots(), &mut |page| count.page(self, page, &mut keep));
        // Pages that stay unarmed are in this log again each time: they are no duplicates.
        count.repeated = 0;
        count.note(self);
        self.found.fetch_add(count.new, Ordering::Relaxed);
        taken
    }

    /// The same for pages that are armed in the same step.
    pub(super) fn take_armed(&self, ending: bool, keep: impl Fn(Gfn)) -> Result<usize, HarvestError> {
        let mut ignored = 0;
        let taken = self.source.take_armed(self.slots(), ending, &mut |page| {
            match page {
                Some(gfn) => keep(gfn),
                None => ignored += 1,
            }
            true
        });
        add(&self.counters.ignored, ignored);
        taken
    }

    /// Arms trapped pages, except hot ones, and pages that are no longer hot.
    pub(crate) fn rearm(&self) -> Result<(), RearmError> {
        self.choose();
        self.arm()?;
        self.to_arm.clear();
        self.trapped_len.store(0, Ordering::Relaxed);
        self.rearmed.store(true, Ordering::Relaxed);
        self.gate.let_read();
        Ok(())
    }

    /// Trapped pages that are not hot are armed.
    fn choose(&self) {
        // SAFETY: only the holder of the epoch stores to the list, and that is this thread.
        let trapped = unsafe { &self.flat.slice()[..self.trapped_len.load(Ordering::Relaxed)] };
        let Some(hot) = self.heating_set() else {
            trapped.iter().for_each(|&gfn| self.to_arm.push(gfn));
            return;
        };
        for (index, &gfn) in trapped.iter().enumerate() {
            if let Some(&ahead) = trapped.get(index + AHEAD) {
                hot.prefetch(ahead);
            }
            if !hot.trapped(gfn) {
                self.to_arm.push(gfn);
            }
        }
    }

    fn arm(&self) -> Result<(), RearmError> {
        let pages = self.to_arm.len();
        let unarmed = self.unarmed.load(Ordering::Relaxed);
        // The bits go first: a write that is trapped after the page was armed must be listed again.
        if unarmed == pages {
            // Nothing else is unarmed, so whole words can be cleared.
            self.to_arm.for_each(|gfn| self.trapped.release_word(gfn));
        } else {
            self.to_arm.for_each(|gfn| _ = self.trapped.release(gfn));
        }
        self.unarmed.store(unarmed - pages, Ordering::Relaxed);
        let everything = self.doubtful.swap(false, Ordering::AcqRel);
        let plan = Plan { keep: unarmed - pages, room: self.room(), running: false, everything };
        // SAFETY: only the holder of the epoch stores to the list, and that is this thread.
        let pages = unsafe { self.to_arm.slice() };
        let armed = self.arm_all_of(pages, plan)?;
        add(&self.counters.full_rearms, armed.everything.into());
        if armed.first_page {
            self.slots().first_page().into_iter().for_each(|gfn| self.global.record(gfn));
        }
        Ok(())
    }

    /// Each unarmed page has cost an entry, which is held until the page is armed. So if there are not enough
    /// entries for all pages, somebody else gives entries back.
    pub(super) fn arm_all_of(&self, pages: &[Gfn], plan: Plan) -> Result<Armed, RearmError> {
        let armed = self.source.arm(self.slots(), pages, plan).and_then(|armed| match armed.pages {
            all if all == pages.len() => Ok(armed),
            some => Err(RearmError::Count { harvested: pages.len() as u64, reset: some as u64 }),
        });
        armed.map_err(|error| self.rearm_failed(error))
    }

    /// Nobody reads the pages after this.
    pub(crate) fn close(&self) {
        self.gate.end_reading();
    }

    /// Forgets the pages of the epoch, in O(their number), and begins the next one.
    pub(crate) fn begin(&self) {
        let pages = self.flat.len();
        self.marked.for_each(|gfn| self.seen.release_word(gfn));
        self.marked.clear();
        self.flat.clear();
        self.rearmed.store(false, Ordering::Relaxed);
        self.fetched.store(0, Ordering::Relaxed);
        let found = self.found.swap(0, Ordering::Relaxed);
        self.source.begin();
        if let Some(hot) = &self.hot {
            let listed = pages - self.first_hot.load(Ordering::Relaxed).min(pages);
            add(&self.counters.traps_avoided, (listed as u64).saturating_sub(hot.take_found()));
            hot.begin(self.most_traps(found), self.run_time.take());
        }
        self.run_time.begins();
        add(&self.counters.epochs, 1);
        add(&self.counters.pages, pages as u64);
        add(&self.counters.oversized, (pages > self.config.max_dirty_pages).into());
        self.warn_of_ignored();
    }

    /// How often the busiest vCPU was trapped in the epoch, where `found` traps are known of no vCPU: each then counts
    /// as having its share of them.
    pub(super) fn most_traps(&self, found: usize) -> u64 {
        let most = self.lanes().iter().map(|lane| lane.take_traps()).max().unwrap_or(0);
        (most + found / self.vcpus().max(1)) as u64
    }

    /// The epoch was dropped after its pages were armed: they are listed as marked pages, for the next
    /// harvest.
    pub(crate) fn take_back(&self) {
        if !self.rearmed.swap(false, Ordering::Relaxed) {
            return;
        }
        self.flat.for_each(|gfn| {
            // A page that is hot is reported again by itself.
            if !self.trapped.peek(gfn) && self.seen.claim(gfn) {
                self.marked.push(gfn);
            }
        });
        self.flat.clear();
    }

    /// Lets vCPU threads harvest again, after `begin` or when an epoch was dropped half way.
    pub(crate) fn reopen(&self) {
        if !self.gate.is_off() {
            self.gate.open();
        }
    }

    /// The pages of the epoch, and how many of them were written for certain; for [`crate::Epoch`].
    pub(crate) fn flat(&self) -> &Flat {
        &self.flat
    }

    pub(crate) fn written(&self) -> usize {
        self.written_len.load(Ordering::Relaxed)
    }

    /// Compares the hot pages of the epoch, with the number of its pages that come before them.
    pub(crate) fn comparison(&self) -> Option<(Comparison, usize)> {
        let hot = self.hot.as_ref()?;
        Some((hot.comparison(), self.first_hot.load(Ordering::Relaxed).min(self.flat.len())))
    }

    /// The page at this place of the list was compared and has not changed.
    pub(crate) fn unchanged(&self, index: usize) {
        let Some(hot) = &self.hot else { return };
        // The list ends with the hot pages, in the order of their set.
        let first = self.first_hot.load(Ordering::Relaxed);
        if (first..self.flat.len()).contains(&index) {
            hot.unchanged(index - first);
        }
    }
}

/// Waits, for about 100 µs at most, for something that another thread gives us: without sleep, and without
/// waiting for a thread that is not running.
pub(super) fn soon<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    (0..10_000).find_map(|_| {
        let found = look();
        if found.is_none() {
            std::hint::spin_loop();
        }
        found
    })
}

/// Pages whose history is on its way into the cache.
const AHEAD: usize = 8;

/// What happened to the entries of a log.
#[derive(Default)]
struct Taken {
    new: usize,
    repeated: u64,
    ignored: u64,
}

impl Taken {
    fn page(&mut self, tracker: &Tracker, page: Option<Gfn>, keep: &mut impl FnMut(Gfn) -> bool) -> bool {
        match page {
            None => self.ignored += 1,
            Some(gfn) if !tracker.trapped.claim(gfn) => self.repeated += 1,
            Some(gfn) if keep(gfn) => self.new += 1,
            Some(gfn) => {
                tracker.trapped.release(gfn);
                return false;
            }
        }
        true
    }

    fn note(&self, tracker: &Tracker) {
        tracker.unarmed.fetch_add(self.new, Ordering::AcqRel);
        add(&tracker.counters.duplicates, self.repeated);
        add(&tracker.counters.ignored, self.ignored);
    }
}
