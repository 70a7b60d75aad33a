//! VMM writes through `vm-memory` mark themselves.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::global::GlobalLog;
use crate::layout::{Gfn, LayoutError, MemoryLayout, MemorySlot, PAGE_SIZE};

/// The bitmap type of a guest memory region whose writes go to a [`GlobalLog`]: with
/// `GuestMemoryMmap<RegionLog>`, every `write_obj`, `write_slice`, `read_volatile_from` and so on marks the
/// pages that it wrote. Writes through `get_host_address` or a raw pointer do not; see
/// [`GlobalLog::mark_range`].
///
/// Build the region with `MmapRegionBuilder::new_with_bitmap(size, RegionLog::new(log, base_gfn))`, which
/// also needs `with_mmap_prot` and `with_mmap_flags`, and join the regions by
/// `GuestMemoryMmap::from_regions`. `GuestMemoryMmap::from_ranges` would make a bitmap of its own that
/// belongs to no log, so it does not compile:
///
/// ```compile_fail,E0277
/// # use outlive_dirty::RegionLog;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// let memory = GuestMemoryMmap::<RegionLog>::from_ranges(&[(GuestAddress(0), 0x4000)]);
/// ```
///
/// For memory that is tracked only at times use `Option<RegionLog>`, which `vm-memory` accepts as a bitmap.
#[derive(Clone, Debug)]
pub struct RegionLog {
    log: Arc<GlobalLog>,
    base: u64,
}

impl RegionLog {
    /// The log of the region that begins at page `base`.
    pub fn new(log: Arc<GlobalLog>, base: Gfn) -> RegionLog {
        RegionLog { log, base: base.gpa() }
    }
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = LogSlice<'a>;
}

impl Bitmap for RegionLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(offset).mark_dirty(0, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(offset).dirty_at(0)
    }

    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice { log: &self.log, base: self.base.saturating_add(offset as u64) }
    }
}

impl MemoryLayout {
    /// The layout of a VM whose memory slots are the regions of `memory`, numbered from `first_slot` in the
    /// order of their addresses. It keeps a copy of `memory`, so the regions stay mapped.
    ///
    /// # Errors
    /// As [`MemoryLayout::new`]; [`LayoutError::NoAddress`] for a region that is not mapped here.
    pub fn of_memory<M>(memory: &M, first_slot: u32) -> Result<MemoryLayout, LayoutError>
    where
        M: GuestMemoryBackend + Clone + Send + Sync + 'static,
    {
        let slot = |(id, region): (u32, &M::R)| {
            let host = region.get_host_address(MemoryRegionAddress(0));
            Ok(MemorySlot {
                id,
                base: Gfn::of(region.start_addr().0),
                pages: region.len() / PAGE_SIZE,
                host_addr: host.map_err(|_| LayoutError::NoAddress(id))? as u64,
            })
        };
        let slots = (first_slot..).zip(memory.iter()).map(slot).collect::<Result<_, _>>()?;
        Ok(MemoryLayout::new(slots)?.kept_by(Arc::new(memory.clone())))
    }
}

/// A [`RegionLog`] seen from an offset in the region.
#[derive(Clone, Copy, Debug)]
pub struct LogSlice<'a> {
    log: &'a GlobalLog,
    base: u64,
}

impl WithBitmapSlice<'_> for LogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for LogSlice<'_> {}

impl Bitmap for LogSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark_range(self.base.saturating_add(offset as u64), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let gpa = self.base.saturating_add(offset as u64);
        self.log.is_marked(Gfn(gpa / PAGE_SIZE))
    }

    fn slice_at(&self, offset: usize) -> Self {
        LogSlice { log: self.log, base: self.base.saturating_add(offset as u64) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{MemoryLayout, MemorySlot};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{
        Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, VolatileMemory,
    };

    fn memory(log: &Arc<GlobalLog>) -> GuestMemoryMmap<RegionLog> {
        let region = |base: u64| {
            let bitmap = RegionLog::new(log.clone(), Gfn::of(base));
            let mapping = MmapRegionBuilder::new_with_bitmap(0x1_0000, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
                .build()
                .unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(base)).unwrap()
        };
        GuestMemoryMmap::from_regions(vec![region(0), region(0x10_0000)]).unwrap()
    }

    fn drained(log: &GlobalLog) -> Vec<u64> {
        let mut pages = Vec::new();
        log.drain(|gfn| pages.push(gfn.0));
        pages
    }

    #[test]
    fn a_layout_keeps_the_memory_that_it_is_made_of() {
        let log = GlobalLog::new(0x200, 64);
        let memory = memory(&log);
        let layout = MemoryLayout::of_memory(&memory, 4).unwrap();
        let ids: Vec<_> = layout.slots().iter().map(|slot| (slot.id, slot.base, slot.pages)).collect();
        assert_eq!(ids, [(4, Gfn(0), 16), (5, Gfn(0x100), 16)]);
        let copies = Arc::strong_count(&log);
        drop(memory);
        assert_eq!(Arc::strong_count(&log), copies, "the regions are still there");
        drop(layout);
        assert_eq!(Arc::strong_count(&log), 1);
    }

    #[test]
    fn writes_mark_the_pages_they_touch() {
        let log = GlobalLog::new(0x200, 64);
        let memory = memory(&log);
        log.enable(
            &MemoryLayout::new(vec![MemorySlot { id: 0, base: Gfn(0), pages: 16, host_addr: 0 }]).unwrap(),
        );
        memory.write_obj(7u64, GuestAddress(0x1fff)).unwrap();
        memory.write_slice(&[1; 0x2001], GuestAddress(0x10_3000)).unwrap();
        let slice = memory.get_slice(GuestAddress(0x10_8ff0), 0x20).unwrap();
        slice.subslice(0x10, 8).unwrap().copy_from(&[1u8; 8]);
        slice.get_ref::<u8>(0).unwrap().store(1);
        assert!(memory.read_obj::<u64>(GuestAddress(0x1fff)).unwrap() == 7);
        assert_eq!(drained(&log), [1, 2, 0x103, 0x104, 0x105, 0x109, 0x108]);
        memory.read_obj::<u64>(GuestAddress(0x5000)).unwrap();
        assert!(drained(&log).is_empty());
    }
}
