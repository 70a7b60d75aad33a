//! Ring entries without a write of the guest.
//!
//! Holding entries back makes a ring smaller, to any size; but entries come only when the guest writes. KVM
//! also logs its own writes while a vCPU is loaded: the wall clock of MSR_KVM_WALL_CLOCK_NEW takes three
//! writes of one page for each KVM_SET_MSRS of it (arch/x86/kvm/x86.c, kvm_write_wall_clock), whether the
//! page is armed or not.
// UNSAFETY: ioctls with untyped arguments, and a few bytes of guest memory put back as they were.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use kvm_bindings::{KVMIO, kvm_msr_entry, kvm_msrs};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use crate::ioctl::checked;
use crate::layout::{MemoryLayout, PAGE_SIZE};

ioctl_iowr_nr!(KVM_GET_MSRS, KVMIO, 0x88, kvm_msrs);
ioctl_iow_nr!(KVM_SET_MSRS, KVMIO, 0x89, kvm_msrs);

/// MSR_KVM_WALL_CLOCK_NEW (arch/x86/include/uapi/asm/kvm_para.h).
const WALL_CLOCK: u32 = 0x4b56_4d00;
/// Writes of the page for each setting of the register.
pub(crate) const ENTRIES_PER_WRITE: u64 = 3;
/// Registers in a call: 96 entries in 8 µs.
const BATCH: usize = 32;
/// `struct pvclock_wall_clock` is 12 bytes.
const CLOCK_BYTES: usize = 16;
/// Where in the page it is written: at its end, because address 0 means no clock at all.
const OFFSET: u64 = PAGE_SIZE - CLOCK_BYTES as u64;

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

/// Bytes of guest memory, to be restored.
struct Saved {
    bytes: [Option<(*mut u8, u8)>; CLOCK_BYTES],
}

impl Saved {
    /// The bytes at a guest physical address, as far as it is memory of the layout.
    fn at(gpa: u64, layout: &MemoryLayout) -> Saved {
        let byte = |offset: usize| {
            let gpa = gpa.checked_add(offset as u64)?;
            let place = layout.host_addr(gpa)? as *mut u8;
            // SAFETY: an address in a slot, which is mapped as the layout says; the VM is stopped.
            Some((place, unsafe { place.read_volatile() }))
        };
        Saved { bytes: std::array::from_fn(byte) }
    }

    fn put_back(self) {
        for (place, byte) in self.bytes.into_iter().flatten() {
            // SAFETY: as it was read.
            unsafe { place.write_volatile(byte) };
        }
    }
}

/// Makes KVM write at least `entries` entries into the vCPU's ring, for the first page of the layout that
/// exists and for the page that the register names. The VM is stopped.
///
/// The guest finds its memory and the register unchanged. Setting the register back to its old value writes
/// the clock there once more; those bytes are restored, too.
pub(crate) fn mint(vcpu: &OwnedFd, entries: u64, layout: &MemoryLayout) -> io::Result<()> {
    let before = Msrs::get(vcpu)?;
    let place = layout.first_page().ok_or(io::ErrorKind::NotFound)?.gpa() + OFFSET;
    let saved = [Saved::at(place, layout), Saved::at(before, layout)];
    let mut left = entries.div_ceil(ENTRIES_PER_WRITE) as usize;
    let mut result = Ok(());
    while left > 0 && result.is_ok() {
        let now = left.min(BATCH);
        result = Msrs::of(now, place).set(vcpu);
        left -= now;
    }
    // Setting 0 writes nothing.
    let restored = Msrs::of(1, before).set(vcpu);
    saved.into_iter().for_each(Saved::put_back);
    result.and(restored)
}
