//! A naive kernel: dirty logging as the KVM documentation describes it, with sets instead of page tables.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::global::GlobalLog;
use crate::hot::{HotPages, HotRule};
use crate::kvm::Kernel;
use crate::layout::{Gfn, MemoryLayout, MemorySlot};
use crate::source::ring::{DIRTY, Mapping, RESET, Ring};
use crate::source::{Bitmap, ClearLog, Rings, Source};
use crate::tracker::{Tracker, TrackerConfig};
use crate::words::Words;
use crate::{DirtyKind, NewError};

/// Entries that KVM keeps free behind the soft limit.
pub(super) const RESERVED: u64 = 16;

/// Ends the epoch, and returns its pages in order.
pub(super) fn pages(tracker: &Tracker) -> Vec<u64> {
    let epoch = tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    let mut pages: Vec<_> = epoch.pages().iter().map(|gfn| gfn.0).collect();
    pages.sort_unstable();
    epoch.copied().run();
    pages
}

struct FakeRing {
    entries: Arc<Mapping>,
    size: u64,
    dirty: u64,
    reset: u64,
}

#[derive(Default)]
pub(super) struct State {
    /// The slots of the VM.
    slots: Vec<MemorySlot>,
    rings: Vec<FakeRing>,
    /// Slot numbers that are logged.
    logged: BTreeSet<u32>,
    /// Pages whose next write traps.
    armed: BTreeSet<u64>,
    /// KVM's bitmap.
    bitmap: BTreeSet<u64>,
    /// The next reset is interrupted after this many entries, and loses the batch that it has gathered.
    pub(super) interrupt_after: Option<u64>,
    /// This many KVM_GET_DIRTY_LOG succeed before one fails.
    pub(super) fail_log_after: Option<u32>,
    /// KVM writes no wall clock.
    pub(super) no_mint: bool,
    /// How long KVM_GET_DIRTY_LOG takes.
    pub(super) log_takes: Duration,
    /// How often KVM_GET_DIRTY_LOG was called.
    pub(super) logs: u32,
    /// Resets so far.
    pub(super) resets: u64,
}

#[derive(Clone)]
pub(super) struct FakeKernel {
    kind: DirtyKind,
    state: Arc<Mutex<State>>,
}

impl FakeKernel {
    /// A tracker over a naive kernel.
    pub(super) fn tracker(
        layout: MemoryLayout,
        config: TrackerConfig,
        kind: DirtyKind,
        ring_entries: u32,
        global: Arc<GlobalLog>,
    ) -> Result<(FakeKernel, Tracker), NewError> {
        Self::tracker_of(layout, config, kind, ring_entries, global, config.max_vcpus)
    }

