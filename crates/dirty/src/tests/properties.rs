//! Random schedules over a naive kernel: the tracker reports exactly the pages that were written.
// UNSAFETY: tells a tracker of slots; the kernel here looks at no memory.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;

use super::kernel::FakeKernel;
use crate::{
    AddSlotError, AddVcpuError, DirtyKind, Fetch, Gfn, GlobalLog, HarvestError, HotPages, HotRule,
    MemoryLayout, MemorySlot, RemoveSlotError, RingExit, SlotStart, Tracker, TrackerConfig,
};

#[derive(Clone, Debug)]
enum Step {
    /// A vCPU writes pages from this one on.
    Write {
        vcpu: Index,
        page: Index,
        pages: u64,
        again: bool,
    },
    /// A device writes pages from this one on.
    Mark {
        page: Index,
        pages: u64,
    },
    HarvestVcpu(Index),
    /// Takes pages while the guest runs.
    Fetch {
        room: usize,
        rearm: bool,
        keep: bool,
    },
    /// KVM logs an entry that is no page of the layout.
    Nonsense {
        vcpu: Index,
        slot: u32,
        offset: u64,
    },
    AllDirty,
    /// The VMM makes a slot; the guest writes some of it before the tracker knows it.
    AddSlot {
        place: Index,
        pages: u64,
        logged: bool,
        early: u64,
        start: SlotStart,
    },
    /// The VMM removes a slot, and tells the tracker before or after.
    RemoveSlot {
        slot: Index,
        before: bool,
    },
    AddVcpu,
    Park(Index, bool),
    /// Ends the epoch; with a number, drops it after this many steps.
    Epoch {
        drop_after: Option<u8>,
        interrupt_after: Option<u64>,
        fail_log_after: Option<u32>,
    },
    OffAndOn,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let index = any::<Index>;
    let step = prop_oneof![
        12 => (index(), index(), 1..40u64, any::<bool>())
            .prop_map(|(vcpu, page, pages, again)| Step::Write { vcpu, page, pages, again }),
        4 => (index(), 1..12u64).prop_map(|(page, pages)| Step::Mark { page, pages }),
        4 => index().prop_map(Step::HarvestVcpu),
        3 => (0..40usize, any::<bool>(), proptest::bool::weighted(0.8))
            .prop_map(|(room, rearm, keep)| Step::Fetch { room, rearm, keep }),
        1 => (index(), prop_oneof![Just(0), Just(77), Just(0xffff), Just(1 << 16)], 1u64 << 20..)
            .prop_map(|(vcpu, slot, offset)| Step::Nonsense { vcpu, slot, offset }),
        1 => Just(Step::AllDirty),
        2 => (index(), 1..80u64, any::<bool>(), 0..20u64, any::<bool>()).prop_map(
            |(place, pages, logged, early, dirty)| {
                let start = if dirty { SlotStart::Dirty } else { SlotStart::Clean };
                Step::AddSlot { place, pages, logged, early, start }
            }
        ),
        2 => (index(), any::<bool>()).prop_map(|(slot, before)| Step::RemoveSlot { slot, before }),
        1 => Just(Step::AddVcpu),
        1 => (index(), any::<bool>()).prop_map(|(vcpu, parked)| Step::Park(vcpu, parked)),
        6 => (
            proptest::option::weighted(0.3, 0..5u8),
            proptest::option::weighted(0.2, 0..100u64),
            proptest::option::weighted(0.1, 0..3u32)
        )
            .prop_map(|(drop_after, interrupt_after, fail_log_after)| {
                Step::Epoch { drop_after, interrupt_after, fail_log_after }
            }),
        1 => Just(Step::OffAndOn),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Up to three slots with gaps between them, numbered in some order.
fn layouts() -> impl Strategy<Value = MemoryLayout> {
    let slot = (0..100u64, 1..300u64);
    (proptest::collection::vec(slot, 1..4), any::<bool>()).prop_map(|(sizes, backwards)| {
        let mut base = 0;
        let mut slots = Vec::new();
        for (number, (gap, pages)) in sizes.into_iter().enumerate() {
            base += gap;
            let id = if backwards { 40 - number as u32 } else { number as u32 };
            slots.push(MemorySlot { id, base: Gfn(base), pages, host_addr: 0x10_0000 });
            base += pages;
        }
        MemoryLayout::new(slots).unwrap()
    })
}

#[derive(Clone, Debug)]
struct Setting {
    layout: MemoryLayout,
    kind: DirtyKind,
    /// vCPUs at the beginning.
    vcpus: usize,
    config: TrackerConfig,
    ring_entries: u32,
    global_capacity: usize,
}

const MOST_VCPUS: usize = 5;
const MOST_SLOTS: usize = 6;
/// Frame numbers of the VM: the most that three slots take, and as much again.
const SPACE: u64 = 2400;

/// Rules under which pages become hot soon and cool soon.
fn hot() -> impl Strategy<Value = HotPages> {
    let rule =
        (1..6u32, 1..4u32, 1..12u32, 1..60usize).prop_map(|(max_gap, traps, probe_after, max_pages)| {
            HotPages::Rule(HotRule { max_gap, traps, probe_after, max_pages, trap_ns: 0 })
        });
    prop_oneof![Just(HotPages::Off), rule]
}

/// Capacities so small that every limit is hit.
fn settings() -> impl Strategy<Value = Setting> {
    let kind =
        prop_oneof![2 => Just(DirtyKind::Ring), 1 => Just(DirtyKind::ClearLog), 1 => Just(DirtyKind::Bitmap)];
    (layouts(), kind, 1..4usize, 1..60usize, 6..9u32, 0..20usize, any::<bool>(), hot()).prop_map(
        |(layout, kind, vcpus, max_dirty_pages, ring_bits, global_capacity, exact, hot)| Setting {
            layout,
            kind,
            vcpus,
            config: TrackerConfig {
                max_vcpus: MOST_VCPUS,
                max_slots: MOST_SLOTS,
                max_dirty_pages,
                trigger: max_dirty_pages.div_ceil(2),
                exact,
                hot,
            },
            ring_entries: 1 << ring_bits,
            global_capacity,
        },
    )
}

/// The VM, the tracker, and the expected reports of the tracker.
struct World {
    setting: Setting,
    kernel: FakeKernel,
    tracker: Tracker,
    global: Arc<GlobalLog>,
    /// Written and not reported yet.
    written: BTreeSet<Gfn>,
    /// Written in this epoch.
    of_epoch: BTreeSet<Gfn>,
    /// Hot in an epoch that was dropped after its pages were armed: they are reported as written.
    maybe: BTreeSet<Gfn>,
    nonsense: u64,
    /// For each vCPU, whether it is parked.
    parked: Vec<bool>,
    /// Then the next harvest reports every page.
    all: bool,
    /// Slots were added.
    added: bool,
}

impl World {
    fn new(setting: Setting) -> World {
        let global = GlobalLog::new(SPACE, setting.global_capacity);
        let Setting { layout, config, kind, ring_entries, vcpus, .. } = setting.clone();
        let (kernel, tracker) =
            FakeKernel::tracker_of(layout, config, kind, ring_entries, global.clone(), vcpus).unwrap();
        tracker.enable_stopped().unwrap();
        let (written, of_epoch, maybe) = Default::default();
        World {
            setting,
            kernel,
            tracker,
            global,
            written,
            of_epoch,
            maybe,
            nonsense: 0,
            parked: vec![false; vcpus],
            all: false,
            added: false,
        }
    }

    fn pages_from(&self, page: Index, pages: u64) -> Vec<Gfn> {
        let all: Vec<_> = self.all_pages().collect();
        let first = page.index(all.len().max(1));
        all.into_iter().skip(first).take(pages as usize).collect()
    }

    fn all_pages(&self) -> impl Iterator<Item = Gfn> {
        let slots = self.tracker.layout().slots().to_vec();
        slots.into_iter().flat_map(|slot| (slot.base.0..slot.base.0 + slot.pages).map(Gfn))
    }

    fn vcpu(&self, vcpu: Index) -> usize {
        vcpu.index(self.parked.len())
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Write { vcpu, page, pages, again } => {
                let vcpu = self.vcpu(vcpu);
                if self.parked[vcpu] {
                    return Ok(());
                }
                for gfn in self.pages_from(page, pages) {
                    if !self.kernel.can_run(vcpu) {
                        let exit = self.tracker.ring_full(vcpu);
                        // A ring of these sizes may be smaller than its reserve: then KVM's report cannot be
                        // checked.
                        prop_assert!(exit.is_ok(), "{:?}", exit);
                        if exit.unwrap() == RingExit::DirtyLogFull {
                            break;
                        }
                    }
                    if self.kernel.can_run(vcpu) {
                        self.kernel.write(vcpu, gfn, again);
                        self.wrote(gfn);
                    }
                }
            }
            Step::Mark { page, pages } => {
                for gfn in self.pages_from(page, pages) {
                    self.global.mark_range(gfn.gpa() + 4095, 1);
                    self.wrote(gfn);
                }
            }
            Step::HarvestVcpu(vcpu) => drop(self.tracker.harvest_vcpu(self.vcpu(vcpu)).unwrap()),
            Step::Fetch { room, rearm, keep } => self.fetch(room, rearm, keep)?,
            Step::Nonsense { vcpu, slot, offset } => {
                let vcpu = self.vcpu(vcpu);
                if self.kernel.can_run(vcpu) && self.setting.kind == DirtyKind::Ring {
                    self.kernel.write_nonsense(vcpu, slot, offset);
                    self.nonsense += 1;
                }
            }
            Step::AllDirty => {
                self.tracker.all_dirty();
                self.all = true;
                self.written = self.all_pages().collect();
                self.of_epoch = self.written.clone();
            }
            Step::AddSlot { place, pages, logged, early, start } => {
                self.add_slot(place, pages, logged, early, start)?;
            }
            Step::RemoveSlot { slot, before } => self.remove_slot(slot, before)?,
            Step::AddVcpu => self.add_vcpu()?,
            Step::Park(vcpu, parked) => {
                let vcpu = self.vcpu(vcpu);
                if parked {
                    self.tracker.park_vcpu(vcpu)
                } else {
                    self.tracker.unpark_vcpu(vcpu)
                }
                self.parked[vcpu] = parked;
            }
            Step::Epoch { drop_after, interrupt_after, fail_log_after } => {
                self.kernel.state().interrupt_after = interrupt_after;
                self.kernel.state().fail_log_after = fail_log_after;
                self.epoch(drop_after.unwrap_or(u8::MAX))?;
                self.kernel.state().interrupt_after = None;
                self.kernel.state().fail_log_after = None;
            }
            Step::OffAndOn => {
                self.tracker.disable().unwrap();
                self.global.mark(Gfn(0));
                prop_assert_eq!(self.tracker.harvest_vcpu(0).unwrap(), 0);
                self.tracker.enable_stopped().unwrap();
                self.written.clear();
                self.of_epoch.clear();
                self.maybe.clear();
            }
        }
        Ok(())
    }

    fn add_slot(
        &mut self,
        place: Index,
        pages: u64,
        logged: bool,
        early: u64,
        start: SlotStart,
    ) -> Result<(), TestCaseError> {
        // In the first hole from there on, and with the first free number, which an earlier slot may have
        // had.
        let layout = self.tracker.layout();
        let is_free = |base: &u64| {
            let (base, end) = (*base, *base + pages);
            end <= SPACE
                && layout.slots().iter().all(|slot| end <= slot.base.0 || slot.base.0 + slot.pages <= base)
        };
        let Some(base) = (place.index(SPACE as usize) as u64..SPACE).find(is_free) else { return Ok(()) };
        let id = (0..).find(|&id| layout.slot(id).is_none()).unwrap();
        let slot = MemorySlot { id, base: Gfn(base), pages, host_addr: 0x10_0000 };
        // SAFETY: the kernel here looks at no memory.
        let add = |tracker: &Tracker| unsafe { tracker.add_slot(slot, start) };
        if layout.slots().len() == MOST_SLOTS {
            prop_assert!(matches!(add(&self.tracker), Err(AddSlotError::Full(MOST_SLOTS))));
            return Ok(());
        }
        // Entries that are left in the rings of a slot of this number, and earlier writes of the guest, may
        // be reported.
        let offsets = self.kernel.logged_offsets(id);
        self.maybe
            .extend(offsets.into_iter().filter(|&offset| offset < pages).map(|offset| Gfn(base + offset)));
        self.added = true;
        if self.all {
            self.maybe.extend((base..base + pages).map(Gfn));
        }
        self.kernel.add_slot(slot, logged);
        for gfn in (base..base + pages.min(early)).map(Gfn) {
            if self.kernel.can_run(0) && !self.parked[0] {
                self.kernel.write(0, gfn, false);
                self.maybe.insert(gfn);
                self.nonsense += 1;
            }
        }
        // Some of it is taken before the tracker knows the slot.
        if early % 2 == 0 {
            self.tracker.harvest_vcpu(0).unwrap();
        }
        add(&self.tracker).unwrap();
        if start == SlotStart::Dirty {
            (base..base + pages).for_each(|gfn| self.wrote(Gfn(gfn)));
        }
        Ok(())
    }

    fn remove_slot(&mut self, slot: Index, before: bool) -> Result<(), TestCaseError> {
        let layout = self.tracker.layout();
        // One stays: a guest has memory.
        let Some(slot) =
            layout.slots().get(slot.index(layout.slots().len())).filter(|_| layout.slots().len() > 1)
        else {
            return Ok(());
        };
        self.nonsense += self.kernel.logged_offsets(slot.id).len() as u64;
        if before {
            self.tracker.remove_slot(slot.id).unwrap();
        }
        self.kernel.remove_slot(slot.id);
        if !before {
            self.tracker.remove_slot(slot.id).unwrap();
        }
        prop_assert!(matches!(self.tracker.remove_slot(slot.id), Err(RemoveSlotError::Unknown(_))));
        for pages in [&mut self.written, &mut self.of_epoch, &mut self.maybe] {
            pages.retain(|gfn| !slot.holds(*gfn));
        }
        Ok(())
    }

    fn add_vcpu(&mut self) -> Result<(), TestCaseError> {
        if self.parked.len() == MOST_VCPUS {
            prop_assert!(matches!(self.tracker.add_test_vcpu(None), Err(AddVcpuError::Full(MOST_VCPUS))));
            return Ok(());
        }
        let ring = self.kernel.add_vcpu(self.setting.ring_entries);
        let number =
            self.tracker.add_test_vcpu((self.setting.kind == DirtyKind::Ring).then_some(ring)).unwrap();
        prop_assert_eq!(number, self.parked.len());
        self.parked.push(false);
        Ok(())
    }

    fn wrote(&mut self, gfn: Gfn) {
        self.written.insert(gfn);
        self.of_epoch.insert(gfn);
    }

    fn fetch(&mut self, room: usize, rearm: bool, keep: bool) -> Result<(), TestCaseError> {
        let mut buffer = vec![Gfn(0); room];
        let fetched = match self.tracker.fetch(&mut buffer, Fetch { rearm, ..Fetch::default() }) {
            Ok(fetched) => fetched,
            Err(error) => {
                prop_assert!(matches!(error, HarvestError::GetDirtyLog { .. }), "{}", error);
                return Ok(());
            }
        };
        if !rearm && !fetched.is_empty() {
            let early = self.tracker.stopped().state_saved().harvest();
            prop_assert!(matches!(early, Err(HarvestError::Fetching)));
        }
        if !keep {
            return Ok(());
        }
        for gfn in fetched.rearm().unwrap() {
            prop_assert!(self.of_epoch.contains(gfn) || self.maybe.contains(gfn), "{} was not written", gfn);
            self.written.remove(gfn);
        }
        Ok(())
    }

    fn epoch(&mut self, drop_after: u8) -> Result<(), TestCaseError> {
        prop_assert!(
            self.setting.kind != DirtyKind::Ring || self.tracker.pending() >= self.logged_at_least()
        );
        let epoch = self.tracker.stopped();
        prop_assert!(self.tracker.try_stopped().is_none());
        if drop_after == 0 {
            return Ok(());
        }
        let epoch = match epoch.state_saved().harvest() {
            Ok(epoch) => epoch,
            Err(error) => {
                prop_assert!(matches!(error, HarvestError::GetDirtyLog { .. }), "{}", error);
                return Ok(());
            }
        };
        prop_assert_eq!(self.tracker.harvest_vcpu(0).unwrap(), 0);
        prop_assert!(self.tracker.part(0, 1).is_none());
        if drop_after == 1 {
            return Ok(());
        }
        let count = epoch.count();
        let epoch = epoch.rearm().unwrap();
        if drop_after == 2 {
            self.maybe.extend(epoch.hot());
            return Ok(());
        }
        let pages = epoch.pages().to_vec();
        let parts: Vec<Gfn> =
            (0..3).flat_map(|index| self.tracker.part(index, 3).unwrap().to_vec()).collect();
        prop_assert_eq!(&parts, &pages);
        prop_assert_eq!(pages.len(), count);
        let unique: BTreeSet<_> = pages.iter().copied().collect();
        prop_assert_eq!(unique.len(), pages.len(), "a page is listed twice");
        let (written, hot): (BTreeSet<_>, BTreeSet<_>) =
            (epoch.written().iter().copied().collect(), epoch.hot().iter().copied().collect());
        let known: BTreeSet<_> = self.of_epoch.union(&self.maybe).copied().collect();
        prop_assert!(written.is_subset(&known), "a page was reported that was not written");
        prop_assert!(self.written.is_subset(&unique), "a page was written and not reported");
        if self.setting.config.hot == HotPages::Off {
            prop_assert!(hot.is_empty());
        }
        // As a caller does that compares.
        let idle = |gfn: &Gfn| !self.of_epoch.contains(gfn);
        (0..pages.len()).filter(|&index| idle(&pages[index])).for_each(|index| epoch.unchanged(index));
        if drop_after == 3 {
            self.maybe.extend(hot);
            return Ok(());
        }
        let epoch = epoch.copied();
        if drop_after == 4 {
            self.maybe.extend(hot);
            return Ok(());
        }
        epoch.run();
        self.written.clear();
        self.of_epoch.clear();
        self.maybe.clear();
        self.all = false;
        prop_assert!(unique.iter().all(|gfn| self.tracker.layout().contains(*gfn)), "a page of no slot");
        prop_assert_eq!(self.tracker.pending() as u64, self.tracker.stats().hot);
        // Each page that can be written without a trap is hot. The reverse is not quite true: an interrupted
        // reset arms everything, and a page that was fetched and armed may have been in another vCPU's ring
        // as well.
        let (unarmed, hot) = (self.kernel.unarmed(), self.tracker.hot_list().into_iter().collect());
        prop_assert!(unarmed.is_subset(&hot), "unarmed {:?}, hot {:?}", unarmed, hot);
        let stats = self.tracker.stats();
        // Nor is a page that an entry of an earlier slot of the same number made hot.
        let exactly = stats.full_rearms + stats.fetched == 0 && !self.added;
        prop_assert!(unarmed == hot || !exactly, "{:?}", stats);
        self.check_room()
    }

    /// With an exact trigger KVM lets the vCPUs write no more pages than it, and lets one vCPU write exactly
    /// that many.
    fn check_room(&self) -> Result<(), TestCaseError> {
        let TrackerConfig { trigger, exact, .. } = self.setting.config;
        let running = || (0..self.parked.len()).filter(|&vcpu| !self.parked[vcpu]);
        let vcpus = running().count().max(1);
        if !exact || self.setting.kind != DirtyKind::Ring {
            return Ok(());
        }
        prop_assert!(self.tracker.is_exact());
        let room: u64 = running().map(|vcpu| self.kernel.room(vcpu)).sum();
        let planned = trigger.saturating_sub(self.tracker.stats().hot as usize).max(1).max(vcpus) as u64;
        prop_assert!(room <= planned, "room {} of {}", room, planned);
        let soft_limit = u64::from(self.setting.ring_entries) - super::kernel::RESERVED;
        let parked = self.tracker.stats().hot;
        if self.parked == [false] {
            prop_assert_eq!(room, planned.min(soft_limit - parked.min(soft_limit)));
        }
        Ok(())
    }

    /// Whether anything is dirty that the tracker can see without a system call.
    fn logged_at_least(&self) -> usize {
        usize::from(self.global.pending() > 0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn reports_exactly_what_was_written(setting in settings(), steps in steps()) {
        let mut world = World::new(setting);
        for step in steps {
            world.step(step)?;
        }
        // Everything that was dropped or failed on the way is still there at the end.
        world.epoch(u8::MAX)?;
        world.epoch(u8::MAX)?;
        let stats = world.tracker.stats();
        prop_assert!(stats.ignored <= world.nonsense);
    }
}
