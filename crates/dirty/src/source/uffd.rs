//! Dirty pages of any memory of this process, without KVM: userfaultfd's asynchronous write-protect finds the
//! writes, PAGEMAP_SCAN takes and protects again (both Linux 6.7 and later).
//!
//! It sees every write *through the mappings of the layout*: stores of any thread, and the kernel's on behalf
//! of a system call (`read`, `preadv`; `process_vm_writev` that has ended before the take), even a store of
//! the value that was there before. The first write to a page after it was taken costs 1 to 2 us. The cost of
//! a take grows with the layout, 0.3 to 1.1 ms a GiB, whether or not anything was written. In hugetlb memory
//! a write makes the whole huge page dirty, and slots must be whole huge pages.
//!
//! It does not see writes through another mapping of the same memory, `pwrite` to the memfd behind it, holes
//! punched in it (`MADV_REMOVE`), and writes to pages that were pinned before they were taken: registered
//! `io_uring` buffers and vfio for as long as they are pinned, `O_DIRECT` and `process_vm_writev` while the
//! call is in flight. Its write fault came when it pinned; the take has cleared that, and the bytes come
//! through the kernel's own mapping (docs/kernel-findings.md, pinned-write). Nor does it see anything in a
//! mapping of device memory.
//!
//! # Where not to use it
//!
//! Do not use it on the mapping that a KVM memory slot points to while its vCPUs run: every take invalidates
//! what KVM has mapped of it, and the guest faults its memory in anew. A guest that writes 1000 pages an
//! epoch was measured 275 times slower (25 us to 6.9 ms). Nor would it save anything, since KVM has dirty
//! logs of its own. Use it for:
//!
//! - device emulation that writes guest memory through a *second* mapping of the same memfd;
//! - emulators, sandboxes and interpreters whose "guest" is threads of this process;
//! - live migration and incremental snapshots of a process's own memory;
//! - an independent check, in tests, of another mechanism that claims to know all the writes.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::layout::{Gfn, MemoryLayout, MemorySlot, PAGE_SIZE};
use crate::source::pagemap::{Found, Region, WriteWatch, is_mapped};
use crate::source::uffd_error::UffdError;
use crate::source::{Armed, HarvestError, Hint, Plan, RearmError, Sink, SlotError, Source};

/// Regions that one scan returns at most; 96 KiB.
const REGIONS: usize = 4096;

/// The mappings of the layout's slots.
pub(crate) struct Uffd {
    watch: WriteWatch,
    scan: Mutex<Scan>,
}

/// How far the scan has come.
struct Scan {
    /// Regions outside `left` have no end: see [`WriteWatch::take`].
    regions: Box<[Region]>,
    /// Regions taken from the kernel, and so protected, that no sink has received yet. They belong to slot
    /// `index`.
    left: Range<usize>,
    /// Slot, as an index into the layout, and address at which the next scan begins.
    index: usize,
    from: u64,
    /// Slots that are registered.
    registered: usize,
}

fn addresses(slot: &MemorySlot) -> Range<u64> {
    // The kernel refuses a range that ends beyond all addresses.
    slot.host_addr..slot.host_addr.saturating_add(slot.pages.saturating_mul(PAGE_SIZE))
}

impl Uffd {
    pub(crate) fn open(layout: &MemoryLayout) -> Result<Uffd, UffdError> {
        let mut slots: Vec<&MemorySlot> = layout.slots().iter().collect();
        slots.sort_by_key(|slot| slot.host_addr);
        if let Some(pair) = slots.windows(2).find(|pair| addresses(pair[0]).end > pair[1].host_addr) {
            return Err(UffdError::Shared(pair[0].id, pair[1].id));
        }
        let regions = vec![Region::default(); REGIONS].into_boxed_slice();
        let scan = Scan { regions, left: 0..0, index: 0, from: 0, registered: 0 };
        Ok(Uffd { watch: WriteWatch::open()?, scan: Mutex::new(scan) })
    }

    /// If a sink panics, the scan stays in order.
    fn scan(&self) -> MutexGuard<'_, Scan> {
        self.scan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arm_slots(&self, layout: &MemoryLayout, scan: &mut Scan) -> Result<(), SlotError> {
        for slot in layout.slots() {
            let error = |source| SlotError { slot: slot.id, source };
            self.watch.register(addresses(slot)).map_err(error)?;
            scan.registered += 1;
            check_mapped(slot).map_err(error)?;
            self.watch.protect(addresses(slot)).map_err(error)?;
        }
        Ok(())
    }

