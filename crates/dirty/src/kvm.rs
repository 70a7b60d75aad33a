//! The system calls of dirty logging, on the raw descriptors of any VMM.
// UNSAFETY: ioctls take untyped arguments; each call here pairs a request with the structure that
// Documentation/virt/kvm/api.rst gives for it.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{PoisonError, RwLock};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::ioctl::checked;
use crate::layout::{MemoryLayout, MemorySlot, PAGE_SIZE};
use crate::mint;
use crate::words::Words;

ioctl_io_nr!(KVM_CHECK_EXTENSION, KVMIO, 0x03);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION, KVMIO, 0x46, kvm_userspace_memory_region);
ioctl_iow_nr!(KVM_ENABLE_CAP, KVMIO, 0xa3, kvm_enable_cap);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// The kernel's side of dirty logging for a VM. A trait so that tests can put a naive kernel behind it.
pub(crate) trait Kernel: Send + Sync {
    /// Turns the dirty log of a slot on or off. Turning it on write-protects every page of the slot.
    fn set_logging(&self, slot: &MemorySlot, on: bool) -> io::Result<()>;

    /// Copies the dirty bitmap of the slot to the front of `buffer`. Without manual protection it also clears
    /// the bitmap and write-protects its pages.
    fn get_dirty_log(&self, slot: &MemorySlot, buffer: &Words) -> io::Result<()>;

    /// Clears the bits of the slot's dirty bitmap that are set in these words of `mask`, and write-protects
    /// their pages. Needs manual protection.
    fn clear_dirty_log(&self, slot: &MemorySlot, words: Range<usize>, mask: &Words) -> io::Result<()>;

    /// Turns manual protection off, and KVM_DIRTY_LOG_INITIALLY_SET with it, even if the VMM turned it on.
    fn refuse_manual_protect(&self);

    /// Makes KVM write at least `entries` entries into the ring of a vCPU, and leaves memory as it was. The
    /// vCPUs are stopped.
    fn mint(&self, vcpu: usize, entries: u64, layout: &MemoryLayout) -> io::Result<()>;

    /// A vCPU was added; entries may have to be minted for it.
    fn admit(&self, _vcpu: OwnedFd) {}

    /// Frees the ring entries marked for reset and write-protects their pages. Returns how many, over all
    /// rings.
    fn reset_dirty_rings(&self) -> io::Result<u64>;
}

/// A VM of the running kernel.
pub(crate) struct Vm {
    vm: OwnedFd,
    /// For minting; may be empty.
    vcpus: RwLock<Vec<OwnedFd>>,
}

impl Vm {
    pub(crate) fn new(vm: BorrowedFd<'_>, vcpus: &[BorrowedFd<'_>]) -> io::Result<Vm> {
        let vcpus = vcpus.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        Ok(Vm { vm: vm.try_clone_to_owned()?, vcpus: RwLock::new(vcpus) })
    }
}

impl Kernel for Vm {
    fn set_logging(&self, slot: &MemorySlot, on: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.base.gpa(),
            memory_size: slot.pages * PAGE_SIZE,
            userspace_addr: slot.host_addr,
        };
        // SAFETY: the structure of the request, read only. A change of flags alone maps no other memory into
        // the guest: address and size are those that the caller vouched for as the slot's.
        checked(unsafe { ioctl_with_ref(&self.vm, KVM_SET_USER_MEMORY_REGION(), &region) }).map(drop)
    }

    fn get_dirty_log(&self, slot: &MemorySlot, buffer: &Words) -> io::Result<()> {
        // KVM writes one bit a page, in whole words.
        if (buffer.len() as u64) < slot.pages.div_ceil(64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: buffer.as_ptr().cast_mut().cast() };
        let request = kvm_dirty_log { slot: slot.id, padding1: 0, __bindgen_anon_1: bitmap };
        // SAFETY: the structure of the request; the bitmap it points to is writable (atomic words) and large
        // enough, as just checked.
        checked(unsafe { ioctl_with_ref(&self.vm, KVM_GET_DIRTY_LOG(), &request) }).map(drop)
    }

    fn clear_dirty_log(&self, slot: &MemorySlot, words: Range<usize>, mask: &Words) -> io::Result<()> {
        let first = words.start as u64 * 64;
        let pages = (words.end as u64 * 64).min(slot.pages).checked_sub(first);
        // The bitmap begins with the bit of the first page that is cleared.
        let (Some(mask), Some(num_pages)) = (mask.get(words), pages) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: mask.as_ptr().cast_mut().cast() };
        let request = kvm_clear_dirty_log {
            slot: slot.id,
            num_pages: u32::try_from(num_pages).map_err(|_| io::ErrorKind::InvalidInput)?,
            first_page: first,
            __bindgen_anon_1: bitmap,
        };
        // SAFETY: the structure of the request; KVM reads the words of the mask that were just cut out of it.
        checked(unsafe { ioctl_with_ref(&self.vm, KVM_CLEAR_DIRTY_LOG(), &request) }).map(drop)
    }

    fn refuse_manual_protect(&self) {
        // This fails if there is no manual protection.
        set_manual_protect(self.vm.as_fd(), 0).ok();
    }

    fn mint(&self, vcpu: usize, entries: u64, layout: &MemoryLayout) -> io::Result<()> {
        // A vCPU is added while no epoch is open, so nobody waits here.
        let vcpus = self.vcpus.read().unwrap_or_else(PoisonError::into_inner);
        mint::mint(vcpus.get(vcpu).ok_or(io::ErrorKind::Unsupported)?, entries, layout)
    }

    fn admit(&self, vcpu: OwnedFd) {
        self.vcpus.write().unwrap_or_else(PoisonError::into_inner).push(vcpu);
    }

    fn reset_dirty_rings(&self) -> io::Result<u64> {
        // SAFETY: takes no argument; it changes entries of the rings that user space gave back, which nobody
        // reads before KVM sets them again.
        checked(unsafe { ioctl_with_val(&self.vm, KVM_RESET_DIRTY_RINGS(), 0) })
    }
}

