//! The dirty rings of all vCPUs, and the entries given back to KVM at a re-arm.
//!
//! An entry that was taken is held until something is armed with it. The number of held entries follows from
//! the unarmed pages: each unarmed page has cost an entry, so there is one for each (pages dirtied by two
//! vCPUs have cost two). Pages that are left out of a re-arm, because they are hot, leave their entries
//! behind, and those are there when the pages cool. Entries beyond that are given back without a page.
//!
//! Held entries also make a ring smaller; this is how vCPUs are stopped at an exact number of pages: see
//! `budget.rs`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::kvm::{Kernel, SignalsBlocked};
use crate::layout::{Gfn, MemoryLayout, MemorySlot};
use crate::mint::ENTRIES_PER_WRITE;
use crate::report;
use crate::source::budget::Budget;
use crate::source::log::DirtyLog;
use crate::source::ring::{Fullness, Ring};
use crate::source::{Armed, HarvestError, Hint, Plan, RearmError, Sink, SlotError, Source};

/// This many resets in a row may free nothing. Signals are blocked; a debugger or the freezer can still
/// interrupt.
const MAX_IDLE_RESETS: u32 = 10_000;

/// One dirty ring a vCPU.
pub(crate) struct Rings {
    kernel: Arc<dyn Kernel>,
    /// A place for each vCPU that the VM may have.
    rings: Box<[OnceLock<Ring>]>,
    /// Places that are taken.
    count: AtomicUsize,
    /// vCPUs that no longer run have no part of a trigger.
    parked: Box<[AtomicBool]>,
    /// The bitmap of KVM's writes without a vCPU, on architectures whose KVM makes such writes
    /// (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, arm64: the tables of the interrupt controller).
    backup: Option<DirtyLog>,
    /// Held by the thread that gives entries back and resets, one at a time. Nobody waits for it in a pause:
    /// vCPUs are stopped.
    resetting: Mutex<Budget>,
    /// Only tests leave signals unblocked, to see their effect.
    pub(crate) block_signals: bool,
}

impl Rings {
    /// `most`: the most vCPUs that the VM may have, no fewer than there are rings.
    pub(crate) fn new(kernel: Arc<dyn Kernel>, rings: Vec<Ring>, most: usize) -> Rings {
        let (count, budget) = (rings.len(), Budget::new(rings.len()));
        let places = rings.into_iter().map(OnceLock::from).chain(std::iter::repeat_with(OnceLock::new));
        Rings {
            kernel,
            rings: places.take(most.max(count)).collect(),
            count: AtomicUsize::new(count),
            parked: (0..most.max(count)).map(|_| AtomicBool::new(false)).collect(),
            backup: None,
            resetting: Mutex::new(budget),
            block_signals: true,
        }
    }

    /// With a bitmap beside the rings, which the VM has been given, for slots of this many pages.
    pub(crate) fn with_backup(mut self, largest: u64) -> io::Result<Rings> {
        self.backup = Some(DirtyLog::reserve(self.kernel.clone(), largest)?);
        Ok(self)
    }

    fn rings(&self) -> impl Iterator<Item = &Ring> {
        self.rings[..self.count.load(Ordering::Acquire)].iter().filter_map(OnceLock::get)
    }

    /// # Panics
    /// If there is no such vCPU.
    fn ring(&self, vcpu: usize) -> &Ring {
        self.rings[vcpu].get().expect("no such vCPU")
    }

    /// vCPUs that are not parked.
    fn running(&self) -> usize {
        let there = &self.parked[..self.count.load(Ordering::Relaxed)];
        there.iter().filter(|parked| !parked.load(Ordering::Relaxed)).count()
    }

    fn held(&self) -> u64 {
        self.rings().map(Ring::held).sum()
    }

    /// Gives `count` entries back, filled with the pages as long as there are any: first from rings that hold
    /// more than their share, then from all, in proportion. A ring that holds the most has the least room for
    /// its vCPU.
    fn give_back(&self, layout: &MemoryLayout, pages: &[Gfn], count: u64, share: impl Fn(usize) -> u64) {
        let mut pages = pages.iter();
        let mut left = count;
        let mut give = |ring: &Ring, now: u64| {
            ring.give_back(now, || pages.next().and_then(|&gfn| layout.locate(gfn)));
        };
        for (vcpu, ring) in self.rings().enumerate() {
            let now = ring.held().saturating_sub(share(vcpu)).min(left);
            give(ring, now);
            left -= now;
        }
        // Threads that harvest take more meanwhile, never less.
        let mut held = self.held();
        for ring in self.rings() {
            let here = ring.held();
            let part = (u128::from(left) * u128::from(here)).div_ceil(u128::from(held.max(1))) as u64;
            let now = part.min(left).min(here);
            give(ring, now);
            (left, held) = (left - now, held.saturating_sub(here));
        }
        for ring in self.rings() {
            let now = ring.held().min(left);
            give(ring, now);
            left -= now;
        }
    }