    fn disarm_slots(&self, layout: &MemoryLayout, scan: &mut Scan) -> Result<(), SlotError> {
        let registered = std::mem::take(&mut scan.registered);
        let slots = layout.slots()[..registered].iter().map(|slot| {
            let unregistered = self.watch.unregister(addresses(slot));
            // Memory that is no longer mapped has nothing to disarm.
            unregistered
                .or_else(|error| if is_mapped(addresses(slot)) { Err(error) } else { Ok(()) })
                .map_err(|source| SlotError { slot: slot.id, source })
        });
        // All of them, even if one fails.
        slots.fold(Ok(()), Result::and)
    }
}

fn check_mapped(slot: &MemorySlot) -> io::Result<()> {
    // Neither registering nor scanning reports a hole.
    if is_mapped(addresses(slot)) { Ok(()) } else { Err(io::Error::other("a part of it is not mapped")) }
}

impl Scan {
    fn forget(&mut self) {
        self.regions.fill(Region::default());
        (self.left, self.index, self.from) = (0..0, 0, 0);
    }

    /// Takes everything that is written, beginning where the last call ended, and once round: the pages of a
    /// slot that is written without a pause do not keep those of the next slot from a sink with little room.
    fn round(
        &mut self,
        watch: &WriteWatch,
        layout: &MemoryLayout,
        mut sink: impl FnMut(Gfn) -> bool,
    ) -> Result<(), SlotError> {
        let slots = layout.slots();
        if !self.hand_out(slots, &mut sink) {
            return Ok(());
        }
        let (first, from) = (self.index, self.from);
        for step in 0..=slots.len() {
            self.index = (first + step) % slots.len();
            let slot = &slots[self.index];
            let mut range = addresses(slot);
            match step {
                0 => range.start = from.clamp(range.start, range.end),
                last if last == slots.len() => range.end = from.clamp(range.start, range.end),
                _ => (),
            }
            while !range.is_empty() {
                let Found { regions, next, error } = watch.take(range.clone(), &mut self.regions);
                (self.left, self.from, range.start) = (0..regions, next, next);
                let has_room = self.hand_out(slots, &mut sink);
                if let Some(source) = error {
                    return Err(SlotError { slot: slot.id, source });
                }
                if !has_room {
                    return Ok(());
                }
            }
            check_mapped(slot).map_err(|source| SlotError { slot: slot.id, source })?;
        }
        (self.index, self.from) = (0, 0);
        Ok(())
    }

    /// False if the sink has no more room; the rest is kept.
    fn hand_out(&mut self, slots: &[MemorySlot], sink: &mut impl FnMut(Gfn) -> bool) -> bool {
        let slot = &slots[self.index];
        while !self.left.is_empty() {
            let region = &mut self.regions[self.left.start];
            if !sink(Gfn(slot.base.0 + (region.start - slot.host_addr) / PAGE_SIZE)) {
                return false;
            }
            region.start += PAGE_SIZE;
            if region.start >= region.end {
                *region = Region::default();
                self.left.start += 1;
            }
        }
        true
    }
}

impl Source for Uffd {
    fn populate(&self, _: u64) {
        // Allocated as zero pages that do not exist yet.
        self.scan().forget();
    }

    fn arm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        let mut scan = self.scan();
        scan.forget();
        scan.registered = 0;
        let armed = self.arm_slots(layout, &mut scan);
        if armed.is_err() {
            self.disarm_slots(layout, &mut scan).ok();
        }
        armed
    }

    fn disarm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        let mut scan = self.scan();
        scan.forget();
        self.disarm_slots(layout, &mut scan)
    }

    fn take_vcpu(&self, _: &MemoryLayout, _: usize, _: Hint<'_>, _: Sink<'_>) -> Result<usize, HarvestError> {
        Ok(0)
    }

    fn take_armed(&self, layout: &MemoryLayout, _: bool, sink: Sink<'_>) -> Result<usize, HarvestError> {
        let mut taken = 0;
        let done = self.scan().round(&self.watch, layout, |gfn| {
            let has_room = sink(Some(gfn));
            taken += usize::from(has_room);
            has_room
        });
        match done {
            Ok(()) => Ok(taken),
            Err(SlotError { slot, source }) => Err(HarvestError::GetDirtyLog { slot, source }),
        }
    }

    fn arm(&self, _: &MemoryLayout, pages: &[Gfn], _: Plan) -> Result<Armed, RearmError> {
        // The scan that took them has done it.
        Ok(Armed { pages: pages.len(), ..Armed::default() })
    }
}
