//! KVM_GET_DIRTY_LOG: one call fetches and clears the bitmap of a slot and arms its pages.
// UNSAFETY: reads the buffer as plain words, for speed.
#![allow(unsafe_code)]

use std::io;

use crate::kvm::Kernel;
use crate::layout::{Gfn, Layout};
use crate::source::scan::scan;
use crate::source::{Armed, HarvestError, Hint, Plan, RearmError, Sink, SlotError, Source};
use crate::words::Words;

/// KVM's dirty bitmap of every slot.
pub(crate) struct Bitmap {
    kernel: Box<dyn Kernel>,
    buffer: Words,
}

/// A buffer for the bitmap of any slot of the layout.
pub(super) fn buffer(layout: &Layout) -> io::Result<Words> {
    let largest = layout.slots().iter().map(|slot| slot.pages).max().unwrap_or(0);
    Words::reserve(largest.div_ceil(64) as usize)
}

impl Bitmap {
    pub(crate) fn reserve(kernel: Box<dyn Kernel>, layout: &Layout) -> io::Result<Bitmap> {
        Ok(Bitmap { kernel, buffer: buffer(layout)? })
    }
}

impl Source for Bitmap {
    fn populate(&self) {
        self.buffer.populate(0..self.buffer.len());
    }

    fn arm_all(&self, layout: &Layout) -> Result<(), SlotError> {
        super::set_logging(&*self.kernel, layout, true)
    }

    fn disarm_all(&self, layout: &Layout) -> Result<(), SlotError> {
        super::set_logging(&*self.kernel, layout, false)
    }

    fn take_vcpu(&self, _: &Layout, _: usize, _: Hint<'_>, _: Sink<'_>) -> Result<usize, HarvestError> {
        Ok(0)
    }

    fn take_shared(&self, layout: &Layout, sink: Sink<'_>) -> Result<usize, HarvestError> {
        let mut found = 0;
        for slot in layout.live_slots() {
            self.kernel
                .get_dirty_log(slot, &self.buffer)
                .map_err(|source| HarvestError::GetDirtyLog { slot: slot.id, source })?;
            // SAFETY: the buffer is stored to by the kernel in get_dirty_log only, which one thread at a time calls:
            // this one.
            let words = unsafe { self.buffer.plain(0..slot.pages.div_ceil(64) as usize) };
            found += scan(words, slot, &mut |page| {
                let has_room = sink(page);
                // KVM has forgotten the page.
                debug_assert!(has_room, "there is no second chance for a page of the bitmap");
                true
            });
        }
        Ok(found)
    }

    fn arm(&self, _: &Layout, pages: &[Gfn], _: Plan) -> Result<Armed, RearmError> {
        Ok(Armed { pages: pages.len(), ..Armed::default() })
    }

    fn arms_when_taken(&self) -> bool {
        true
    }
}
