//! The dirty ring with nothing around it: no lists, no dedupe, no checks, signals not blocked, and hot pages
//! known beforehand. This is not a peer but the floor: the cost of the kernel's part of a ring on this
//! machine (`--floor`).
// UNSAFETY: the ring is memory shared with the kernel; ioctls.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_enable_cap};
use kvm_ioctls::VmFd;
use outlive_dirty::{Gfn, PAGE_SIZE};
use vmm_sys_util::ioctl::ioctl_with_val;
use vmm_sys_util::ioctl_io_nr;

use crate::guest::Vcpu;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

const ENTRIES: usize = 65536;
/// No slot has this number: a reset frees the entry and protects nothing.
const NO_SLOT: u32 = 0xffff;

#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

pub(crate) struct Bare {
    ring: &'static [Entry],
    position: usize,
    pages: Vec<Gfn>,
    hot: Vec<Gfn>,
    trapped: usize,
}

/// Gives the VM rings, before its first vCPU.
pub(crate) fn enable(vm: &VmFd) {
    let bytes = (ENTRIES * size_of::<Entry>()) as u64;
    let capability =
        kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, args: [bytes, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&capability).expect("a dirty ring");
}

impl Bare {
    /// The mapping is never undone: the program ends soon.
    pub(crate) fn new(vcpu: &Vcpu, max_dirty: usize) -> Bare {
        let (bytes, prot) = (ENTRIES * size_of::<Entry>(), libc::PROT_READ | libc::PROT_WRITE);
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, vcpu.fd.as_raw_fd(), offset)
        };
        assert_ne!(base, libc::MAP_FAILED, "the dirty ring cannot be mapped");
        // SAFETY: all entries are mapped, forever, and reached as atomics only.
        let ring = unsafe { std::slice::from_raw_parts(base.cast::<Entry>(), ENTRIES) };
        Bare {
            ring,
            position: 0,
            pages: Vec::with_capacity(max_dirty),
            hot: Vec::with_capacity(max_dirty),
            trapped: 0,
        }
    }

    /// Takes the entries. Pages for which `is_hot` holds stay writable, and belong to every epoch.
    pub(crate) fn harvest(&mut self, is_hot: impl Fn(Gfn) -> bool) {
        self.pages.clear();
        self.pages.extend_from_slice(&self.hot);
        let hot = self.pages.len();
        loop {
            let entry = &self.ring[self.position % ENTRIES];
            if entry.flags.load(Ordering::Acquire) != 1 {
                self.trapped = self.pages.len() - hot;
                return;
            }
            let gfn = Gfn(entry.offset.load(Ordering::Relaxed));
            self.pages.push(gfn);
            if is_hot(gfn) {
                entry.slot.store(NO_SLOT, Ordering::Relaxed);
                self.hot.push(gfn);
            }
            entry.flags.store(2, Ordering::Release);
            self.position += 1;
        }
    }

    pub(crate) fn reset(&mut self, vm: &VmFd) {
        // SAFETY: takes no argument.
        let freed = unsafe { ioctl_with_val(vm, KVM_RESET_DIRTY_RINGS(), 0) };
        assert!(freed >= 0, "KVM_RESET_DIRTY_RINGS");
    }

    pub(crate) fn pages(&self) -> &[Gfn] {
        &self.pages
    }

    /// Pages of this epoch that came from the ring.
    pub(crate) fn trapped(&self) -> usize {
        self.trapped
    }
}
