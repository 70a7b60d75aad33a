//! The few instructions the payload needs that Rust has no words for: port output and the time stamp counter.
//! IOPL 3 allows the former at CPL3.

use core::arch::asm;

use crate::abi;

/// OUT of one byte.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the payload's ports (abi.rs) are implemented by the VMM and touch no memory of ours.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// OUT of 32 bits. Not `nomem`: the VMM may have changed shared rings when IDLE returns.
fn out32(port: u16, value: u32) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

/// Sleeps until woken or until `timeout_us` microseconds passed; see [`abi::PORT_IDLE`].
pub fn idle(timeout_us: u32) {
    out32(abi::PORT_IDLE, timeout_us);
}

/// Wakes the vCPUs of the bit mask.
pub fn wake(vcpus: u32) {
    out32(abi::PORT_WAKE, vcpus);
}

/// Ends this run of the VM.
pub fn power(how: u32) -> ! {
    out32(abi::PORT_POWER, how);
    // The VMM stops us inside the OUT; if it lets us continue, we sleep.
    loop {
        idle(abi::IDLE_FOREVER);
    }
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; CR4.TSD is off.
    unsafe { core::arch::x86_64::_rdtsc() }
}