    /// Returns whether KVM was interrupted on the way.
    fn reset(&self, marked: u64) -> Result<bool, RearmError> {
        let _blocked = self.block_signals.then(SignalsBlocked::now);
        let (mut reset, mut interrupted, mut idle) = (0, false, 0);
        while reset < marked {
            match self.kernel.reset_dirty_rings() {
                Ok(0) => idle += 1,
                Ok(some) => (reset, idle) = (reset + some, 0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => idle += 1,
                Err(error) => return Err(RearmError::Reset(error)),
            }
            interrupted |= reset < marked;
            if idle > MAX_IDLE_RESETS {
                break;
            }
        }
        if reset != marked {
            return Err(RearmError::Count { harvested: marked, reset });
        }
        self.rings().for_each(Ring::all_freed);
        Ok(interrupted)
    }

    /// Write-protects all of memory by turning logging off and on: about 5 ms a GiB, for the rare case that
    /// KVM may have freed entries without protecting their pages. The vCPUs are stopped.
    fn protect_all(&self, layout: &MemoryLayout) -> Result<(), RearmError> {
        for slot in layout.slots() {
            let toggled =
                self.kernel.set_logging(slot, false).and_then(|()| self.kernel.set_logging(slot, true));
            toggled.map_err(|source| RearmError::Protect { slot: slot.id, source })?;
        }
        Ok(())
    }

    /// Makes every ring hold its share: mints missing entries and gives surplus ones back.
    fn settle(&self, layout: &MemoryLayout, budget: &Budget, keep: u64) -> Result<Settled, RearmError> {
        let mut settled = Settled::default();
        let mut surplus = 0;
        for (vcpu, ring) in self.rings().enumerate() {
            let share = budget.share(ring.soft_limit());
            if ring.held() < share {
                self.fill(layout, vcpu, share, &mut settled);
            }
            let extra = ring.held().saturating_sub(share).min(self.held().saturating_sub(keep));
            ring.give_back(extra, || None);
            surplus += extra;
        }
        self.reset(surplus)?;
        Ok(settled)
    }

    /// Mints entries until the ring holds its share. Entries that KVM logged for anybody else since the
    /// harvest belong to the next epoch and stay; then there are fewer than the share this time.
    fn fill(&self, layout: &MemoryLayout, vcpu: usize, share: u64, settled: &mut Settled) {
        let ring = self.ring(vcpu);
        if ring.has_new() {
            return;
        }
        let missing = share - ring.held();
        if let Err(error) = self.kernel.mint(vcpu, missing, layout) {
            report::debug(format_args!("no ring entries can be minted: {error}"));
            settled.failed = true;
            return;
        }
        let page = layout.first_page();
        let minted = ring.take(|_, _| (), |slot, offset| layout.resolve(slot, offset) == page);
        // More entries than were minted: KVM wrote that page for somebody else, too.
        let expected = missing.div_ceil(ENTRIES_PER_WRITE) * ENTRIES_PER_WRITE;
        settled.doubtful |= minted.as_ref().is_ok_and(|&minted| minted as u64 > expected);
        if ring.held() < share && !ring.has_new() {
            let held = ring.held();
            report::debug(format_args!(
                "not enough ring entries were minted: {minted:?} of {missing}, {held} held, {share} wanted"
            ));
            settled.failed = true;
        }
    }
}

/// The result of a settlement.
#[derive(Default)]
struct Settled {
    /// A write to the first page of the layout may have gone unnoticed.
    doubtful: bool,
    /// KVM mints nothing here.
    failed: bool,
}

impl Source for Rings {
    fn populate(&self, largest: u64) {
        self.backup.iter().for_each(|backup| backup.populate(largest));
    }

    fn arm_slot(&self, slot: &MemorySlot) -> io::Result<()> {
        super::turn_on(&*self.kernel, slot)
    }

    fn owner_of(&self, ring: &Ring) -> Option<usize> {
        self.rings().position(|other| ring.is_same(other))
    }

    fn admit(&self, ring: Option<Ring>, vcpu: Option<OwnedFd>) {
        let mut budget = self.resetting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.count.load(Ordering::Relaxed);
        let Some((ring, place)) = ring.zip(self.rings.get(count)) else { return };
        place.set(ring).ok();
        if let Some(vcpu) = vcpu {
            self.kernel.admit(vcpu);
        }
        self.count.store(count + 1, Ordering::Release);
        budget.set_vcpus(self.running());
    }

