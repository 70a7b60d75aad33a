//! The back ends: where the dirty pages of vCPUs come from.
// UNSAFETY: the bitmap back end reads its buffer as plain words, for speed.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::kvm::{Kernel, SignalsBlocked};
use crate::layout::{Gfn, Layout, Slot};
use crate::ring::Ring;
use crate::words::Words;

/// Why dirty pages could not be taken. What was taken before the error comes with the next harvest.
#[derive(Debug, thiserror::Error)]
pub enum HarvestError {
    /// KVM wrote over ring entries before they were read (or calls an empty ring full, which is what follows
    /// from that), so dirty pages are lost. Fatal for tracking: the caller must synchronise all of memory with
    /// other means. It cannot happen to code that runs natively; kvm_pvm does it when it emulates CPL0 code.
    #[error("the dirty ring of vCPU {vcpu} was overrun: dirty pages are lost, synchronise in full")]
    Overrun {
        /// The vCPU whose ring it is.
        vcpu: usize,
    },
    /// Another thread is taking the pages of this vCPU at this moment: wait for it (a barrier) and harvest again.
    #[error("another thread is harvesting vCPU {vcpu}")]
    Busy {
        /// The vCPU.
        vcpu: usize,
    },
    /// Tracking has failed for good in an earlier step ([`RearmError::Count`], [`RearmError::Protect`]):
    /// synchronise in full by other means.
    #[error("dirty tracking has failed earlier, synchronise in full")]
    Failed,
    /// The tracker is not enabled.
    #[error("dirty tracking is not enabled")]
    NotEnabled,
    /// KVM_GET_DIRTY_LOG failed.
    #[error("cannot get the dirty log of memory slot {slot}")]
    GetDirtyLog {
        /// The slot number.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why the harvested pages could not be re-armed.
#[derive(Debug, thiserror::Error)]
pub enum RearmError {
    /// KVM_RESET_DIRTY_RINGS failed.
    #[error("cannot reset the dirty rings")]
    Reset(#[source] io::Error),
    /// KVM freed another number of ring entries than were harvested: somebody else resets or marks entries of
    /// this VM. Tracking cannot be trusted any more.
    #[error("KVM reset {reset} dirty ring entries, not the {harvested} that were harvested")]
    Count {
        /// Entries that were harvested.
        harvested: u64,
        /// Entries that KVM freed.
        reset: u64,
    },
    /// After an interrupted reset all of memory must be write-protected again, and that failed.
    #[error("cannot write-protect memory slot {slot} again")]
    Protect {
        /// The slot number.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What a back end reports of an entry or a bit: a page, or something that is no page of the layout.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(Option<Gfn>);

/// A log that the kernel keeps of the writes of vCPUs. The caller sees to it that a vCPU's part is taken by one
/// thread at a time and all the rest is done by the one thread that holds the epoch.
pub(crate) trait Source: Send + Sync {
    /// Takes memory for what epochs need.
    fn populate(&self);

    /// Takes the pages that a vCPU logged, and says how many entries there were.
    fn take_vcpu(&self, layout: &Layout, vcpu: usize, sink: Sink<'_>) -> Result<usize, HarvestError>;

    /// Takes the pages that are in no vCPU's log.
    fn take_shared(
        &self,
        kernel: &dyn Kernel,
        layout: &Layout,
        sink: Sink<'_>,
    ) -> Result<usize, HarvestError>;

    /// Makes KVM trap the next write to every page taken. True if all of memory had to be armed for that.
    fn rearm(&self, kernel: &dyn Kernel, layout: &Layout) -> Result<bool, RearmError>;

    /// Entries logged since the epoch began, as far as can be seen without a system call.
    fn pending(&self) -> usize;

    /// Whether KVM's word that the ring of this vCPU is full can be true.
    fn can_be_full(&self, vcpu: usize) -> bool;

    /// A new epoch begins.
    fn begin(&self);
}

/// One dirty ring a vCPU.
pub(crate) struct Rings {
    rings: Vec<Ring>,
    /// Only tests leave signals in, to see what they do.
    pub(crate) block_signals: bool,
}

impl Rings {
    pub(crate) fn new(rings: Vec<Ring>) -> Rings {
        Rings { rings, block_signals: true }
    }

    /// Returns whether KVM was interrupted on the way.
    fn reset(&self, kernel: &dyn Kernel, harvested: u64) -> Result<bool, RearmError> {
        let _blocked = self.block_signals.then(SignalsBlocked::now);
        let (mut reset, mut interrupted, mut idle) = (0, false, 0);
        while reset < harvested {
            match kernel.reset_dirty_rings() {
                Ok(0) => idle += 1,
                Ok(some) => (reset, idle) = (reset + some, 0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => idle += 1,
                Err(error) => return Err(RearmError::Reset(error)),
            }
            interrupted |= reset < harvested;
            if idle > MAX_IDLE_RESETS {
                break;
            }
        }
        if reset != harvested {
            return Err(RearmError::Count { harvested, reset });
        }
        Ok(interrupted)
    }
}

/// So many resets in a row may free nothing. Signals are blocked; a debugger or the freezer can still interrupt.
const MAX_IDLE_RESETS: u32 = 10_000;

impl Source for Rings {
    fn populate(&self) {}

    fn take_vcpu(&self, layout: &Layout, vcpu: usize, sink: Sink<'_>) -> Result<usize, HarvestError> {
        let taken = self.rings[vcpu].take(|slot, offset| sink(layout.resolve(slot, offset)));
        taken.map_err(|_| HarvestError::Overrun { vcpu })
    }

    fn take_shared(&self, _: &dyn Kernel, _: &Layout, _: Sink<'_>) -> Result<usize, HarvestError> {
        Ok(0)
    }

    fn rearm(&self, kernel: &dyn Kernel, layout: &Layout) -> Result<bool, RearmError> {
        let harvested = self.rings.iter().map(Ring::unfreed).sum();
        if harvested == 0 {
            return Ok(false);
        }
        let interrupted = self.reset(kernel, harvested)?;
        self.rings.iter().for_each(Ring::all_freed);
        if interrupted {
            protect_all(kernel, layout)?;
        }
        Ok(interrupted)
    }

    fn pending(&self) -> usize {
        self.rings.iter().map(Ring::pending).sum()
    }

    fn can_be_full(&self, vcpu: usize) -> bool {
        !self.rings[vcpu].is_empty()
    }

    fn begin(&self) {
        self.rings.iter().for_each(Ring::begin);
    }
}

/// Write-protects all of memory by turning logging off and on: about 5 ms a GiB, for the rare case that KVM may
/// have freed entries without protecting their pages. The vCPUs are stopped.
fn protect_all(kernel: &dyn Kernel, layout: &Layout) -> Result<(), RearmError> {
    for slot in layout.slots() {
        let toggled = kernel.set_logging(slot, false).and_then(|()| kernel.set_logging(slot, true));
        toggled.map_err(|source| RearmError::Protect { slot: slot.id, source })?;
    }
    Ok(())
}

/// KVM's dirty bitmap of every slot, fetched, cleared and re-armed by one KVM_GET_DIRTY_LOG each.
pub(crate) struct Bitmap {
    buffer: Words,
    entries: AtomicU64,
}

impl Bitmap {
    pub(crate) fn reserve(layout: &Layout) -> io::Result<Bitmap> {
        let largest = layout.slots().iter().map(|slot| slot.pages).max().unwrap_or(0);
        Ok(Bitmap { buffer: Words::reserve(largest.div_ceil(64) as usize)?, entries: AtomicU64::new(0) })
    }

    fn scan(&self, slot: &Slot, sink: Sink<'_>) -> usize {
        // SAFETY: the buffer is stored to by the kernel in get_dirty_log only, which the one thread that holds
        // the epoch calls, and that thread is here.
        let words = unsafe { self.buffer.plain(0..slot.pages.div_ceil(64) as usize) };
        let mut found = 0;
        // Most blocks are empty; looking at a whole one takes a few vector instructions.
        for (block, words) in words.chunks(BLOCK).enumerate() {
            if words.iter().fold(0, |all, word| all | word) == 0 {
                continue;
            }
            for (index, mut word) in words.iter().copied().enumerate() {
                while word != 0 {
                    let offset = (block * BLOCK + index) as u64 * 64 + u64::from(word.trailing_zeros());
                    sink((offset < slot.pages).then(|| Gfn(slot.base.0 + offset)));
                    found += 1;
                    word &= word - 1;
                }
            }
        }
        found
    }
}

/// Words looked at together by the scan.
const BLOCK: usize = 16;

impl Source for Bitmap {
    fn populate(&self) {
        self.buffer.populate(0..self.buffer.len());
    }

    fn take_vcpu(&self, _: &Layout, _: usize, _: Sink<'_>) -> Result<usize, HarvestError> {
        Ok(0)
    }

    fn take_shared(
        &self,
        kernel: &dyn Kernel,
        layout: &Layout,
        sink: Sink<'_>,
    ) -> Result<usize, HarvestError> {
        let mut found = 0;
        for slot in layout.slots() {
            kernel
                .get_dirty_log(slot, &self.buffer)
                .map_err(|source| HarvestError::GetDirtyLog { slot: slot.id, source })?;
            found += self.scan(slot, sink);
        }
        self.entries.fetch_add(found as u64, Ordering::Relaxed);
        Ok(found)
    }

    fn rearm(&self, _: &dyn Kernel, _: &Layout) -> Result<bool, RearmError> {
        // KVM_GET_DIRTY_LOG has done it.
        Ok(false)
    }

    fn pending(&self) -> usize {
        self.entries.load(Ordering::Relaxed) as usize
    }

    fn can_be_full(&self, _: usize) -> bool {
        false
    }

    fn begin(&self) {
        self.entries.store(0, Ordering::Relaxed);
    }
}
