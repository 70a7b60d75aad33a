//! Dense lists of the guest pages that changed, epoch by epoch, over the KVM of a stock Linux kernel.
//!
//! A VMM that checkpoints, replicates or migrates a virtual machine needs to know *which pages changed since
//! the last time it asked*. The usual answer is a bitmap over all of memory, fetched, cleared and searched
//! for every epoch: a cost that grows with the VM. This crate answers with one contiguous, de-duplicated
//! slice of guest frame numbers, at a cost that grows with the number of dirty pages only.
//!
//! # The life of a tracker
//!
//! ```text
//! DirtyBackend::probe ── before the first vCPU ──► Tracker::new ──► enable
//!                                                                │
//!    ┌─── guest runs; fetch(), pending(), should_stop(), ring_full() ◄──┤
//!    ▼                                                           │
//!  vCPUs stop, read their state, harvest_vcpu(i)                 │
//!    ▼                                                           │
//!  stopped() ─► state_saved() ─► harvest() ─► rearm() ─► pages(), copied() ─► run()
//! ```
//!
//! The order of the last line is a typestate ([`Epoch`]): reading the pages before they are re-armed, or
//! re-arming before the harvest, does not compile. An epoch that is dropped half way loses nothing; its pages
//! are part of the next one.
//!
//! Slots and vCPUs can come and go meanwhile: [`Tracker::add_slot`], [`Tracker::remove_slot`],
//! [`Tracker::add_vcpu`], [`Tracker::park_vcpu`].
//!
//! # Verbs
//!
//! The design goes back to a memory tracking interface proposed for KVM in 2016 by Lei Cao. Its verbs are
//! here:
//!
//! | 2016 | here |
//! |---|---|
//! | `KVM_INIT_MT` | [`DirtyBackend::probe`], [`Tracker::new`]; dropping the tracker is the clean-up |
//! | `KVM_ENABLE_MT` | [`Tracker::enable`], [`Tracker::disable`]: the only places that allocate or free memory |
//! | `KVM_PREPARE_MT_CP` | [`Epoch::run`]: forgets the last epoch in O(its dirty pages) |
//! | `KVM_MT_SUBLIST_FETCH` | [`Tracker::fetch`] from any thread; [`Tracker::harvest_vcpu`] in each vCPU's, [`Epoch::pages`], [`Tracker::part`] |
//! | `MT_FETCH_WAIT`, `MT_FETCH_REARM` | [`Fetch`] |
//! | `KVM_RESET_DIRTY_PAGES` | [`Epoch::rearm`], [`Fetched::rearm`] |
//! | `KVM_MT_DIRTY_TRIGGER` | [`TrackerConfig::trigger`], [`TrackerConfig::exact`]; [`Tracker::should_stop`], [`Tracker::pending`] without a system call |
//! | `KVM_EXIT_DIRTY_LOG_FULL` | `KVM_EXIT_DIRTY_RING_FULL`, of which [`Tracker::ring_full`] says what it means: [`RingExit`] |
//! | the global list | [`GlobalLog`], `RegionLog` |
//!
//! # Hot pages
//!
//! The trap at the first write of a page is the guest's cost of tracking: some microseconds, against a tenth
//! of a microsecond to harvest and re-arm the page and a third to copy it. So pages that are written in
//! nearly every epoch are not re-armed ([`TrackerConfig::hot`]): they stay writable, every epoch reports them
//! as pages that may have changed ([`Epoch::hot`]), and they are armed again now and then to see whether they
//! are still written. Every page is either armed or reported, so no write goes unseen.
//! `DirtyBackend::with_self_test` proves that the kernel supports this and measures what it saves.
//!
//! # Limits and what happens at them
//!
//! Everything has a fixed capacity. Reaching it never loses a page, except for the last of these:
//!
//! | full | then |
//! |---|---|
//! | list of a vCPU | further entries stay in the ring until the epoch ends |
//! | global list | a flag makes the next harvest scan the global bitmap: slow, but right |
//! | epoch list, beyond `max_dirty_pages` | continues into address space reserved for every page of the VM |
//! | the trigger | [`Tracker::should_stop`]; with [`TrackerConfig::exact`] KVM stops the vCPUs |
//! | hot pages | further ones are armed in every epoch, as if they were not hot |
//! | KVM ring | KVM stops the vCPU (`KVM_EXIT_DIRTY_RING_FULL`); [`Tracker::ring_full`] says whether to end the epoch |
//! | KVM ring overrun (emulated guest code can) | [`HarvestError::Overrun`]: tracking is over, synchronise in full |
//!
//! # What KVM does not see
//!
//! No log of KVM has the writes by the VMM itself, by `io_uring`, `readv`, vhost or a passed-through device.
//! Give `vm-memory` the `RegionLog` as its bitmap type, and call [`GlobalLog::mark_range`] for everything
//! that goes through a raw pointer or is written by the kernel. [`audit::Auditor`] finds the writes that a
//! VMM forgets to mark.
//!
//! Memory that no KVM guest writes, but this process does, is tracked by `Tracker::of_memory` (feature `uffd`).

