//! Compares the processor features that a guest was told of with this host's: a guest does not ask again
//! after a takeover, and KVM accepts any CPUID (Documentation/virt/kvm/api.rst, KVM_SET_CPUID2).

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

/// Registers of leaves in which each bit is a feature: {leaf, subleaf, EAX to EDX}.
const FEATURES: [(u32, u32, [bool; 4]); 12] = [
    (0x0000_0001, 0, [false, false, true, true]),
    (0x0000_0006, 0, [true, false, false, false]),
    (0x0000_0007, 0, [false, true, true, true]),
    (0x0000_0007, 1, [true, true, true, true]),
    (0x0000_0007, 2, [false, false, false, true]),
    // State that XCR0 and XSS may name, and the forms of XSAVE.
    (0x0000_000d, 0, [true, false, false, true]),
    (0x0000_000d, 1, [true, false, true, true]),
    (0x4000_0001, 0, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0007, 0, [false, true, false, true]),
    (0x8000_0008, 0, [false, true, false, false]),
    (0x8000_0021, 0, [true, false, true, false]),
];

/// Bits that depend on what the guest does and are no features of the host (`kvm_update_cpuid_runtime` in
/// arch/x86/kvm/cpuid.c): {leaf, register, bits}.
const RUNTIME: [(u32, usize, u32); 5] = [
    // MONITOR by MISC_ENABLE, OSXSAVE by CR4.
    (0x0000_0001, 2, 1 << 3 | 1 << 27),
    // The APIC by its base register.
    (0x0000_0001, 3, 1 << 9),
    // OSPKE by CR4.
    (0x0000_0007, 2, 1 << 4),
    // Whether a halt leaves the guest.
    (0x4000_0001, 0, 1 << 7),
    // The APIC again, in AMD's leaf.
    (0x8000_0001, 3, 1 << 9),
];

/// Features that a guest was told of but the host lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    leaf: u32,
    subleaf: u32,
    register: usize,
    bits: u32,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = ["EAX", "EBX", "ECX", "EDX"][self.register];
        write!(f, "CPUID leaf {:#x}.{} {register} {:#x}", self.leaf, self.subleaf, self.bits)
    }
}

/// The first features of `guest` that are not among those of `here`.
pub(crate) fn missing(guest: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<Missing> {
    FEATURES.into_iter().find_map(|(leaf, subleaf, registers)| {
        let of = |entries| registers_of(entries, leaf, subleaf);
        let (guest, here) = (of(guest), of(here));
        (0..4).filter(|&register| registers[register]).find_map(|register| {
            let runtime = RUNTIME.iter().filter(|(of, which, _)| (*of, *which) == (leaf, register));
            let ignored = runtime.fold(0, |all, (_, _, bits)| all | bits);
            let bits = guest[register] & !here[register] & !ignored;
            (bits != 0).then_some(Missing { leaf, subleaf, register, bits })
        })
    })
}

/// A missing leaf has no features.
fn registers_of(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = entries.iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf));
    found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn only_features_that_the_host_lacks_are_missing() {
        let guest = [entry(1, 0, [9, 9, 0b11, 0b01]), entry(7, 1, [0b1000, 0, 0, 0]), entry(0x19, 0, [1; 4])];
        let more = [entry(1, 0, [0, 0, 0b111, 0b11]), entry(7, 1, [0b1000, 5, 0, 0])];
        assert_eq!(missing(&guest, &more), None, "versions and unknown leaves are no features");
        let less = [entry(1, 0, [9, 9, 0b01, 0b01]), entry(7, 1, [0b1000, 0, 0, 0])];
        let found = missing(&guest, &less).unwrap();
        assert_eq!(found, Missing { leaf: 1, subleaf: 0, register: 2, bits: 0b10 });
        assert_eq!(found.to_string(), "CPUID leaf 0x1.0 ECX 0x2");
        let none = [entry(1, 0, [9, 9, 0b11, 0b01]), entry(7, 0, [0b1000, 0, 0, 0])];
        assert_eq!(missing(&guest, &none).unwrap().to_string(), "CPUID leaf 0x7.1 EAX 0x8");
    }

    #[test]
    fn what_the_guest_switches_is_no_feature() {
        let guest = [
            entry(1, 0, [0, 0, 1 << 27 | 1 << 3, 1 << 9]),
            entry(7, 0, [0, 0, 1 << 4, 0]),
            entry(0x4000_0001, 0, [1 << 7, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 0, 1 << 9]),
        ];
        assert_eq!(missing(&guest, &[]), None);
    }
}
