//! Compares the processor that a guest was told of with this host's.
//!
//! A guest does not ask again after a takeover, and KVM accepts any CPUID (Documentation/virt/kvm/api.rst,
//! KVM_SET_CPUID2).

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

/// In what a guest's processor and this host's differ though the host lacks no feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// This host's physical addresses are shorter, so the guest would use addresses that fault here.
    AddressBits {
        /// The guest's.
        guest: u32,
        /// This host's.
        here: u32,
    },
    /// A part of the vector state has another size or place, so the saved bytes would land in the wrong
    /// registers.
    VectorState {
        /// The number of the part, which is its bit in XCR0.
        part: u32,
        /// The guest's size and place, in bytes.
        guest: (u32, u32),
        /// This host's.
        here: (u32, u32),
    },
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddressBits { guest, here } => {
                write!(f, "the VM has physical addresses of {guest} bits, this host has {here}")
            }
            Self::VectorState { part, guest, here } => write!(
                f,
                "part {part} of the vector state has {} bytes at byte {} in the VM, and {} at {} here",
                guest.0, guest.1, here.0, here.1
            ),
        }
    }
}

const ADDRESSES: u32 = 0x8000_0008;
/// Physical addresses of processors without the leaf [`ADDRESSES`].
const FEWEST_ADDRESS_BITS: u32 = 36;
const XSAVE: u32 = 0xd;
/// The first two parts are in the legacy area, whose layout is fixed.
const FIRST_PART: u32 = 2;

/// The first difference that matters between the processor of `guest` and this host's.
pub(crate) fn misfit(guest: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<Misfit> {
    let bits = |entries| match registers_of(entries, ADDRESSES, 0)[0] & 0xff {
        0 => FEWEST_ADDRESS_BITS,
        bits => bits,
    };
    let (guests, own) = (bits(guest), bits(here));
    if guests > own {
        return Some(Misfit::AddressBits { guest: guests, here: own });
    }
    let [low, _, _, high] = registers_of(guest, XSAVE, 0);
    let parts = u64::from(high) << 32 | u64::from(low);
    let place = |entries, part| {
        let [size, offset, ..] = registers_of(entries, XSAVE, part);
        (size, offset)
    };
    (FIRST_PART..63).filter(|part| parts >> part & 1 == 1).find_map(|part| {
        let (guest, here) = (place(guest, part), place(here, part));
        (guest != here).then_some(Misfit::VectorState { part, guest, here })
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

    #[test]
    fn vector_state_that_lies_elsewhere_and_addresses_that_are_too_long_do_not_fit() {
        let avx = |size, offset| entry(0xd, 2, [size, offset, 0, 0]);
        let parts = entry(0xd, 0, [0b1_0000_0111, 0, 0, 0]);
        let pkru = entry(0xd, 8, [0x40, 0x340, 0, 0]);
        let guest = [parts, avx(0x100, 0x240), pkru, entry(0x8000_0008, 0, [0x3028, 0, 0, 0])];
        assert_eq!(misfit(&guest, &guest), None);
        let more = [guest[0], guest[1], guest[2], entry(0x8000_0008, 0, [0x3030, 0, 0, 0])];
        assert_eq!(misfit(&guest, &more), None, "a guest may have shorter addresses than its host");
        let found = misfit(&more, &guest).unwrap().to_string();
        assert_eq!(found, "the VM has physical addresses of 48 bits, this host has 40");
        let found = misfit(&guest, &[guest[0], guest[1], guest[2]]).unwrap();
        assert_eq!(found, Misfit::AddressBits { guest: 40, here: 36 });

        let elsewhere = [guest[0], guest[1], entry(0xd, 8, [0x40, 0xa80, 0, 0]), guest[3]];
        let found = misfit(&guest, &elsewhere).unwrap().to_string();
        assert_eq!(
            found,
            "part 8 of the vector state has 64 bytes at byte 832 in the VM, and 64 at 2688 here"
        );
        let larger = [guest[0], avx(0x200, 0x240), guest[2], guest[3]];
        assert!(matches!(misfit(&guest, &larger), Some(Misfit::VectorState { part: 2, .. })));
        // A part that the guest does not have may lie anywhere.
        let without = [entry(0xd, 0, [0b111, 0, 0, 0]), guest[1], guest[3]];
        assert_eq!(misfit(&without, &elsewhere), None);
    }
}