// The models use only a part of the compiled code.
#![cfg_attr(all(test, loom), allow(dead_code))]

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("outlive-dirty is for KVM on x86-64 and 64-bit Arm Linux");

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

// Under loom only the lock-free parts are compiled; their models are in `models.rs`.
#[cfg(all(feature = "kvm-ioctls", not(all(test, loom))))]
mod adapters;
#[cfg(not(all(test, loom)))]
pub mod audit;
#[cfg(not(all(test, loom)))]
mod backend;
mod bits;
#[cfg(not(all(test, loom)))]
mod epoch;
#[cfg(not(all(test, loom)))]
mod flat;
mod gate;
mod global;
#[cfg(not(all(test, loom)))]
mod hot;
#[cfg(not(all(test, loom)))]
mod ioctl;
#[cfg(not(all(test, loom)))]
mod kvm;
mod lane;
mod layout;
#[cfg(all(feature = "vm-memory", not(all(test, loom))))]
mod memory;
#[cfg(all(target_arch = "x86_64", not(all(test, loom))))]
mod mint;
#[cfg(all(not(target_arch = "x86_64"), not(all(test, loom))))]
#[path = "mint_nothing.rs"]
mod mint;
#[cfg(not(all(test, loom)))]
pub mod rate;
#[cfg(not(all(test, loom)))]
mod report;
#[cfg(all(feature = "self-test", not(all(test, loom))))]
mod selftest;
#[cfg(not(all(test, loom)))]
mod source;
mod sync;
#[cfg(not(all(test, loom)))]
mod tracker;
mod words;

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(all(feature = "kvm-ioctls", not(all(test, loom))))]
pub use adapters::KvmFile;
#[cfg(not(all(test, loom)))]
pub use backend::{BackendChoice, DirtyBackend, DirtyKind, ProbeError};
#[cfg(not(all(test, loom)))]
pub use epoch::{Copied, Epoch, Harvested, Part, Rearmed, StateSaved, Stopped};
pub use global::GlobalLog;
#[cfg(not(all(test, loom)))]
pub use hot::{Comparison, HotPages, HotRule};
#[cfg(not(all(test, loom)))]
pub use kvm::SignalsBlocked;
pub use layout::{Gfn, LayoutError, MemoryLayout, MemorySlot, PAGE_SIZE};
#[cfg(all(feature = "vm-memory", not(all(test, loom))))]
pub use memory::{LogSlice, RegionLog};
#[cfg(all(feature = "self-test", not(all(test, loom))))]
pub use selftest::{SelfTest, SelfTestError};
#[cfg(all(any(test, feature = "uffd"), not(all(test, loom))))]
pub use source::UffdError;
#[cfg(not(all(test, loom)))]
pub use source::{HarvestError, RearmError};
#[cfg(not(all(test, loom)))]
pub use tracker::{
    AddSlotError, AddVcpuError, DisableError, EnableError, Estimate, Fetch, Fetched, NewError,
    RemoveSlotError, RingExit, Shard, SlotStart, Tracker, TrackerBusy, TrackerConfig, TrackerStats,
};

/// KVM_RUN returns with this exit reason when the dirty ring of a vCPU is full, or its share of an exact
/// trigger is used up; then call [`Tracker::ring_full`]. kvm-ioctls has no name for it:
/// `VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)`.
pub const KVM_EXIT_DIRTY_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
