//! Memory slots that come and go while tracking is on.
// UNSAFETY: the layout is changed in place, at moments when nobody reads it; see `SlotTable`.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Mutex, PoisonError};

use super::cycle::soon;
use super::{Token, Tracker};
use crate::backend::DirtyKind;
use crate::lane::Owner;
use crate::layout::{Gfn, LayoutError, MemoryLayout, MemorySlot};

/// What the caller knows about the memory of a new slot: [`Tracker::add_slot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotStart {
    /// Every page of it is reported, by the next epoch at the latest. Right for any contents.
    Dirty,
    /// A page is reported only when it is written after the call. The caller copies the contents that the
    /// slot has when the call returns, or the other side knows them (zeros, say). A write that overlaps the
    /// call may be reported or not; the caller's copy has it.
    Clean,
}

/// Why slots and vCPUs cannot come or go now. Nothing has changed: try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrackerBusy {
    /// An epoch is open, or another thread enables or disables tracking, adds or removes a slot, adds a vCPU
    /// or lets hot pages [age](Tracker::age) at this moment.
    #[error("an epoch is open, or another call excludes epochs: try again after it")]
    EpochOpen,
    /// Threads hold fetched pages that they have not re-armed.
    #[error("fetched pages are not re-armed yet: try again")]
    Fetching,
    /// The thread of this vCPU is harvesting.
    #[error("vCPU {0} is being harvested: try again")]
    Harvesting(usize),
}

/// Why a slot was not added. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddSlotError {
    /// Not now.
    #[error(transparent)]
    Busy(#[from] TrackerBusy),
    /// There are as many slots as [`crate::TrackerConfig::max_slots`] allows.
    #[error("there are {0} memory slots, and that is the most that was configured (max_slots)")]
    Full(usize),
    /// The global list does not cover the slot: make it for the highest address that the VM may ever have.
    #[error("memory slot {slot} ends at page {end:#x}, and the global list covers {covered:#x} pages")]
    GlobalLogSize {
        /// The slot number.
        slot: u32,
        /// The first page after the slot.
        end: u64,
        /// The frame numbers that the global list covers.
        covered: u64,
    },
    /// It does not fit the other slots.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// KVM_SET_USER_MEMORY_REGION failed: the slot may not be in the VM as described.
    #[error("cannot turn on the dirty log of memory slot {slot}")]
    Protect {
        /// The slot number.
        slot: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// Memory without KVM ([`DirtyKind::Uffd`]) keeps its first slots.
    #[error("this back end ({0}) cannot take further memory slots")]
    Unsupported(DirtyKind),
}

/// Why a slot was not removed. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveSlotError {
    /// Not now.
    #[error(transparent)]
    Busy(#[from] TrackerBusy),
    /// The layout has no slot of this number.
    #[error("there is no memory slot {0}")]
    Unknown(u32),
    /// Memory without KVM ([`DirtyKind::Uffd`]) keeps its first slots.
    #[error("this back end ({0}) cannot give memory slots up")]
    Unsupported(DirtyKind),
}

/// The present layout.
///
/// Rule: a reader holds the token, or owns a list and has found the gate open since, or is counted among the
/// fetchers and has found the gate open since. Changes are made under [`Quiet`], which excludes all of these.
/// Others get a copy, under the lock.
pub(super) struct SlotTable {
    now: UnsafeCell<MemoryLayout>,
    change: Mutex<()>,
}

// SAFETY: read by many and changed by nobody else meanwhile, by the rule above.
unsafe impl Sync for SlotTable {}

impl SlotTable {
    pub(super) fn new(layout: MemoryLayout) -> SlotTable {
        SlotTable { now: UnsafeCell::new(layout), change: Mutex::new(()) }
    }

    pub(super) fn copy(&self) -> MemoryLayout {
        let _unchanged = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: it is changed under this lock only.
        unsafe { &*self.now.get() }.clone()
    }

    /// # Safety
    /// The rule of this type.
    pub(super) unsafe fn now(&self) -> &MemoryLayout {
        // SAFETY: nobody changes it, by the rule.
        unsafe { &*self.now.get() }
    }

    fn change(&self, _quiet: &Quiet<'_>, mut layout: MemoryLayout) {
        let unchanged = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody reads it: neither by the rule, as this is in the quiet, nor under the lock.
        std::mem::swap(unsafe { &mut *self.now.get() }, &mut layout);
        // The old one is freed without the lock.
        drop(unchanged);
    }
}

/// While it lives, nobody harvests, fetches, re-arms or ends an epoch.
struct Quiet<'t> {
    owners: Vec<Owner<'t>>,
    token: Token<'t>,
    was_on: bool,
}

