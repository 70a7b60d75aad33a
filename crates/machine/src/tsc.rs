//! The TSC offset of a vCPU, to which kvm-ioctls gives no access on x86.

// UNSAFETY: KVM_{HAS,GET,SET}_DEVICE_ATTR take the address of a value.
#![allow(unsafe_code)]

use std::time::Duration;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

const KVMIO: u32 = 0xAE;
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn attribute(value: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
        flags: 0,
    }
}

/// The guest's TSC minus the host's. `None` where the kernel has no such attribute (before 5.16).
pub(crate) fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut value = 0u64;
    let attr = attribute(&raw mut value);
    // SAFETY: the attribute points to a u64 of ours, which KVM writes (Documentation/virt/kvm/
    // devices/vcpu.rst, KVM_VCPU_TSC_OFFSET).
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    (result == 0).then_some(value)
}

/// Sets the offset of the vCPU. All vCPUs of a VM get the same one; otherwise the guest sees its clocks
/// differ and drops the TSC as a clock source. Returns false where the kernel cannot do it.
pub(crate) fn set_offset(vcpu: &VcpuFd, value: u64) -> bool {
    let attr = attribute(&raw const value);
    // SAFETY: the attribute points to a u64 of ours, which KVM reads.
    unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) == 0 }
}

/// Ticks of a counter of `khz` in `time`.
pub(crate) fn ticks(time: Duration, khz: u32) -> u64 {
    u64::try_from(time.as_nanos() * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_a_time() {
        assert_eq!(ticks(Duration::from_secs(1), 2_500_000), 2_500_000_000);
        assert_eq!(ticks(Duration::from_micros(3), 1_000_000), 3_000);
        assert_eq!(ticks(Duration::ZERO, u32::MAX), 0);
        assert_eq!(ticks(Duration::MAX, u32::MAX), u64::MAX);
    }
}
