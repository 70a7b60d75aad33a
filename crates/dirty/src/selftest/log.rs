//! The two logs that can leave pages out, each in the fewest lines: reading them, and giving pages back to
//! them.

use std::ops::Range;
use std::sync::atomic::Ordering;

use kvm_bindings::KVM_DIRTY_GFN_F_MASK;

use super::guest::{FIRST, Machine, PAGES, RING_ENTRIES};
use super::{SelfTestError, Way};
use crate::kvm::{Kernel, SignalsBlocked, Vm};
use crate::layout::MemorySlot;
use crate::source::ring::{DIRTY, Entry, Mapping, RESET};
use crate::words::Words;

/// A slot number that KVM gives to nobody, so that it skips the entry. The offset stays: one near 2^64 passed
/// a bound check of kernels before 6.12.91 (CVE-2026-52969).
const NO_SLOT: u32 = 0xffff;

/// A set of pages.
pub(super) type Pages = [bool; PAGES];

pub(super) struct Log {
    vm: Vm,
    slot: MemorySlot,
    kept: Kept,
}

enum Kept {
    Ring { entries: Mapping, taken: u64, freed: u64 },
    Bitmap { buffer: Words },
}

/// The place of the pages' words in the slot's bitmap.
const BITS: Range<usize> = FIRST as usize / 64..FIRST as usize / 64 + PAGES / 64;

impl Log {
    pub(super) fn new(machine: &Machine, way: Way) -> Result<Log, SelfTestError> {
        let (vm, slot) = (machine.vm().map_err(SelfTestError::at("duplicate a descriptor"))?, machine.slot());
        let kept = match way {
            Way::Ring => Kept::Ring {
                entries: Mapping::of_vcpu(machine.vcpu(), RING_ENTRIES)
                    .map_err(SelfTestError::at("map a dirty ring"))?,
                taken: 0,
                freed: 0,
            },
            Way::ClearLog => Kept::Bitmap {
                buffer: Words::reserve(slot.pages.div_ceil(64) as usize)
                    .map_err(SelfTestError::at("allocate memory"))?,
            },
        };
        Ok(Log { vm, slot, kept })
    }

    /// The next write to every page traps.
    pub(super) fn arm_all(&self) -> Result<(), SelfTestError> {
        let toggled =
            self.vm.set_logging(&self.slot, false).and_then(|()| self.vm.set_logging(&self.slot, true));
        toggled.map_err(SelfTestError::at("turn dirty logging off and on"))
    }

    /// The pages in the log: for a ring those that have come since the last call, for a bitmap all that have
    /// not been given back.
    pub(super) fn dirty(&mut self) -> Result<Pages, SelfTestError> {
        let mut pages = [false; PAGES];
        match &mut self.kept {
            Kept::Ring { entries, taken, freed } => {
                while *taken < *freed + u64::from(RING_ENTRIES) {
                    let entry = entries.entry(*taken);
                    if entry.flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
                        break;
                    }
                    if let Some(page) = page(entry) {
                        pages[page] = true;
                    }
                    *taken += 1;
                }
            }
            Kept::Bitmap { buffer } => {
                let got = self.vm.get_dirty_log(&self.slot, buffer);
                got.map_err(SelfTestError::at("get a dirty log"))?;
                for (index, page) in pages.iter_mut().enumerate() {
                    *page = buffer[BITS][index / 64].load(Ordering::Relaxed) & bit(index) != 0;
                }
            }
        }
        Ok(pages)
    }

    /// Gives back the pages of `from`, which are all pages that came since the last time: in place of each,
    /// the page that `target` makes of it will trap, or none. False if the kernel did not take back every
    /// entry.
    pub(super) fn give_back(
        &mut self,
        from: &Pages,
        target: impl Fn(usize) -> Option<usize>,
    ) -> Result<bool, SelfTestError> {
        match &mut self.kept {
            Kept::Ring { entries, taken, freed } => {
                for entry in (*freed..*taken).map(|position| entries.entry(position)) {
                    // An entry of another page (under some MMUs the guest's page tables count as written)
                    // goes back as it is.
                    match page(entry).map(&target) {
                        Some(Some(page)) => entry.offset.store(FIRST + page as u64, Ordering::Relaxed),
                        Some(None) => entry.slot.store(NO_SLOT, Ordering::Relaxed),
                        None => (),
                    }
                    entry.flags.store(RESET, Ordering::Release);
                }
                let _blocked = SignalsBlocked::now();
                let reset = self.vm.reset_dirty_rings().map_err(SelfTestError::at("reset a dirty ring"))?;
                let all = reset == *taken - *freed;
                *freed = *taken;
                Ok(all)
            }
            Kept::Bitmap { buffer } => {
                let bits = &buffer[BITS];
                bits.iter().for_each(|word| word.store(0, Ordering::Relaxed));
                for page in (0..PAGES).filter(|&page| from[page]).filter_map(target) {
                    bits[page / 64].fetch_or(bit(page), Ordering::Relaxed);
                }
                let cleared = self.vm.clear_dirty_log(&self.slot, BITS, buffer);
                cleared.map_err(SelfTestError::at("clear a dirty log")).map(|()| true)
            }
        }
    }

    /// The expected result of `dirty` when the pages of `new` were written for the first time since they were
    /// armed, and all pages but those of `armed` have been written since then.
    pub(super) fn expected(&self, new: &Pages, armed: &Pages) -> Pages {
        match self.kept {
            Kept::Ring { .. } => *new,
            Kept::Bitmap { .. } => armed.map(|armed| !armed),
        }
    }
}

/// Which of the guest's pages an entry means.
fn page(entry: &Entry) -> Option<usize> {
    let (slot, offset) = (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
    let page = usize::try_from(offset.checked_sub(FIRST)?).ok()?;
    (slot == 0 && page < PAGES).then_some(page)
}

fn bit(page: usize) -> u64 {
    1 << (page % 64)
}
