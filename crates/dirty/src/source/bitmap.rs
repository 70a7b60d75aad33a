//! KVM_GET_DIRTY_LOG: one call fetches and clears the bitmap of a slot and arms its pages.

use std::io;
use std::sync::Arc;

use crate::kvm::Kernel;
use crate::layout::{Gfn, MemoryLayout, MemorySlot};
use crate::source::log::DirtyLog;
use crate::source::{Armed, HarvestError, Hint, Plan, RearmError, Sink, SlotError, Source};

pub(crate) struct Bitmap(DirtyLog);

impl Bitmap {
    pub(crate) fn reserve(kernel: Arc<dyn Kernel>, largest: u64) -> io::Result<Bitmap> {
        DirtyLog::reserve(kernel, largest).map(Bitmap)
    }
}

impl Source for Bitmap {
    fn populate(&self, largest: u64) {
        self.0.populate(largest);
    }

    fn arm_slot(&self, slot: &MemorySlot) -> io::Result<()> {
        self.0.turn_on(slot)
    }

    fn arm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        self.0.turn(layout, true)
    }

    fn disarm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        self.0.turn(layout, false)
    }

    fn take_vcpu(&self, _: &MemoryLayout, _: usize, _: Hint<'_>, _: Sink<'_>) -> Result<usize, HarvestError> {
        Ok(0)
    }

    fn take_armed(&self, layout: &MemoryLayout, _: bool, sink: Sink<'_>) -> Result<usize, HarvestError> {
        self.0.read(layout, &mut |page| {
            let has_room = sink(page);
            // KVM has forgotten the page.
            debug_assert!(has_room, "there is no second chance for a page of the bitmap");
            true
        })
    }

    fn arm(&self, _: &MemoryLayout, pages: &[Gfn], _: Plan) -> Result<Armed, RearmError> {
        Ok(Armed { pages: pages.len(), ..Armed::default() })
    }
}
