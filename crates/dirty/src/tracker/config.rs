//! The limits of a tracker, and the errors of making it and of turning it on and off.

use std::io;

use crate::hot::HotPages;
use crate::source::{HarvestError, RearmError};

/// Limits chosen by the caller. Begin from [`TrackerConfig::default`] and change what differs:
///
/// ```
/// use outlive_dirty::{HotPages, TrackerConfig};
/// let config = TrackerConfig::default().with_max_dirty_pages(4000).with_trigger(2000).with_hot(HotPages::Auto);
/// assert_eq!((config.trigger, config.exact), (2000, false));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrackerConfig {
    /// The most vCPUs of the VM, for [`crate::Tracker::add_vcpu`]. 0, the default: as many as descriptors are
    /// given, and none can be added. Each costs only address space until it is added.
    pub max_vcpus: usize,
    /// The most memory slots of the VM at the same time, for [`crate::Tracker::add_slot`]. 0, the default:
    /// the slots of the layout, and none can be added. Otherwise the lists are reserved (as address space,
    /// about 50 bytes a page) for all the pages that the global list covers, which limits how high slots may
    /// be.
    pub max_slots: usize,
    /// The most dirty pages (of 4 KiB) expected in an epoch: `enable` takes memory for their lists, 8 bytes a
    /// page for each vCPU and 24 for the VM. An epoch with more pages loses none, but its harvest takes
    /// memory and time.
    pub max_dirty_pages: usize,
    /// Dirty pages, over all vCPUs, the global list and the hot pages, at which
    /// [`crate::Tracker::should_stop`] becomes true.
    pub trigger: usize,
    /// KVM itself stops the vCPUs at the trigger, with [`crate::KVM_EXIT_DIRTY_RING_FULL`]. Only the ring
    /// back end can do this; elsewhere the trigger is polled, and [`crate::Tracker::is_exact`] says which.
    /// One vCPU stops after exactly this many entries. Several together never exceed it (each may always
    /// write one page), and stop before it by the unused rest of the others' last parts. Device writes cannot
    /// stop a vCPU: poll `should_stop` for them. While pages are fetched by [`crate::Shard`] it holds only as
    /// long as every shard is fetched: a fetch also re-arms pages of other shards, which makes room for more.
    ///
    /// Intel processors with page modification logging add up to 512 entries at once, so there it is only a
    /// lower bound. Needs a ring larger than the trigger.
    pub exact: bool,
    /// Whether pages that are written all the time stay writable and are reported in every epoch.
    pub hot: HotPages,
}

impl Default for TrackerConfig {
    /// 16,384 pages an epoch, a polled trigger at half of them, no hot pages.
    fn default() -> TrackerConfig {
        TrackerConfig {
            max_vcpus: 0,
            max_slots: 0,
            max_dirty_pages: 16_384,
            trigger: 8_192,
            exact: false,
            hot: HotPages::Off,
        }
    }
}

impl TrackerConfig {
    /// The same with another [`TrackerConfig::max_vcpus`].
    #[must_use]
    pub const fn with_max_vcpus(self, max_vcpus: usize) -> TrackerConfig {
        TrackerConfig { max_vcpus, ..self }
    }

    /// The same with another [`TrackerConfig::max_slots`].
    #[must_use]
    pub const fn with_max_slots(self, max_slots: usize) -> TrackerConfig {
        TrackerConfig { max_slots, ..self }
    }

    /// The same with another [`TrackerConfig::max_dirty_pages`].
    #[must_use]
    pub const fn with_max_dirty_pages(self, max_dirty_pages: usize) -> TrackerConfig {
        TrackerConfig { max_dirty_pages, ..self }
    }

    /// The same with another [`TrackerConfig::trigger`].
    #[must_use]
    pub const fn with_trigger(self, trigger: usize) -> TrackerConfig {
        TrackerConfig { trigger, ..self }
    }

    /// The same with or without [`TrackerConfig::exact`].
    #[must_use]
    pub const fn with_exact(self, exact: bool) -> TrackerConfig {
        TrackerConfig { exact, ..self }
    }

    /// The same with other [`TrackerConfig::hot`] pages.
    #[must_use]
    pub const fn with_hot(self, hot: HotPages) -> TrackerConfig {
        TrackerConfig { hot, ..self }
    }
}

