//! Guest frame numbers and the memory slots they live in.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes in a guest page. Dirty logging works by 4 KiB pages, whatever backs the slot.
pub const PAGE_SIZE: u64 = 4096;

/// Guest frame number: guest physical address / 4096.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The guest physical address of the first byte of the page.
    pub const fn gpa(self) -> u64 {
        self.0 * PAGE_SIZE
    }

    /// The page that holds a guest physical address.
    pub const fn of(gpa: u64) -> Gfn {
        Gfn(gpa / PAGE_SIZE)
    }
}

impl Gfn {
    /// Sorts pages and joins neighbours into ranges in ascending order, for interfaces that take ranges (a
    /// file of runs, Cloud Hypervisor's `MemoryRangeTable`). A page that occurs twice counts once.
    ///
    /// ```
    /// use outlive_dirty::Gfn;
    /// let mut pages = [9, 3, 4, 5, 4].map(Gfn);
    /// let ranges: Vec<_> = Gfn::ranges(&mut pages).collect();
    /// assert_eq!(ranges, [Gfn(3)..Gfn(6), Gfn(9)..Gfn(10)]);
    /// ```
    pub fn ranges(pages: &mut [Gfn]) -> impl Iterator<Item = Range<Gfn>> + '_ {
        pages.sort_unstable();
        pages
            .chunk_by(|first, second| second.0 - first.0 <= 1)
            .map(|run| run[0]..Gfn(run[run.len() - 1].0 + 1))
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A KVM memory slot of address space 0, as given to `KVM_SET_USER_MEMORY_REGION`.
///
/// Its memory stays mapped, and the slot unchanged, while a tracker lives or until
/// [`crate::Tracker::remove_slot`]. Only plain writable slots: the tracker sets and clears
/// `KVM_MEM_LOG_DIRTY_PAGES` with no other flag, so leave out of the layout a read-only slot (which no guest
/// write reaches) or one backed by guest_memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// The slot number given to KVM.
    pub id: u32,
    /// First page of the slot.
    pub base: Gfn,
    /// Pages in the slot.
    pub pages: u64,
    /// Address of the slot's memory in this process, a multiple of the page size.
    pub host_addr: u64,
}

impl MemorySlot {
    /// First page after the slot.
    pub(crate) fn end(&self) -> u64 {
        self.base.0 + self.pages
    }

    pub(crate) fn holds(&self, gfn: Gfn) -> bool {
        (self.base.0..self.end()).contains(&gfn.0)
    }
}

/// The memory slots of a VM, checked and ordered by guest address.
#[derive(Clone, Debug)]
pub struct MemoryLayout {
    slots: Vec<MemorySlot>,
    /// Slot number -> index in `slots` + 1; 0 for a number that is not ours.
    by_id: Vec<u32>,
    pages: u64,
    /// The owner that keeps the memory of the slots mapped.
    owners: Vec<Owner>,
}

/// Anything that keeps memory mapped while it lives.
type Owner = Arc<dyn Any + Send + Sync>;

/// Why a list of slots is no layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no slot at all.
    #[error("a layout needs at least one memory slot")]
    NoSlots,
    /// A slot has no pages.
    #[error("memory slot {0} is empty")]
    Empty(u32),
    /// KVM does not give this number to user space (`KVM_USER_MEM_SLOTS`).
    #[error("memory slot number {0} is not below {MAX_SLOTS}")]
    Number(u32),
    /// Two slots have the same number.
    #[error("memory slot number {0} is used twice")]
    DuplicateNumber(u32),
    /// The slot ends above the largest guest physical address (52 bits).
    #[error("memory slot {0} ends above the 52-bit guest physical address space")]
    TooHigh(u32),
    /// Two slots share pages.
    #[error("memory slots {0} and {1} overlap")]
    Overlap(u32, u32),
    /// KVM wants page-aligned memory.
    #[error("the host address of memory slot {0} is not a multiple of the page size")]
    Unaligned(u32),
    /// The memory of a slot is not in this process: `MemoryLayout::of_memory`.
    #[error("the memory of slot {0} has no address in this process")]
    NoAddress(u32),
}

/// `KVM_USER_MEM_SLOTS` of x86: 32767 less 3 private slots (arch/x86/include/asm/kvm_host.h).
const MAX_SLOTS: u32 = 32764;
/// First frame number that no 52-bit guest physical address has.
const MAX_GFN: u64 = 1 << 40;

impl MemoryLayout {
    /// Checks the slots: at least one, none empty, numbers unique, no overlap.
    pub fn new(slots: Vec<MemorySlot>) -> Result<MemoryLayout, LayoutError> {
        if slots.is_empty() {
            return Err(LayoutError::NoSlots);
        }
        Self::of_slots(slots, Vec::new())
    }

