//! KVM's dirty bitmap of every slot, as KVM_GET_DIRTY_LOG hands it out.
// UNSAFETY: reads the buffer as plain words, for speed.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use crate::kvm::Kernel;
use crate::layout::{MemoryLayout, MemorySlot};
use crate::source::scan::scan;
use crate::source::{HarvestError, Sink, SlotError};
use crate::words::Words;

/// The bitmap and a buffer for it. The two back ends decide whether fetching it also clears it.
pub(super) struct DirtyLog {
    pub(super) kernel: Arc<dyn Kernel>,
    buffer: Words,
}

impl DirtyLog {
    pub(super) fn reserve(kernel: Arc<dyn Kernel>, largest: u64) -> io::Result<DirtyLog> {
        Ok(DirtyLog { kernel, buffer: buffer(largest)? })
    }

    pub(super) fn populate(&self, largest: u64) {
        self.buffer.populate(0..largest.div_ceil(64) as usize);
    }

    /// As `turn`, on for one slot.
    pub(super) fn turn_on(&self, slot: &MemorySlot) -> io::Result<()> {
        super::turn_on(&*self.kernel, slot)
    }

    /// Turns KVM's log on, which makes the first write to every page trap, or off.
    pub(super) fn turn(&self, layout: &MemoryLayout, on: bool) -> Result<(), SlotError> {
        super::set_logging(&*self.kernel, layout, on)
    }

    /// Hands out the pages whose bits are set, slot by slot. One thread at a time.
    pub(super) fn read(&self, layout: &MemoryLayout, sink: Sink<'_>) -> Result<usize, HarvestError> {
        let mut found = 0;
        for slot in layout.slots() {
            self.kernel
                .get_dirty_log(slot, &self.buffer)
                .map_err(|source| HarvestError::GetDirtyLog { slot: slot.id, source })?;
            // SAFETY: the buffer is stored to by the kernel in get_dirty_log only, which one thread at a time
            // calls: this one.
            let words = unsafe { self.buffer.plain(0..slot.pages.div_ceil(64) as usize) };
            found += scan(words, slot, sink);
        }
        Ok(found)
    }
}

/// Room for the bitmap of a slot of this many pages.
pub(super) fn buffer(largest: u64) -> io::Result<Words> {
    Words::reserve(largest.div_ceil(64) as usize)
}
