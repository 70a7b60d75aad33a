//! Model-specific registers: which of them are part of a vCPU's state, and what they tell a guest about the
//! faults of its processor.

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::HostError;

/// Time-stamp counter.
pub(crate) const MSR_IA32_TSC: u32 = 0x10;
/// Deadline of the local APIC's timer, in TSC ticks.
pub(crate) const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Feature switches of the processor.
pub(crate) const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
/// Whether memory types are set, and the default type.
pub(crate) const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// From which attacks a processor is safe, and what it offers against the others.
pub(crate) const MSR_IA32_ARCH_CAPABILITIES: u32 = 0x10a;

/// The rest of the memory type registers, which guests may set and KVM does not list.
const MTRRS: [std::ops::RangeInclusive<u32>; 4] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f];

/// Registers that KVM lists and that are no part of a vCPU's state, with the reason.
const NO_STATE: [std::ops::RangeInclusive<u32>; 5] = [
    // MSR_KVM_WALL_CLOCK and its newer number. Setting one only makes KVM write the time of day into guest
    // memory (`kvm_write_wall_clock` in arch/x86/kvm/x86.c), so a restore would change the copy that a
    // checkpoint gave.
    0x11..=0x11,
    0x4b56_4d00..=0x4b56_4d00,
    // Forms of performance counters, and nested virtualisation. CPUID hides both, so no guest reads them.
    // They are the host's own, and another host may refuse them.
    0x345..=0x345,
    0x480..=0x493,
    // Hyper-V, which CPUID does not show: KVM keeps these registers from such a guest. Some of them count
    // time.
    0x4000_0000..=0x4000_ffff,
];

/// Whether a checkpoint has this register.
pub(crate) fn is_state(index: u32) -> bool {
    !NO_STATE.iter().any(|range| range.contains(&index))
}

/// The registers of a vCPU's state: of those that KVM lists, and the memory types, the ones that this vCPU
/// can read.
pub(super) fn of_vcpu(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, HostError> {
    let list = kvm.get_msr_index_list().map_err(super::ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let readable = |index: &u32| {
        let entry = kvm_msr_entry { index: *index, ..Default::default() };
        Msrs::from_entries(&[entry]).is_ok_and(|mut msrs| vcpu.get_msrs(&mut msrs).is_ok_and(|got| got == 1))
    };
    let mtrrs = MTRRS.into_iter().flatten().chain([MSR_MTRR_DEF_TYPE]);
    let mtrrs = mtrrs.filter(|index| !list.as_slice().contains(index));
    let all = list.as_slice().iter().copied().chain(mtrrs);
    Ok(all.filter(|index| is_state(*index)).filter(readable).collect())
}

/// What KVM can tell a guest of this host's processor in IA32_ARCH_CAPABILITIES; 0 if nothing.
pub(super) fn capabilities(kvm: &Kvm) -> u64 {
    let entry = kvm_msr_entry { index: MSR_IA32_ARCH_CAPABILITIES, ..Default::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else { return 0 };
    match kvm.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice()[0].data,
        _ => 0,
    }
}

/// Bits of IA32_ARCH_CAPABILITIES that report a weakness: RSBA and RRSBA. All others report that there is
/// none, or what a guest can do about it.
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;

/// What a guest would be wrong about on this host: what it was told it is safe from, or has a remedy for, and
/// is not here; and the weaknesses here that it was not told of. Bits of IA32_ARCH_CAPABILITIES.
pub(crate) fn false_promises(told: u64, here: u64) -> u64 {
    told & !here & !WEAKNESSES | here & !told & WEAKNESSES
}

/// Stack and entry point of SYSENTER.
const SYSENTER: [u32; 2] = [0x175, 0x176];
/// The first letters of AMD's and Hygon's names in EBX of CPUID leaf 0.
const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// The bits of a register that mean something to a guest with this CPUID. AMD's processors have SYSENTER in
/// 32-bit mode only. A guest's own write keeps the upper halves of its registers, and KVM's does not
/// (`svm_set_msr` in arch/x86/kvm/svm/svm.c).
pub(crate) fn used_bits(index: u32, cpuid: &[kvm_cpuid_entry2]) -> u64 {
    let amd = || cpuid.iter().any(|leaf| leaf.function == 0 && AMD.contains(&leaf.ebx));
    if SYSENTER.contains(&index) && amd() { u32::MAX.into() } else { u64::MAX }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amds_sysenter_has_32_bits() {
        let vendor =
            |name: &[u8; 4]| [kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*name), ..Default::default() }];
        for name in [b"Auth", b"Hygo"] {
            assert_eq!(SYSENTER.map(|index| used_bits(index, &vendor(name))), [0xffff_ffff; 2]);
            assert_eq!(used_bits(0x174, &vendor(name)), u64::MAX, "the segment is not cut");
        }
        assert_eq!(used_bits(0x175, &vendor(b"Genu")), u64::MAX);
        assert_eq!(used_bits(0x175, &[]), u64::MAX);
    }

    #[test]
    fn a_safer_host_keeps_every_promise_and_a_weaker_one_does_not() {
        const RDCL_NO: u64 = 1 << 0;
        const RSBA: u64 = 1 << 2;
        const MDS_NO: u64 = 1 << 5;
        assert_eq!(false_promises(RDCL_NO, RDCL_NO), 0);
        assert_eq!(false_promises(RDCL_NO, RDCL_NO | MDS_NO), 0, "safer than it knows");
        assert_eq!(false_promises(RDCL_NO | MDS_NO, RDCL_NO), MDS_NO);
        assert_eq!(false_promises(RSBA, 0), 0, "a weakness that is gone");
        assert_eq!(false_promises(0, RSBA), RSBA);
        assert_eq!(false_promises(RDCL_NO | RSBA, RSBA), RDCL_NO);
    }

    #[test]
    fn what_no_guest_can_see_or_set_is_no_state() {
        for index in [0x11, 0x4b56_4d00, 0x345, 0x480, 0x491, 0x4000_0020] {
            assert!(!is_state(index), "{index:#x}");
        }
        for index in [MSR_IA32_TSC, MSR_IA32_ARCH_CAPABILITIES, 0x277, 0xc000_0102, 0x4b56_4d01] {
            assert!(is_state(index), "{index:#x}");
        }
    }
}