    fn of_slots(mut slots: Vec<MemorySlot>, owners: Vec<Owner>) -> Result<MemoryLayout, LayoutError> {
        for slot in &slots {
            if slot.id >= MAX_SLOTS {
                return Err(LayoutError::Number(slot.id));
            }
            if slot.pages == 0 {
                return Err(LayoutError::Empty(slot.id));
            }
            if slot.base.0.checked_add(slot.pages).is_none_or(|end| end > MAX_GFN) {
                return Err(LayoutError::TooHigh(slot.id));
            }
            if slot.host_addr % PAGE_SIZE != 0 {
                return Err(LayoutError::Unaligned(slot.id));
            }
        }
        slots.sort_by_key(|slot| slot.base);
        if let Some(pair) = slots.windows(2).find(|pair| pair[0].end() > pair[1].base.0) {
            return Err(LayoutError::Overlap(pair[0].id, pair[1].id));
        }
        let largest = slots.iter().map(|slot| slot.id).max().unwrap_or(0);
        let mut by_id = vec![0; largest as usize + 1];
        for (index, slot) in slots.iter().enumerate() {
            let entry = &mut by_id[slot.id as usize];
            if *entry != 0 {
                return Err(LayoutError::DuplicateNumber(slot.id));
            }
            *entry = index as u32 + 1;
        }
        let pages = slots.iter().map(|slot| slot.pages).sum();
        Ok(MemoryLayout { slots, by_id, pages, owners })
    }

    /// The same with one more slot.
    pub(crate) fn with_slot(&self, slot: MemorySlot) -> Result<MemoryLayout, LayoutError> {
        Self::of_slots(self.slots.iter().copied().chain([slot]).collect(), self.owners.clone())
    }

    /// The same without the slot of this number; it may be the last one.
    pub(crate) fn without(&self, id: u32) -> MemoryLayout {
        let slots = self.slots.iter().copied().filter(|slot| slot.id != id).collect();
        Self::of_slots(slots, self.owners.clone()).expect("a part of a layout is one")
    }

    /// The slot of this number.
    pub fn slot(&self, id: u32) -> Option<&MemorySlot> {
        let index = (*self.by_id.get(id as usize)? as usize).checked_sub(1)?;
        self.slots.get(index)
    }

    /// Keeps `owner` alive as long as this layout, its copies and the trackers made of them. Give it whatever
    /// keeps the slots' memory mapped (a `GuestMemoryMmap`, an `Arc` of the VMM's own type), so that the
    /// memory cannot be unmapped while it is tracked.
    #[must_use]
    pub fn kept_by(mut self, owner: Arc<dyn Any + Send + Sync>) -> MemoryLayout {
        self.owners.push(owner);
        self
    }

    /// The slots in order of guest address.
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    /// The first page.
    pub(crate) fn first_page(&self) -> Option<Gfn> {
        self.slots.first().map(|slot| slot.base)
    }

    /// Pages in the largest slot.
    pub(crate) fn largest(&self) -> u64 {
        self.slots.iter().map(|slot| slot.pages).max().unwrap_or(0)
    }

    /// Pages in all slots together.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The highest page of the VM.
    pub fn max_gfn(&self) -> Gfn {
        Gfn(self.gfn_space().saturating_sub(1))
    }

    /// Frame numbers from 0 to the end of the last slot, including holes: the argument of
    /// [`crate::GlobalLog::new`].
    pub fn gfn_space(&self) -> u64 {
        self.slots.last().map_or(0, MemorySlot::end)
    }

