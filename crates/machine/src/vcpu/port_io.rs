//! Reads of ports, element by element.

// UNSAFETY: how long an element is stands in a union of the kvm_run page, which kvm-ioctls does not show.
#![allow(unsafe_code)]

use kvm_ioctls::VcpuFd;

/// The elements of a read of a port, each to be answered by itself.
///
/// KVM fetches what a `rep ins` wants ahead, up to a page of it (`emulator_pio_in` and `pio_in_emulated` in
/// arch/x86/kvm), and kvm-ioctls hands all of it out as one row of bytes. That is many reads of one register,
/// not a wide read of several. Writes come one by one (`em_out`).
///
/// # Safety
/// `data` must be what [`VcpuFd::run`] has just returned [`IoIn`](kvm_ioctls::VcpuExit::IoIn) with.
pub(super) unsafe fn elements(fd: &mut VcpuFd, data: *mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    // SAFETY: the exit is one of a port, so KVM has filled this field of the union.
    let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io }.size;
    // SAFETY: the bytes are a page of their own behind kvm_run, in the mapping that `fd` keeps; it is
    // borrowed for as long as they are.
    let data = unsafe { &mut *data };
    data.chunks_mut(usize::from(size).max(1))
}
