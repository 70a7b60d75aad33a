//! The back ends: where dirty pages come from. A new one implements [`Source`] and gets a `DirtyKind` in
//! `backend.rs`.

mod bitmap;
mod budget;
mod clear;
mod log;
#[cfg(any(test, feature = "uffd"))]
mod pagemap;
#[cfg(any(test, feature = "planted-bug"))]
pub(crate) mod planted;
pub(crate) mod ring;
mod rings;
mod scan;
#[cfg(any(test, feature = "uffd"))]
mod uffd;
#[cfg(any(test, feature = "uffd"))]
mod uffd_error;

use std::io;
use std::os::fd::OwnedFd;

use crate::layout::{Gfn, MemoryLayout, MemorySlot};
use ring::{Fullness, Ring};

pub(crate) use bitmap::Bitmap;
pub(crate) use clear::ClearLog;
pub(crate) use rings::Rings;
#[cfg(any(test, feature = "uffd"))]
pub(crate) use uffd::Uffd;
#[cfg(any(test, feature = "uffd"))]
pub use uffd_error::UffdError;

/// Why dirty pages could not be taken. Pages taken before the error come with the next harvest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarvestError {
    /// KVM overwrote ring entries before they were read (or calls an empty ring full, which follows from
    /// that), so dirty pages are lost. Fatal for tracking: the caller must synchronise all of memory by other
    /// means. It cannot happen to code that runs natively; kvm_pvm does it when it emulates CPL0 code.
    #[error("the dirty ring of vCPU {vcpu} was overrun: dirty pages are lost, synchronise in full")]
    Overrun {
        /// The vCPU whose ring it is.
        vcpu: usize,
    },
    /// Another thread is taking the pages of this vCPU at the moment: wait for it (a barrier) and harvest
    /// again.
    #[error("another thread is harvesting vCPU {vcpu}")]
    Busy {
        /// The vCPU.
        vcpu: usize,
    },
    /// Tracking has failed for good in an earlier step ([`RearmError::Count`], [`RearmError::Protect`]):
    /// synchronise in full by other means.
    #[error("dirty tracking has failed earlier, synchronise in full")]
    Failed,
    /// Threads hold fetched pages that they have not re-armed: the epoch cannot end without them.
    #[error("fetched pages are not re-armed yet")]
    Fetching,
    /// The tracker is not enabled.
    #[error("dirty tracking is not enabled")]
    NotEnabled,
    /// KVM_GET_DIRTY_LOG (or PAGEMAP_SCAN) failed: the slot may be gone.
    #[error("cannot get the dirty log of memory slot {slot}")]
    GetDirtyLog {
        /// The slot number.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why the harvested pages could not be re-armed. Tracking is over: pages may be written unseen, so
/// synchronise in full by other means.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RearmError {
    /// KVM_RESET_DIRTY_RINGS failed.
    #[error("cannot reset the dirty rings")]
    Reset(#[source] io::Error),
    /// KVM freed a different number of ring entries than were harvested: somebody else resets or marks
    /// entries of this VM. Tracking cannot be trusted any more.
    #[error("KVM reset {reset} dirty ring entries, not the {harvested} that were harvested")]
    Count {
        /// Entries that were harvested.
        harvested: u64,
        /// Entries that KVM freed.
        reset: u64,
    },
    /// KVM_CLEAR_DIRTY_LOG failed.
    #[error("cannot clear the dirty log of memory slot {slot}")]
    Clear {
        /// The slot number.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
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

/// The error for a memory slot.
#[derive(Debug)]
pub(crate) struct SlotError {
    pub(crate) slot: u32,
    pub(crate) source: io::Error,
}

/// Takes each report of a back end: a page, or an entry that is no page of the layout. False if there is no
/// room for it now; then the next take reports it again.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(Option<Gfn>) -> bool;

/// Gets a page that will probably be reported soon, so that its data can be fetched into the cache.
pub(crate) type Hint<'a> = &'a dyn Fn(Gfn);

/// How to arm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Pages that were taken and stay unarmed; it must be possible to arm each of them later.
    pub(crate) keep: usize,
    /// Pages that vCPUs may dirty in the coming epoch before they are stopped, if the back end can do that.
    pub(crate) room: Option<usize>,
    /// vCPUs run meanwhile.
    pub(crate) running: bool,
    /// Arms all of memory, because an earlier call was not sure of its result.
    pub(crate) everything: bool,
}

impl Plan {
    /// Arms some pages while the guest runs, and changes nothing else.
    pub(crate) const RUNNING: Plan = Plan { keep: usize::MAX, room: None, running: true, everything: false };
}

/// The armed pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Armed {
    /// This many of the pages, from the first.
    pub(crate) pages: usize,
    /// All of memory was armed as well.
    pub(crate) everything: bool,
    /// KVM was interrupted, vCPUs ran, and the pages may not be armed after all.
    pub(crate) doubtful: bool,
    /// [`MemoryLayout::first_page`] was written while KVM was made to write it as well, and is armed now.
    pub(crate) first_page: bool,
}

/// The kernel's log of writes. One thread at a time takes a vCPU's part, and one thread at a time the shared
/// part; any thread may call `arm`.
pub(crate) trait Source: Send + Sync {
    /// Takes memory for epochs over slots of at most this many pages.
    fn populate(&self, largest: u64);

    /// Makes the first write to every page of a later slot trap, whatever its log was before.
    fn arm_slot(&self, _slot: &MemorySlot) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The vCPU that has this ring already, which nobody has read.
    fn owner_of(&self, _ring: &Ring) -> Option<usize> {
        None
    }

    /// A vCPU was added, with its ring if the back end has any, and with its descriptor if entries are to be
    /// minted. One at a time.
    fn admit(&self, _ring: Option<Ring>, _vcpu: Option<OwnedFd>) {}

    /// A vCPU no longer runs, or runs again.
    fn park(&self, _vcpu: usize, _parked: bool) {}

    /// Makes the first write to every page trap.
    fn arm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError>;

    /// Lets all writes through.
    fn disarm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError>;

    /// Takes the pages that a vCPU logged, and returns how many entries there were.
    fn take_vcpu(
        &self,
        layout: &MemoryLayout,
        vcpu: usize,
        hint: Hint<'_>,
        sink: Sink<'_>,
    ) -> Result<usize, HarvestError>;

    /// Takes the pages that are in no vCPU's log and stay unarmed until `arm`.
    fn take_shared(&self, _layout: &MemoryLayout, _sink: Sink<'_>) -> Result<usize, HarvestError> {
        Ok(0)
    }

    /// Takes pages that are in no vCPU's log and arms them in the same step, so nothing can be left out.
    /// Either an epoch is ending, or a thread fetches.
    fn take_armed(
        &self,
        _layout: &MemoryLayout,
        _ending: bool,
        _sink: Sink<'_>,
    ) -> Result<usize, HarvestError> {
        Ok(0)
    }

    /// Makes the next write to each of these pages trap. All of them were taken and are not armed.
    fn arm(&self, layout: &MemoryLayout, pages: &[Gfn], plan: Plan) -> Result<Armed, RearmError>;

    /// Entries logged since the epoch began, as far as can be seen without a system call.
    fn pending(&self) -> usize {
        0
    }

    /// Whether `pending` counts every page that vCPUs have logged.
    fn counts(&self) -> bool {
        false
    }

    /// Whether KVM lets this vCPU write on.
    fn has_room(&self, _vcpu: usize) -> bool {
        true
    }

    /// Judges KVM's report that the ring of this vCPU is full. Without rings nothing is lost by such a report.
    fn fullness(&self, _vcpu: usize) -> Fullness {
        Fullness::NotNow
    }

    /// KVM says that the ring of this vCPU is full. Returns whether the vCPU may write more after all,
    /// because the limit covers all vCPUs together and others have left some of it.
    fn top_up(&self, _vcpu: usize) -> Result<bool, RearmError> {
        Ok(false)
    }

    /// Held entries of all vCPUs.
    fn credits(&self) -> u64 {
        0
    }

    /// Whether vCPUs are stopped at the planned number of pages.
    fn is_exact(&self) -> bool {
        false
    }

    /// A new epoch begins.
    fn begin(&self) {}
}

/// Turns KVM's logging of a slot on. First off: if it is on already, KVM would do nothing, and pages that
/// were written before would stay writable.
fn turn_on(kernel: &dyn crate::kvm::Kernel, slot: &MemorySlot) -> io::Result<()> {
    kernel.set_logging(slot, false)?;
    kernel.set_logging(slot, true)
}

/// Turns KVM's logging of every slot on, which makes the first write to every page trap, or off.
fn set_logging(kernel: &dyn crate::kvm::Kernel, layout: &MemoryLayout, on: bool) -> Result<(), SlotError> {
    let mut result = Ok(());
    for slot in layout.slots() {
        let this = kernel.set_logging(slot, on).map_err(|source| SlotError { slot: slot.id, source });
        if on && this.is_err() {
            return this;
        }
        result = result.and(this);
    }
    result
}