/// Why a tracker could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NewError {
    /// userfaultfd or PAGEMAP_SCAN cannot be used.
    #[error("memory of this process cannot be tracked")]
    #[cfg(any(test, feature = "uffd"))]
    Uffd(#[source] crate::source::UffdError),
    /// A VM has at least one vCPU.
    #[error("a tracker needs at least one vCPU")]
    NoVcpus,
    /// More vCPU descriptors than [`TrackerConfig::max_vcpus`].
    #[error("{given} vCPU descriptors were given for at most {max_vcpus} vCPUs")]
    TooManyVcpus {
        /// Descriptors given.
        given: usize,
        /// [`TrackerConfig::max_vcpus`].
        max_vcpus: usize,
    },
    /// More memory slots than [`TrackerConfig::max_slots`].
    #[error("the layout has {given} memory slots, and at most {max_slots} are configured")]
    TooManySlots {
        /// Slots of the layout.
        given: usize,
        /// [`TrackerConfig::max_slots`].
        max_slots: usize,
    },
    /// The trigger must be from 1 to `max_dirty_pages`.
    #[error("the dirty trigger of {trigger} pages is not between 1 and max_dirty_pages = {max_dirty_pages}")]
    Trigger {
        /// `TrackerConfig::trigger`.
        trigger: usize,
        /// `TrackerConfig::max_dirty_pages`.
        max_dirty_pages: usize,
    },
    /// The global list does not cover all of memory.
    #[error("the global list covers {covered} frame numbers, the layout has {needed}")]
    GlobalLogSize {
        /// The frame numbers that the global list covers.
        covered: u64,
        /// The frame numbers of the layout: [`crate::MemoryLayout::gfn_space`].
        needed: u64,
    },
    /// Another tracker of this back end lives. Two would take each other's pages, and the first to be dropped
    /// turns the log of both off.
    #[error("the back end is in use by another tracker: make one tracker for the life of a VM")]
    BackendTaken,
    /// The global list belongs to another tracker.
    #[error("the global list is in use by another tracker")]
    GlobalLogTaken,
    /// A ring could not be mapped.
    #[error("cannot map the dirty ring of vCPU {vcpu}")]
    Map {
        /// The vCPU.
        vcpu: usize,
        /// The kernel's error.
        source: io::Error,
    },
    /// A vCPU has no ring of the back end's size: it belongs to another VM than the one that was probed. Only
    /// the size is compared: a vCPU of another VM whose ring is as large or larger is accepted, and the writes
    /// of the vCPU that it stands for go unseen.
    #[error("vCPU {vcpu} has no dirty ring of this VM's size: is it a vCPU of another VM?")]
    NotThisVm {
        /// The vCPU.
        vcpu: usize,
    },
    /// The descriptors of two vCPUs are of one and the same.
    #[error("vCPUs {other} and {vcpu} have the same dirty ring: was one descriptor given twice?")]
    SameVcpu {
        /// The vCPU.
        vcpu: usize,
        /// An earlier one.
        other: usize,
    },
    /// Another tracker has read the ring of a vCPU before, so nobody knows where KVM writes next.
    #[error("the dirty ring of vCPU {vcpu} has been used before: make one tracker for the life of a VM")]
    RingUsed {
        /// The vCPU.
        vcpu: usize,
    },
    /// The VM's descriptor could not be duplicated.
    #[error("cannot duplicate the descriptor of the VM")]
    Vm(#[source] io::Error),
    /// Address space for the lists could not be reserved.
    #[error("cannot reserve address space for the dirty lists")]
    Reserve(#[source] io::Error),
}

/// Why tracking was not enabled. Nothing stays on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnableError {
    /// It is enabled already.
    #[error("dirty tracking is enabled already")]
    Already,
    /// An epoch is open.
    #[error("an epoch is open")]
    EpochOpen,
    /// A vCPU thread is harvesting: the VM is not stopped.
    #[error("vCPU {0} is being harvested")]
    Busy(usize),
    /// The tracker has met a ring overrun or a wrong reset count; the rings of a VM do not recover from
    /// either.
    #[error("dirty tracking of this VM has failed earlier and cannot be enabled again")]
    Failed,
    /// KVM_SET_USER_MEMORY_REGION failed.
    #[error("cannot turn on the dirty log of memory slot {slot}")]
    Protect {
        /// The slot number.
        slot: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// Entries that KVM had logged before could not be cleared.
    #[error("cannot clear the dirty log")]
    Leftovers(#[source] HarvestError),
    /// Fetched pages are not re-armed yet.
    #[error("fetched pages are not re-armed yet")]
    Fetching,
    /// The same, at its reset: tracking of this VM has failed for good.
    #[error("cannot clear the dirty log")]
    LeftoverReset(#[source] RearmError),
}

/// Why tracking was not disabled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DisableError {
    /// An epoch is open: drop it first.
    #[error("an epoch is open")]
    EpochOpen,
    /// A vCPU thread is harvesting: the VM is not stopped.
    #[error("vCPU {0} is being harvested")]
    Busy(usize),
    /// Fetched pages are not re-armed yet: drop them first.
    #[error("fetched pages are not re-armed yet")]
    Fetching,
    /// KVM_SET_USER_MEMORY_REGION failed; the slot is still logged, everything else is off.
    #[error("cannot turn off the dirty log of memory slot {slot}")]
    Protect {
        /// The slot number.
        slot: u32,
        /// The kernel's error.
        source: io::Error,
    },
}
