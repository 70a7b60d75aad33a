//! Port reads, element by element.

// UNSAFETY: the length of an element is in a union of the kvm_run page, which kvm-ioctls does not expose.
#![allow(unsafe_code)]

use kvm_ioctls::VcpuFd;

/// The elements of a port read, each to be answered by itself.
///
/// KVM fetches the data of a `rep ins` ahead, up to a page of it (`emulator_pio_in` and `pio_in_emulated` in
/// arch/x86/kvm), and kvm-ioctls hands all of it out as one row of bytes. That is many reads of one register,
/// not one wide read of several registers. Writes come one by one (`em_out`).
///
/// # Safety
/// `data` must be what [`VcpuFd::run`] has just returned in [`IoIn`](kvm_ioctls::VcpuExit::IoIn).
pub(super) unsafe fn elements(fd: &mut VcpuFd, data: *mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    // SAFETY: the exit is a port exit, so KVM has filled this field of the union.
    let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io }.size;
    // SAFETY: the bytes are on a page of their own behind kvm_run, in the mapping that `fd` keeps; `fd` is
    // borrowed for as long as they are.
    let data = unsafe { &mut *data };
    data.chunks_mut(usize::from(size).max(1))
}