impl<'t> Quiet<'t> {
    fn of(tracker: &'t Tracker) -> Result<Quiet<'t>, TrackerBusy> {
        let token = Token::take(tracker).ok_or(TrackerBusy::EpochOpen)?;
        let was_on = !tracker.gate.is_off();
        let mut quiet = Quiet { owners: Vec::new(), token, was_on };
        if was_on {
            tracker.gate.close();
        }
        // Either a thread that begins to fetch sees the gate closed, or it is counted here.
        fence(Ordering::SeqCst);
        soon(|| (tracker.fetchers.load(Ordering::Acquire) == 0).then_some(()))
            .ok_or(TrackerBusy::Fetching)?;
        for (vcpu, lane) in tracker.lanes().iter().enumerate() {
            quiet.owners.push(soon(|| lane.own()).ok_or(TrackerBusy::Harvesting(vcpu))?);
        }
        for lane in [&tracker.shared, &tracker.heating] {
            quiet.owners.push(soon(|| lane.own()).ok_or(TrackerBusy::Fetching)?);
        }
        Ok(quiet)
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.owners.clear();
        if self.was_on {
            self.token.tracker.gate.open();
        }
    }
}

impl Tracker {
    /// The layout, for callers that may read it: see [`SlotTable`].
    pub(super) fn slots(&self) -> &MemoryLayout {
        // SAFETY: every caller holds the token, or owns a list or is counted as a fetcher and has found the gate
        // open since; the borrow does not outlive that.
        unsafe { self.slots.now() }
    }

    /// Call this when the VMM has made a memory slot (memory hotplug, virtio-mem): it is tracked from now on.
    /// The guest may run, and may have written the slot already; whether its dirty log was on makes no
    /// difference.
    ///
    /// **The contents of the slot** when this returns are either reported ([`SlotStart::Dirty`], the choice
    /// that cannot lose anything) or the caller's to copy ([`SlotStart::Clean`]). From then on every write is
    /// reported, as in any other slot.
    ///
    /// This takes memory and some milliseconds a GiB (KVM write-protects the slot). Meanwhile no epoch can
    /// begin and fetches of bitmaps find nothing; vCPU threads can harvest, except for a moment in which they
    /// may get [`crate::HarvestError::Busy`]. Call it in a thread that may wait, not in the pause.
    /// [`crate::TrackerConfig::max_slots`] limits the number of slots.
    ///
    /// # Errors
    /// [`AddSlotError`]: nothing has changed, and nothing of the slot is tracked.
    ///
    /// # Safety
    /// As for [`Tracker::new`]: the slot is in this VM, with this number, base and size and with the memory at
    /// its host address, which stays mapped, until the tracker is dropped or [`Tracker::remove_slot`] has
    /// returned.
    pub unsafe fn add_slot(&self, slot: MemorySlot, start: SlotStart) -> Result<(), AddSlotError> {
        if self.kind == DirtyKind::Uffd {
            return Err(AddSlotError::Unsupported(self.kind));
        }
        let mut quiet = Quiet::of(self)?;
        let layout = self.slots().with_slot(slot)?;
        if layout.slots().len() > self.config.max_slots {
            return Err(AddSlotError::Full(layout.slots().len() - 1));
        }
        if slot.end() > self.global.gfn_space() {
            let covered = self.global.gfn_space();
            return Err(AddSlotError::GlobalLogSize { slot: slot.id, end: slot.end(), covered });
        }
        if !quiet.was_on {
            // `enable` does the rest.
            self.slots.change(&quiet, layout);
            return Ok(());
        }
        [&self.trapped, &self.seen].into_iter().for_each(|bits| bits.populate(&slot));
        self.global.populate(&slot);
        self.source.populate(layout.largest());
        // First: an entry of the slot that KVM logs once its log is on must be recognised.
        self.slots.change(&quiet, layout);
        if let Err(source) = self.arm_slot(&mut quiet, &slot) {
            self.slots.change(&quiet, self.slots().without(slot.id));
            self.forget(&quiet, &slot);
            return Err(AddSlotError::Protect { slot: slot.id, source });
        }
        if start == SlotStart::Dirty {
            // After its log is on: a write is now either in memory, and these marks report it, or is trapped.
            (slot.base.0..slot.end()).for_each(|gfn| self.global.record(Gfn(gfn)));
        }
        Ok(())
    }