    /// Whether the page belongs to a slot.
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.locate(gfn).is_some()
    }

    /// The slot of a page.
    fn slot_of(&self, gfn: Gfn) -> Option<&MemorySlot> {
        let index = self.slots.partition_point(|slot| slot.base <= gfn).checked_sub(1)?;
        let slot = &self.slots[index];
        slot.holds(gfn).then_some(slot)
    }

    /// The slot number and the page in the slot, as a ring entry names them.
    pub(crate) fn locate(&self, gfn: Gfn) -> Option<(u32, u64)> {
        self.slot_of(gfn).map(|slot| (slot.id, gfn.0 - slot.base.0))
    }

    /// Where a guest physical address is in this process.
    #[cfg(any(test, target_arch = "x86_64"))]
    pub(crate) fn host_addr(&self, gpa: u64) -> Option<u64> {
        self.slot_of(Gfn::of(gpa)).map(|slot| slot.host_addr + (gpa - slot.base.gpa()))
    }

    /// The page that a ring entry means: `slot` is `as_id << 16 | id`, `offset` a page within the slot.
    ///
    /// None for another address space (system management mode), a slot that is not in the layout (it may have
    /// gone since the entry was written) or an offset past its end.
    pub(crate) fn resolve(&self, slot: u32, offset: u64) -> Option<Gfn> {
        let slot = self.slot(slot)?;
        (offset < slot.pages).then(|| Gfn(slot.base.0 + offset))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn slot(id: u32, base: u64, pages: u64) -> MemorySlot {
        MemorySlot { id, base: Gfn(base), pages, host_addr: 0x10_0000 }
    }

    #[test]
    fn refuses_what_is_no_layout() {
        assert_eq!(MemoryLayout::new(vec![]).unwrap_err(), LayoutError::NoSlots);
        assert_eq!(MemoryLayout::new(vec![slot(1, 0, 0)]).unwrap_err(), LayoutError::Empty(1));
        assert_eq!(MemoryLayout::new(vec![slot(32764, 0, 1)]).unwrap_err(), LayoutError::Number(32764));
        assert_eq!(
            MemoryLayout::new(vec![slot(0, 0, 9), slot(1, 8, 1)]).unwrap_err(),
            LayoutError::Overlap(0, 1)
        );
        assert_eq!(
            MemoryLayout::new(vec![slot(2, 0, 1), slot(2, 8, 1)]).unwrap_err(),
            LayoutError::DuplicateNumber(2)
        );
        assert_eq!(MemoryLayout::new(vec![slot(3, u64::MAX, 2)]).unwrap_err(), LayoutError::TooHigh(3));
        assert_eq!(MemoryLayout::new(vec![slot(3, MAX_GFN, 1)]).unwrap_err(), LayoutError::TooHigh(3));
        let unaligned = MemorySlot { host_addr: 12, ..slot(0, 0, 1) };
        assert_eq!(MemoryLayout::new(vec![unaligned]).unwrap_err(), LayoutError::Unaligned(0));
    }

    #[test]
    fn resolves_entries_of_its_own_slots_only() {
        let layout = MemoryLayout::new(vec![slot(7, 0x10_0000, 16), slot(2, 0, 8)]).unwrap();
        assert_eq!(layout.max_gfn(), Gfn(0x10_000f));
        assert_eq!(layout.gfn_space(), 0x10_0010);
        assert_eq!(layout.pages(), 24);
        assert_eq!(layout.resolve(2, 7), Some(Gfn(7)));
        assert_eq!(layout.resolve(7, 15), Some(Gfn(0x10_000f)));
        assert_eq!(layout.host_addr(0x10_0001_2345), None);
        assert_eq!(layout.host_addr(0x7fff), Some(0x10_7fff));
        assert_eq!(layout.locate(Gfn(0x10_000f)), Some((7, 15)));
        assert_eq!((layout.locate(Gfn(7)), layout.locate(Gfn(8))), (Some((2, 7)), None));
        assert_eq!(layout.resolve(2, 8), None);
        assert_eq!(layout.resolve(3, 0), None);
        assert_eq!(layout.resolve(0xffff, 0), None);
        assert_eq!(layout.resolve(1 << 16 | 2, 0), None);
        assert_eq!(layout.resolve(2, u64::MAX), None);
        assert!(layout.contains(Gfn(7)) && !layout.contains(Gfn(8)));
        assert!(layout.contains(Gfn(0x10_0000)) && !layout.contains(Gfn(0x10_0010)));
        assert_eq!(layout.first_page(), Some(Gfn(0)));
        let layout = layout.without(2).without(3);
        assert_eq!((layout.first_page(), layout.host_addr(0x7fff)), (Some(Gfn(0x10_0000)), None));
        assert_eq!((layout.resolve(2, 7), layout.resolve(7, 15)), (None, Some(Gfn(0x10_000f))));
        assert!(!layout.contains(Gfn(7)) && layout.contains(Gfn(0x10_0000)));
        assert_eq!(layout.slots().iter().map(|slot| slot.id).collect::<Vec<_>>(), [7]);
        assert_eq!(layout.with_slot(slot(3, 0x10_0008, 1)).unwrap_err(), LayoutError::Overlap(7, 3));
        let layout = layout.with_slot(slot(2, 4, 9)).unwrap();
        assert_eq!((layout.resolve(2, 8), layout.pages(), layout.largest()), (Some(Gfn(12)), 25, 16));
        let none = layout.without(2).without(7);
        assert_eq!((none.gfn_space(), none.max_gfn(), none.resolve(7, 0)), (0, Gfn(0), None));
    }
}
