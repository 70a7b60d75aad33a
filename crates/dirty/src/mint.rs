//! Ring entries without a write of the guest.
//!
//! Holding entries back makes a ring smaller, to any size; but entries come only as the guest writes. KVM also logs
//! what it writes itself while a vCPU is loaded: the wall clock of MSR_KVM_WALL_CLOCK_NEW, three writes of one page
//! for each KVM_SET_MSRS of it (arch/x86/kvm/x86.c, kvm_write_wall_clock), whether the page is armed or not.
// UNSAFETY: ioctls with untyped arguments, and a few bytes of guest memory put back as they were.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use kvm_bindings::{KVMIO, kvm_msr_entry, kvm_msrs};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use crate::kvm::checked;
use crate::layout::Slot;

ioctl_iowr_nr!(KVM_GET_MSRS, KVMIO, 0x88, kvm_msrs);
ioctl_iow_nr!(KVM_SET_MSRS, KVMIO, 0x89, kvm_msrs);

/// MSR_KVM_WALL_CLOCK_NEW (arch/x86/include/uapi/asm/kvm_para.h).
const WALL_CLOCK: u32 = 0x4b56_4d00;
/// Writes of the page for each setting of the register.
const ENTRIES_PER_WRITE: u64 = 3;
/// Registers in a call: 96 entries in 8 µs.
const BATCH: usize = 32;
/// `struct pvclock_wall_clock` is 12 bytes.
const CLOCK_BYTES: usize = 16;

/// `struct kvm_msrs` with its entries.
#[repr(C)]
struct Msrs {
    count: u32,
    padding: u32,
    entries: [kvm_msr_entry; BATCH],
}

impl Msrs {
    fn of(count: usize, data: u64) -> Msrs {
        let entry = kvm_msr_entry { index: WALL_CLOCK, reserved: 0, data };
        Msrs { count: count.min(BATCH) as u32, padding: 0, entries: [entry; BATCH] }
    }

    fn set(&self, vcpu: &OwnedFd) -> io::Result<()> {
        // SAFETY: the header and as many entries as it says.
        let set = checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_MSRS(), self) })?;
        if set == u64::from(self.count) { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn get(vcpu: &OwnedFd) -> io::Result<u64> {
        let mut msrs = Msrs::of(1, 0);
        // SAFETY: as above; KVM writes the entries.
        let got = checked(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_MSRS(), &mut msrs) })?;
        if got == 1 { Ok(msrs.entries[0].data) } else { Err(io::ErrorKind::Unsupported.into()) }
    }
}

/// Makes KVM write at least `entries` entries of the first page of `slot` into the vCPU's ring. The VM is stopped.
///
/// The guest finds its memory and the register as they were. Where the guest has set the register, KVM can only be
/// brought to know the old address by writing there once more: an entry of that page then comes as well, and the
/// bytes, which the guest reads only after it has set the register, are of now.
pub(crate) fn mint(vcpu: &OwnedFd, entries: u64, slot: &Slot) -> io::Result<()> {
    let before = Msrs::get(vcpu)?;
    let bytes = slot.host_addr as *mut [u8; CLOCK_BYTES];
    // SAFETY: the first bytes of the slot, which is mapped as its layout says; the VM is stopped.
    let saved = unsafe { bytes.read_volatile() };
    let mut left = entries.div_ceil(ENTRIES_PER_WRITE) as usize;
    let mut result = Ok(());
    while left > 0 && result.is_ok() {
        let now = left.min(BATCH);
        result = Msrs::of(now, slot.base.gpa()).set(vcpu);
        left -= now;
    }
    // Setting 0 writes nothing.
    let restored = Msrs::of(1, before).set(vcpu);
    // SAFETY: as above.
    unsafe { bytes.write_volatile(saved) };
    result.and(restored)
}