    fn park(&self, vcpu: usize, parked: bool) {
        let mut budget = self.resetting.lock().unwrap_or_else(PoisonError::into_inner);
        self.parked[vcpu].store(parked, Ordering::Relaxed);
        budget.set_vcpus(self.running());
    }

    fn arm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        // With KVM_DIRTY_LOG_INITIALLY_SET KVM would write-protect nothing here and a ring would lose the
        // first write to every page, and KVM does not refuse the combination. A ring has no use for manual
        // protection, so it is turned off.
        self.kernel.refuse_manual_protect();
        super::set_logging(&*self.kernel, layout, true)
    }

    fn disarm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        super::set_logging(&*self.kernel, layout, false)
    }

    fn take_vcpu(
        &self,
        layout: &MemoryLayout,
        vcpu: usize,
        hint: Hint<'_>,
        sink: Sink<'_>,
    ) -> Result<usize, HarvestError> {
        let taken = self.ring(vcpu).take(
            |slot, offset| _ = layout.resolve(slot, offset).map(hint),
            |slot, offset| sink(layout.resolve(slot, offset)),
        );
        taken.map_err(|_| HarvestError::Overrun { vcpu })
    }

    fn take_armed(&self, layout: &MemoryLayout, ending: bool, sink: Sink<'_>) -> Result<usize, HarvestError> {
        // The bitmap beside the rings is searched whole for a few pages, and the kernel requires that this
        // comes last.
        match &self.backup {
            Some(backup) if ending => backup.read(layout, sink),
            _ => Ok(0),
        }
    }

    fn arm(&self, layout: &MemoryLayout, pages: &[Gfn], plan: Plan) -> Result<Armed, RearmError> {
        let mut budget = self.resetting.lock().unwrap_or_else(PoisonError::into_inner);
        if !plan.running {
            // A credit for each unarmed page stays, whatever is granted.
            let room: u64 = self.rings().map(Ring::soft_limit).sum();
            budget.plan(plan.room, room.saturating_sub(plan.keep as u64));
        }
        let held = self.held();
        let armed = held.min(pages.len() as u64);
        // A thread that arms while vCPUs run does not know what others have taken.
        let keep = if plan.running {
            held
        } else {
            let shares: u64 = self.rings().map(|ring| budget.share(ring.soft_limit())).sum();
            shares.max(plan.keep as u64)
        };
        let count = armed.max(held.saturating_sub(keep));
        let even = plan.keep as u64 / self.rings().count().max(1) as u64;
        self.give_back(layout, &pages[..armed as usize], count, |vcpu| {
            budget.share(self.ring(vcpu).soft_limit()).max(if plan.running { 0 } else { even })
        });
        let interrupted = self.reset(count)?;
        // An interrupted reset skips the pages of its entries, if they had any.
        let everything = !plan.running && (interrupted && armed > 0 || plan.everything);
        if everything {
            self.protect_all(layout)?;
        }
        let mut first_page = false;
        if !plan.running && budget.is_on() {
            let settled = self.settle(layout, &budget, plan.keep as u64)?;
            first_page = settled.doubtful;
            if settled.failed {
                report::warn(format_args!(
                    "KVM writes no wall clock here: the dirty trigger is checked between exits only"
                ));
                budget.give_up();
            }
        }
        Ok(Armed { pages: armed as usize, everything, doubtful: plan.running && interrupted, first_page })
    }

    fn pending(&self) -> usize {
        self.rings().map(Ring::pending).sum()
    }

    fn counts(&self) -> bool {
        true
    }

    fn has_room(&self, vcpu: usize) -> bool {
        self.ring(vcpu).has_room()
    }

    fn fullness(&self, vcpu: usize) -> Fullness {
        self.ring(vcpu).fullness()
    }

    fn top_up(&self, vcpu: usize) -> Result<bool, RearmError> {
        let mut budget = self.resetting.lock().unwrap_or_else(PoisonError::into_inner);
        let granted = budget.grant(self.ring(vcpu).held());
        if granted == 0 {
            return Ok(false);
        }
        self.ring(vcpu).give_back(granted, || None);
        self.reset(granted)?;
        Ok(true)
    }

    fn credits(&self) -> u64 {
        self.held()
    }

    fn is_exact(&self) -> bool {
        self.resetting.lock().unwrap_or_else(PoisonError::into_inner).is_on()
    }

    fn begin(&self) {
        self.rings().for_each(Ring::begin);
    }
}
