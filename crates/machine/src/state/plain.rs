//! KVM's C structures as bytes.

// UNSAFETY: C structures are viewed as the bytes that they are in memory.
#![allow(unsafe_code)]

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

/// A type that is nothing but its bytes.
///
/// # Safety
/// Every bit pattern must be a valid value, and every byte must be initialised: KVM's ABI structures
/// spell their padding out as fields.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($t:ty),*) => { $(
        // SAFETY: an integer, or a KVM ABI structure of integers and arrays (and unions of them)
        // with explicit padding, allocated zeroed.
        unsafe impl Plain for $t {}
    )* };
}
plain!(
    u8,
    u32,
    u64,
    kvm_regs,
    kvm_sregs,
    kvm_xcrs,
    kvm_debugregs,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_vcpu_events,
    kvm_msr_entry,
    kvm_cpuid_entry2,
    kvm_clock_data,
    kvm_pit_state2,
    kvm_irqchip
);

/// The bytes of `value`.
pub(crate) fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: T is plain, so all its bytes are initialised; the lifetime is that of `value`.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The bytes of several values in a row.
pub(crate) fn bytes_of_slice<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: as in `bytes_of`, for a contiguous slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The value whose bytes these are; `None` when the length differs.
pub(crate) fn from_bytes<T: Plain>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: the length is right, any bit pattern is valid, and unaligned reads are allowed here.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}
