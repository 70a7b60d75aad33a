//! What guests read in CPUID: KVM's offer, with the machine's own topology and without what this VMM does not
//! save, replicate or support.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Bits of a register of a leaf that guests must not see, with the reason.
type Hidden = (u32, u32, Register, u32);

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// {leaf, subleaf, register, bits}.
const HIDDEN: [Hidden; 17] = [
    // Nested virtualisation: its state is not in a checkpoint.
    (0x0000_0001, 0, Register::Ecx, 1 << 5),
    (0x8000_0001, 0, Register::Ecx, 1 << 2),
    // Performance counters, debug store and processor trace: their state belongs to the host's processor.
    (0x0000_0001, 0, Register::Ecx, 1 << 15 | 1 << 2),
    (0x0000_0001, 0, Register::Edx, 1 << 21),
    (0x8000_0001, 0, Register::Ecx, 1 << 23 | 1 << 24 | 1 << 28),
    (0x0000_0007, 0, Register::Ebx, 1 << 25),
    (0x0000_0007, 0, Register::Edx, 1 << 19),
    // Enclaves: memory that nobody can copy.
    (0x0000_0007, 0, Register::Ebx, 1 << 2),
    // Shadow stacks and branch tracking: the shadow stack pointer is in no MSR that KVM lists (since Linux
    // 6.18).
    (0x0000_0007, 0, Register::Ecx, 1 << 7 | 1 << 30),
    (0x0000_0007, 0, Register::Edx, 1 << 20),
    (0x0000_000d, 1, Register::Ecx, 1 << 11 | 1 << 12),
    // Tiles (AMX): their 8 KiB are in XCR0 only for a process that asks Linux for them, and this one does
    // not.
    (0x0000_0007, 0, Register::Edx, 1 << 22 | 1 << 24 | 1 << 25),
    (0x0000_0007, 1, Register::Eax, 1 << 21),
    (0x0000_0007, 1, Register::Edx, 1 << 8),
    (0x0000_000d, 0, Register::Eax, 1 << 17 | 1 << 18),
    (0x0000_000d, 1, Register::Eax, 1 << 4),
    // Asynchronous page faults: a fault under way at a checkpoint would never be answered after a takeover.
    (KVM_FEATURES, 0, Register::Eax, 1 << 4 | 1 << 10 | 1 << 14),
];

/// Leaves that are empty: performance counters, enclaves, trace, last branches, nested virtualisation, tiles,
/// encrypted memory, AMD's counters.
const SILENT: [u32; 9] = [0xa, 0x12, 0x14, 0x1c, 0x1d, 0x1e, 0x8000_000a, 0x8000_001f, 0x8000_0022];
/// Leaves of topology, which are rewritten.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// Sub-leaves that are empty: the places of tiles in the vector state.
const SILENT_PARTS: [(u32, u32); 2] = [(0xd, 17), (0xd, 18)];

const KVM_FEATURES: u32 = 0x4000_0001;
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const SEVERAL_PROCESSORS: u32 = 1 << 28;