    /// The same with this many vCPUs at the beginning.
    pub(super) fn tracker_of(
        layout: MemoryLayout,
        config: TrackerConfig,
        kind: DirtyKind,
        ring_entries: u32,
        global: Arc<GlobalLog>,
        vcpus: usize,
    ) -> Result<(FakeKernel, Tracker), NewError> {
        let mappings: Vec<_> =
            (0..vcpus).map(|_| Arc::new(Mapping::anonymous(ring_entries).unwrap())).collect();
        let rings = mappings.iter().map(|entries| Ring::new(entries.clone(), RESERVED)).collect();
        let ring = |entries| FakeRing { entries, size: ring_entries.into(), dirty: 0, reset: 0 };
        let state = State {
            slots: layout.slots().to_vec(),
            rings: mappings.into_iter().map(ring).collect(),
            ..State::default()
        };
        let kernel = FakeKernel { kind, state: Arc::new(Mutex::new(state)) };
        let this = Arc::new(kernel.clone());
        let largest = if config.max_slots > 0 { global.gfn_space() } else { layout.largest() };
        let source: Box<dyn Source> = match kind {
            DirtyKind::Ring => {
                Box::new(Rings::new(this, rings, config.max_vcpus).with_backup(largest).unwrap())
            }
            DirtyKind::ClearLog => Box::new(ClearLog::reserve(this, largest).unwrap()),
            DirtyKind::Bitmap | DirtyKind::Uffd => Box::new(Bitmap::reserve(this, largest).unwrap()),
        };
        let rule = match config.hot {
            HotPages::Rule(rule) if kind != DirtyKind::Bitmap => {
                Some(HotRule { max_pages: rule.max_pages.min(ring_entries as usize / 4), ..rule })
            }
            _ => None,
        };
        let tracker = Tracker::with(layout, config, kind, source, rule, global, vcpus)?;
        Ok((kernel, tracker))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn slot_of(&self, gfn: Gfn) -> MemorySlot {
        *self.state().slots.iter().find(|slot| slot.holds(gfn)).unwrap()
    }

    /// The VMM makes a slot, with its dirty log on or off.
    pub(super) fn add_slot(&self, slot: MemorySlot, logged: bool) {
        self.state().slots.push(slot);
        if logged {
            self.set_logging(&slot, true).unwrap();
        }
    }

    /// The VMM removes a slot: its log goes, and its entries stay in the rings.
    pub(super) fn remove_slot(&self, id: u32) {
        let mut state = self.state();
        let index = state.slots.iter().position(|slot| slot.id == id).unwrap();
        let slot = state.slots.remove(index);
        state.logged.remove(&id);
        state.bitmap.retain(|&gfn| !slot.holds(Gfn(gfn)));
        state.armed.retain(|&gfn| !slot.holds(Gfn(gfn)));
    }

    /// Adds a vCPU and returns its ring, for the tracker.
    pub(super) fn add_vcpu(&self, entries: u32) -> Ring {
        let mapping = Arc::new(Mapping::anonymous(entries).unwrap());
        let ring = FakeRing { entries: mapping.clone(), size: entries.into(), dirty: 0, reset: 0 };
        self.state().rings.push(ring);
        Ring::new(mapping, RESERVED)
    }

    /// Pages of a slot of this number whose entries are in the rings.
    pub(super) fn logged_offsets(&self, id: u32) -> Vec<u64> {
        let state = self.state();
        let entries =
            state.rings.iter().flat_map(|ring| (ring.reset..ring.dirty).map(|at| ring.entries.entry(at)));
        let of_slot = entries.filter(|entry| entry.slot.load(Ordering::Relaxed) == id);
        of_slot.map(|entry| entry.offset.load(Ordering::Relaxed)).collect()
    }

    /// Whether KVM would let the vCPU run.
    pub(super) fn can_run(&self, vcpu: usize) -> bool {
        let ring = &self.state().rings[vcpu];
        ring.dirty - ring.reset < ring.size - RESERVED
    }

    /// A vCPU writes a page; `again` logs it even if nothing trapped, as emulated stores do.
    pub(super) fn write(&self, vcpu: usize, gfn: Gfn, again: bool) {
        let slot = self.slot_of(gfn);
        let mut state = self.state();
        if !state.logged.contains(&slot.id) || !(state.armed.remove(&gfn.0) || again) {
            return;
        }
        match self.kind {
            DirtyKind::Ring => push(&mut state.rings[vcpu], slot.id, gfn.0 - slot.base.0),
            _ => _ = state.bitmap.insert(gfn.0),
        }
    }

    /// A write and its store, in one step as hardware does it. False if KVM does not let the vCPU run.
    pub(super) fn store(&self, vcpu: usize, gfn: Gfn, again: bool, cell: &AtomicU64, value: u64) -> bool {
        let slot = self.slot_of(gfn);
        let mut state = self.state();
        let ring = &state.rings[vcpu];
        if self.kind == DirtyKind::Ring && ring.dirty - ring.reset >= ring.size - RESERVED {
            return false;
        }
        if state.logged.contains(&slot.id) && (state.armed.remove(&gfn.0) || again) {
            match self.kind {
                DirtyKind::Ring => push(&mut state.rings[vcpu], slot.id, gfn.0 - slot.base.0),
                _ => _ = state.bitmap.insert(gfn.0),
            }
        }
        cell.store(value, Ordering::Relaxed);
        true
    }

    /// Pages whose next write does not trap.
    pub(super) fn unarmed(&self) -> BTreeSet<Gfn> {
        let state = self.state();
        let pages = state.slots.iter().flat_map(|slot| slot.base.0..slot.end());
        pages.filter(|gfn| !state.armed.contains(gfn)).map(Gfn).collect()
    }

    /// Entries that KVM still lets this vCPU write.
    pub(super) fn room(&self, vcpu: usize) -> u64 {
        let ring = &self.state().rings[vcpu];
        (ring.size - RESERVED).saturating_sub(ring.dirty - ring.reset)
    }

    /// KVM writes a page on behalf of no vCPU, on architectures whose rings have a bitmap beside them.
    pub(super) fn write_without_vcpu(&self, gfn: Gfn) {
        let slot = self.slot_of(gfn).id;
        let mut state = self.state();
        if state.logged.contains(&slot) && state.armed.remove(&gfn.0) {
            state.bitmap.insert(gfn.0);
        }
    }

    /// An entry that means no page of the layout.
    pub(super) fn write_nonsense(&self, vcpu: usize, slot: u32, offset: u64) {
        if self.kind == DirtyKind::Ring {
            push(&mut self.state().rings[vcpu], slot, offset);
        }
    }
}

/// As KVM does: without checking what it overwrites.
fn push(ring: &mut FakeRing, slot: u32, offset: u64) {
    let entry = ring.entries.entry(ring.dirty);
    entry.slot.store(slot, Ordering::Relaxed);
    entry.offset.store(offset, Ordering::Relaxed);
    entry.flags.store(DIRTY, Ordering::Release);
    ring.dirty += 1;
}

impl Kernel for FakeKernel {
    fn set_logging(&self, slot: &MemorySlot, on: bool) -> io::Result<()> {
        let mut state = self.state();
        assert!(state.slots.contains(slot), "a slot is made by turning its log on or off: {slot:?}");
        if on == state.logged.contains(&slot.id) {
            return Ok(()); // KVM does nothing
        }
        if on {
            state.logged.insert(slot.id);
            state.armed.extend(slot.base.0..slot.end());
        } else {
            state.logged.remove(&slot.id);
            state.bitmap.retain(|gfn| !(slot.base.0..slot.end()).contains(gfn));
        }
        Ok(())
    }