/// Bytes in a page of the host: KVM logs by these.
pub(crate) fn page_size() -> u64 {
    // SAFETY: has no preconditions.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0)
}

/// The value of a capability, 0 if absent.
pub(crate) fn check_extension(fd: BorrowedFd<'_>, capability: u32) -> u64 {
    // SAFETY: the argument is a number.
    checked(unsafe { ioctl_with_val(&fd, KVM_CHECK_EXTENSION(), capability.into()) }).unwrap_or(0)
}

/// Turns a capability of the VM on with one argument.
pub(crate) fn enable_cap(vm: BorrowedFd<'_>, capability: u32, argument: u64) -> io::Result<()> {
    let request = kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..Default::default() };
    // SAFETY: the structure of the request, read only.
    checked(unsafe { ioctl_with_ref(&vm.as_fd(), KVM_ENABLE_CAP(), &request) }).map(drop)
}

/// Sets how KVM_GET_DIRTY_LOG works: KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE or, with 0, as it did before Linux
/// 5.2.
pub(crate) fn set_manual_protect(vm: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)
}

/// Gives every vCPU made from now on a dirty ring of `bytes`.
pub(crate) fn enable_ring(vm: BorrowedFd<'_>, capability: u32, bytes: u64) -> io::Result<()> {
    enable_cap(vm, capability, bytes)
}

/// While it lives, this thread gets no signal.
///
/// Since Linux 6.17 a signal makes KVM_RESET_DIRTY_RINGS return between two entries; it then frees the batch
/// of up to 64 pages that it had gathered without write-protecting them: their next writes are lost. So each
/// re-arm blocks all signals. A thread that ends epochs and holds one of these all the time saves that: two
/// system calls, 0.7 to 1 µs an epoch. It must not change its signal mask meanwhile.
#[derive(Debug)]
pub struct SignalsBlocked {
    before: Option<libc::sigset_t>,
    /// Not Send: the mask is this thread's.
    _thread: PhantomData<*const ()>,
}

thread_local! {
    /// Whether this thread has one.
    static BLOCKED: Cell<bool> = const { Cell::new(false) };
}

impl SignalsBlocked {
    /// Blocks all signals in this thread, until it is dropped.
    pub fn now() -> SignalsBlocked {
        let before = (!BLOCKED.replace(true)).then(block_all);
        SignalsBlocked { before, _thread: PhantomData }
    }
}

/// Returns the mask that was in force.
fn block_all() -> libc::sigset_t {
    let mut all = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    // SAFETY: sigfillset initialises `all`; pthread_sigmask with a valid `how` cannot fail and stores the old
    // mask in `before`.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        before.assume_init()
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        let Some(before) = &self.before else { return };
        BLOCKED.set(false);
        // SAFETY: the mask that was in force in this same thread.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked() -> bool {
        let mut mask = MaybeUninit::uninit();
        // SAFETY: without a new mask it stores the present one.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), mask.as_mut_ptr());
            libc::sigismember(mask.as_ptr(), libc::SIGUSR1) == 1
        }
    }

    #[test]
    fn signals_stay_blocked_until_the_first_guard_goes() {
        assert!(!blocked());
        let outer = SignalsBlocked::now();
        drop(SignalsBlocked::now());
        assert!(blocked());
        drop(outer);
        assert!(!blocked());
        let _again = SignalsBlocked::now();
        assert!(blocked());
    }
}