/// CPUID of vCPU `index` of `vcpus`: one thread in each core, all cores in one package.
pub(super) fn of_vcpu(offer: &CpuId, index: u8, vcpus: u8, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let topology = Topology { index: index.into(), vcpus: vcpus.into() };
    let highest = offer.as_slice().iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    let mut entries = Vec::new();
    for entry in offer.as_slice().iter().filter(|entry| !TOPOLOGY.contains(&entry.function)) {
        let mut entry = *entry;
        hide(&mut entry);
        if entry.function == 1 {
            entry.ecx |= HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
        topology.describe(&mut entry);
        entries.push(entry);
    }
    if highest >= TOPOLOGY[0] {
        entries.extend(topology.levels());
    }
    entries
}

fn hide(entry: &mut kvm_cpuid_entry2) {
    if SILENT.contains(&entry.function) || SILENT_PARTS.contains(&(entry.function, entry.index)) {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
    }
    for (leaf, subleaf, register, bits) in HIDDEN {
        if (entry.function, entry.index) == (leaf, subleaf) {
            match register {
                Register::Eax => entry.eax &= !bits,
                Register::Ebx => entry.ebx &= !bits,
                Register::Ecx => entry.ecx &= !bits,
                Register::Edx => entry.edx &= !bits,
            }
        }
    }
}

struct Topology {
    index: u32,
    vcpus: u32,
}

impl Topology {
    /// Bits of an APIC ID that number the cores.
    fn bits(&self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }

    fn describe(&self, entry: &mut kvm_cpuid_entry2) {
        let ids = self.vcpus.next_power_of_two();
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | self.index << 24 | ids << 16;
                entry.edx &= !SEVERAL_PROCESSORS;
                if self.vcpus > 1 {
                    entry.edx |= SEVERAL_PROCESSORS;
                }
            }
            // Caches: those of the first two levels belong to a core, the others to all.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
                if entry.function == 4 {
                    entry.eax |= (ids - 1).min(0x3f) << 26;
                }
            }
            0x8000_0008 => entry.ecx = self.bits() << 12 | (self.vcpus - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (self.index, self.index, 0),
            _ => {}
        }
    }

    /// Leaf 0xb: threads of a core, cores of the package, end.
    fn levels(&self) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
            function: TOPOLOGY[0],
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: self.index,
            ..Default::default()
        };
        [level(0, 1, 0, 1), level(1, 2, self.bits(), self.vcpus), level(2, 0, 0, 0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn offer() -> CpuId {
        let all = [u32::MAX; 4];
        let cache = |kind: u32, level: u32| [0xffff_c000 | 1 << 8 | level << 5 | kind, 0, 0, 0];
        CpuId::from_entries(&[
            entry(0, 0, [0x1f, 0, 0, 0]),
            entry(1, 0, all),
            entry(4, 0, cache(1, 1)),
            entry(4, 1, cache(3, 3)),
            entry(4, 2, [0; 4]),
            entry(7, 0, all),
            entry(0xa, 0, all),
            entry(0xb, 0, all),
            entry(0xd, 1, all),
            entry(0xd, 17, all),
            entry(0xd, 18, all),
            entry(0x1d, 0, all),
            entry(0x1e, 0, all),
            entry(0x1f, 0, all),
            entry(KVM_FEATURES, 0, all),
            entry(0x8000_0001, 0, all),
            entry(0x8000_0008, 0, all),
            entry(0x8000_000a, 0, all),
            entry(0x8000_001e, 0, all),
        ])
        .unwrap()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
    }

    #[test]
    fn what_no_checkpoint_holds_is_hidden() {
        let entries = of_vcpu(&offer(), 0, 1, false);
        let (first, extended) = (find(&entries, 1, 0), find(&entries, 0x8000_0001, 0));
        assert_eq!((first.ecx & 1 << 5, extended.ecx & 1 << 2), (0, 0), "nested virtualisation");
        assert_eq!((find(&entries, 0xa, 0).eax, find(&entries, 0x8000_000a, 0).edx), (0, 0));
        assert_eq!(find(&entries, 7, 0).ecx & 1 << 7, 0, "shadow stacks");
        assert_eq!(find(&entries, 7, 0).edx & (1 << 22 | 1 << 24 | 1 << 25), 0, "tiles");
        assert_eq!((find(&entries, 0x1d, 0).eax, find(&entries, 0x1e, 0).ebx), (0, 0), "tiles");
        assert_eq!((find(&entries, 0xd, 17).eax, find(&entries, 0xd, 18).eax), (0, 0), "tiles");
        assert_eq!(find(&entries, KVM_FEATURES, 0).eax, !(1 << 4 | 1 << 10 | 1 << 14));
        assert_ne!(first.ecx & HYPERVISOR, 0);
    }

    #[test]
    fn the_deadline_timer_is_there_if_kvm_has_it() {
        let bits = CpuId::from_entries(&[entry(1, 0, [0; 4])]).unwrap();
        assert_eq!(find(&of_vcpu(&bits, 0, 1, false), 1, 0).ecx, HYPERVISOR);
        assert_eq!(find(&of_vcpu(&bits, 0, 1, true), 1, 0).ecx, HYPERVISOR | TSC_DEADLINE);
    }

    #[test]
    fn every_leaf_of_topology_tells_of_the_same_cores() {
        for vcpus in 1..=32 {
            for index in 0..vcpus {
                let entries = of_vcpu(&offer(), index, vcpus, true);
                let (id, count) = (u32::from(index), u32::from(vcpus));
                let ids = count.next_power_of_two();
                let first = find(&entries, 1, 0);
                assert_eq!((first.ebx >> 24, first.ebx >> 16 & 0xff), (id, ids));
                assert_eq!(first.edx & SEVERAL_PROCESSORS != 0, vcpus > 1);
                let (threads, cores) = (find(&entries, 0xb, 0), find(&entries, 0xb, 1));
                assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, id));
                assert_eq!((1 << cores.eax, cores.ebx, cores.ecx, cores.edx), (ids, count, 0x201, id));
                assert_eq!(find(&entries, 0xb, 2).ecx >> 8, 0);
                assert!(!entries.iter().any(|entry| entry.function == 0x1f));
                let amd = find(&entries, 0x8000_0008, 0).ecx;
                assert_eq!((amd & 0xff, 1 << (amd >> 12 & 0xf)), (count - 1, ids));
                assert_eq!(find(&entries, 0x8000_001e, 0).eax, id);
                let (own, shared) = (find(&entries, 4, 0).eax, find(&entries, 4, 1).eax);
                assert_eq!((own >> 14 & 0xfff, shared >> 14 & 0xfff, own >> 26), (0, ids - 1, ids - 1));
                assert_eq!(find(&entries, 4, 2).eax, 0);
            }
        }
    }
}