    /// Turns the log of a new slot on, while vCPU threads harvest and rings are fetched, because it takes
    /// long.
    fn arm_slot<'t>(&'t self, quiet: &mut Quiet<'t>, slot: &MemorySlot) -> io::Result<()> {
        // The last two lists are kept: while the slot is in the layout and its log is not on yet, entries of
        // no vCPU are not fetched, and nothing heats.
        let vcpus = quiet.owners.len() - 2;
        quiet.owners.drain(..vcpus);
        self.gate.open();
        let armed = self.source.arm_slot(slot);
        if armed.is_err() {
            // Rare, and may take as long as a fetching thread needs.
            self.gate.close();
            fence(Ordering::SeqCst);
            while self.fetchers.load(Ordering::Acquire) != 0 {
                std::thread::yield_now();
            }
            for lane in self.lanes() {
                let owner = loop {
                    match lane.own() {
                        Some(owner) => break owner,
                        None => std::thread::yield_now(),
                    }
                };
                quiet.owners.push(owner);
            }
        }
        armed
    }

    /// Call this before the VMM removes a memory slot from the VM; **when it has returned, remove the slot
    /// from KVM**. Pages of the slot that were logged and not reported are forgotten: no page of it is listed
    /// any more, including hot ones. The log of the slot is never turned on or off again. Another slot may use
    /// the number.
    ///
    /// Entries of the slot that KVM has written to a ring, or still writes, are skipped
    /// ([`crate::TrackerStats::ignored`]); KVM skips them too when they are given back
    /// (virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn: the slot does not exist, or is smaller). If a slot of the
    /// same number is added, some of its pages may be reported because of such entries although nobody wrote
    /// them.
    ///
    /// The other order breaks the promise of [`Tracker::new`]: turning tracking on or off in between, or
    /// dropping the tracker, would make the slot again at its old host address. Until this is called, a harvest
    /// or a fetch of a bitmap fails with [`crate::HarvestError::GetDirtyLog`]; nothing is lost by that.
    ///
    /// # Errors
    /// [`RemoveSlotError`]: nothing has changed, and the slot's memory must stay where it is.
    pub fn remove_slot(&self, id: u32) -> Result<(), RemoveSlotError> {
        if self.kind == DirtyKind::Uffd {
            return Err(RemoveSlotError::Unsupported(self.kind));
        }
        let quiet = Quiet::of(self)?;
        let slot = *self.slots().slot(id).ok_or(RemoveSlotError::Unknown(id))?;
        self.slots.change(&quiet, self.slots().without(id));
        self.forget(&quiet, &slot);
        Ok(())
    }

    /// Forgets everything known about the pages of a slot.
    fn forget(&self, quiet: &Quiet<'_>, slot: &MemorySlot) {
        let is_left = |gfn| !slot.holds(gfn);
        quiet.owners.iter().for_each(|owner| owner.retain(is_left));
        let trapped = self.flat.retain(self.trapped_len.load(Ordering::Relaxed), is_left);
        self.trapped_len.store(trapped, Ordering::Relaxed);
        [&self.marked, &self.to_arm].into_iter().for_each(|list| _ = list.retain(0, is_left));
        if let Some(hot) = &self.hot {
            hot.retain(is_left);
        }
        // Their entries become spare ones, which the next re-arm gives back.
        self.unarmed.fetch_sub(self.trapped.release_slot(slot), Ordering::AcqRel);
        self.seen.release_slot(slot);
        self.global.forget(slot);
    }
}