    fn get_dirty_log(&self, slot: &MemorySlot, buffer: &Words) -> io::Result<()> {
        std::thread::sleep(self.state().log_takes);
        let mut state = self.state();
        state.logs += 1;
        match &mut state.fail_log_after {
            Some(0) => {
                state.fail_log_after = None;
                return Err(io::ErrorKind::Other.into());
            }
            Some(left) => *left -= 1,
            None => (),
        }
        if !state.logged.contains(&slot.id) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let words = slot.pages.div_ceil(64) as usize;
        buffer[..words].iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let dirty: Vec<_> = state.bitmap.range(slot.base.0..slot.end()).copied().collect();
        for gfn in dirty {
            let offset = gfn - slot.base.0;
            buffer[offset as usize / 64].fetch_or(1 << (offset % 64), Ordering::Relaxed);
            if self.kind != DirtyKind::ClearLog {
                state.bitmap.remove(&gfn);
                state.armed.insert(gfn);
            }
        }
        Ok(())
    }

    fn clear_dirty_log(&self, slot: &MemorySlot, words: Range<usize>, mask: &Words) -> io::Result<()> {
        assert!(
            self.kind == DirtyKind::ClearLog
                && words.start < words.end
                && words.end as u64 <= slot.pages.div_ceil(64)
        );
        let mut state = self.state();
        if !state.logged.contains(&slot.id) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        for word in words {
            let bits = mask[word].load(Ordering::Relaxed);
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                let gfn = slot.base.0 + word as u64 * 64 + bit;
                // KVM protects only pages whose bits were set.
                if state.bitmap.remove(&gfn) {
                    state.armed.insert(gfn);
                }
            }
        }
        Ok(())
    }

    fn refuse_manual_protect(&self) {}

    fn mint(&self, vcpu: usize, entries: u64, layout: &MemoryLayout) -> io::Result<()> {
        if self.state().no_mint {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let page = layout.first_page().and_then(|gfn| layout.locate(gfn));
        let (slot, offset) = page.ok_or(io::ErrorKind::NotFound)?;
        assert!(layout.slots().iter().any(|live| live.id == slot), "memory that is gone is written");
        for _ in 0..entries.div_ceil(3) * 3 {
            push(&mut self.state().rings[vcpu], slot, offset);
        }
        Ok(())
    }

    fn reset_dirty_rings(&self) -> io::Result<u64> {
        let mut state = self.state();
        state.resets += 1;
        let mut left = state.interrupt_after.take();
        let (mut count, mut batch) = (0, Vec::new());
        let slots = state.slots.clone();
        for index in 0..state.rings.len() {
            loop {
                let ring = &mut state.rings[index];
                let entry = ring.entries.entry(ring.reset);
                if entry.flags.load(Ordering::Acquire) & RESET == 0 {
                    break;
                }
                if left == Some(0) {
                    return Ok(count);
                }
                left = left.map(|left| left - 1);
                let (id, offset) = (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
                let at = |slot: &&MemorySlot| slot.id == id && offset < slot.pages;
                batch.extend(slots.iter().find(at).map(|slot| Gfn(slot.base.0 + offset)));
                entry.flags.store(0, Ordering::Release);
                ring.reset += 1;
                count += 1;
                // Overtaking KVM's own entries would wedge the vCPU.
                assert!(ring.reset <= ring.dirty, "an entry was given back that KVM had not written");
                if batch.len() == 64 {
                    state.armed.extend(batch.drain(..).map(|gfn: Gfn| gfn.0));
                }
            }
        }
        state.armed.extend(batch.into_iter().map(|gfn| gfn.0));
        Ok(count)
    }
}
