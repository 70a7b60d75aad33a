//! Processors at the kernel's first instruction: the first in 64-bit mode on an identity map of the low 4
//! GiB, the others as after power-on, waiting for INIT and SIPI.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::kvm::msrs::{MSR_IA32_MISC_ENABLE, MSR_MTRR_DEF_TYPE};
use crate::map::linux::{DESCRIPTORS as DESCRIPTORS_AT, PAGE_TABLES, ZERO_PAGE};
use crate::vcpu::state::{Item, VcpuStateError};

/// Null, null, code (`__BOOT_CS`), data (`__BOOT_DS`): flat.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

/// How many gigabytes are mapped: all that kernel, parameters and command line can be in.
const GIGABYTES: u64 = 4;
const PRESENT_WRITE: u64 = 0x3;
const LARGE: u64 = 0x80;
/// Below the parameters; the kernel switches to its own stack at once.
const STACK: u64 = ZERO_PAGE.base - 16;

const CR0: u64 = 0x8001_0033; // PG, WP, NE, ET, MP, PE
const CR4_PAE: u64 = 0x20;
const EFER: u64 = 0x500; // LMA, LME
const RFLAGS: u64 = 0x2; // interrupts off

/// Everything is write-back, as firmware leaves it: MTRRs on, write-back by default.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// What firmware switches on and kernels look for: fast string instructions.
const FAST_STRINGS: u64 = 1;

/// Descriptors and page tables with their addresses.
pub(super) fn tables() -> Vec<(u64, Vec<u8>)> {
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let second = PAGE_TABLES.base + 4096;
    let third = |gigabyte: u64| second + 4096 + gigabyte * 4096;
    let pointers: Vec<_> = (0..GIGABYTES).map(|gigabyte| third(gigabyte) | PRESENT_WRITE).collect();
    let mut tables = vec![
        (DESCRIPTORS_AT.base, bytes(&DESCRIPTORS)),
        (PAGE_TABLES.base, bytes(&[second | PRESENT_WRITE])),
        (second, bytes(&pointers)),
    ];
    for gigabyte in 0..GIGABYTES {
        let pages: Vec<_> =
            (0..512).map(|page| gigabyte << 30 | page << 21 | PRESENT_WRITE | LARGE).collect();
        tables.push((third(gigabyte), bytes(&pages)));
    }
    tables
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Registers of the first vCPU. `fresh` is what KVM gave it at creation: task register, LDT and APIC base
/// stay.
fn first_registers(fresh: kvm_sregs, entry: u64) -> (kvm_sregs, kvm_regs) {
    let data = segment(DATA, 3, false);
    let mut sregs = kvm_sregs {
        cs: segment(CODE, 11, true),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        cr0: CR0,
        cr3: PAGE_TABLES.base,
        cr4: CR4_PAE,
        efer: EFER,
        ..fresh
    };
    sregs.gdt.base = DESCRIPTORS_AT.base;
    sregs.gdt.limit = (DESCRIPTORS.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let regs = kvm_regs { rip: entry, rsi: ZERO_PAGE.base, rsp: STACK, rflags: RFLAGS, ..Default::default() };
    (sregs, regs)
}

/// Sets the first vCPU, fresh or reset, to the kernel's entry.
pub(crate) fn start(fd: &VcpuFd, entry: u64) -> Result<(), VcpuStateError> {
    let ioctl = |item| move |source| VcpuStateError::Ioctl { item, source };
    let (sregs, regs) = first_registers(fd.get_sregs().map_err(ioctl(Item::Sregs))?, entry);
    fd.set_sregs(&sregs).map_err(ioctl(Item::Sregs))?;
    fd.set_regs(&regs).map_err(ioctl(Item::Regs))
}

/// Gives a fresh vCPU the model-specific registers that firmware would have set.
pub(crate) fn prepare_vcpu(fd: &VcpuFd) {
    for (index, bits) in [(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK), (MSR_IA32_MISC_ENABLE, FAST_STRINGS)] {
        if !set_bits(fd, index, bits) {
            // Not every processor has all of them, and every kernel starts without them.
            tracing::debug!(msr = format!("{index:#x}"), "MSR left as it is");
        }
    }
}

fn set_bits(fd: &VcpuFd, index: u32, bits: u64) -> bool {
    let mut entry = kvm_msr_entry { index, ..Default::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else { return false };
    if !fd.get_msrs(&mut msrs).is_ok_and(|got| got == 1) {
        return false;
    }
    entry.data = msrs.as_slice()[0].data | bits;
    Msrs::from_entries(&[entry]).is_ok_and(|msrs| fd.set_msrs(&msrs).is_ok_and(|set| set == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_of_the_low_gigabytes_maps_to_itself() {
        let tables = tables();
        let word = |address: u64| {
            let (at, bytes) =
                tables.iter().find(|(at, bytes)| (*at..*at + bytes.len() as u64).contains(&address)).unwrap();
            u64::from_le_bytes(bytes[(address - at) as usize..][..8].try_into().unwrap())
        };
        for address in [0, 0x7000, 0x10_0000, 0x100_0000, 0x7fff_ffff, 0xbfff_f000, 0xffff_ffff_u64] {
            let top = word(PAGE_TABLES.base + (address >> 39) * 8);
            let second = word((top & !0xfff) + (address >> 30 & 511) * 8);
            let third = word((second & !0xfff) + (address >> 21 & 511) * 8);
            assert_eq!((top & 3, second & 3, third & 0x83), (3, 3, 0x83));
            assert_eq!(third & !0x1f_ffff, address & !0x1f_ffff, "{address:#x}");
        }
    }

    #[test]
    fn tables_are_apart_from_each_other_and_where_the_map_says() {
        let mut used: Vec<_> =
            tables().into_iter().map(|(at, bytes)| (at, at + bytes.len() as u64)).collect();
        used.sort();
        assert!(used.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{used:x?}");
        let places = [DESCRIPTORS_AT, PAGE_TABLES];
        let placed = |&(from, to): &(u64, u64)| places.iter().any(|it| it.base <= from && to <= it.end());
        assert!(used.iter().all(placed), "{used:x?}");
    }

    #[test]
    fn the_first_processor_starts_in_64_bit_mode_with_the_parameters_in_rsi() {
        let fresh = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
        let (sregs, regs) = first_registers(fresh, 0x100_0200);
        assert_eq!((regs.rip, regs.rsi, regs.rflags & 0x200), (0x100_0200, ZERO_PAGE.base, 0));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.ds.selector), (0x10, 1, 0x18));
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        assert!(sregs.cr0 & 1 << 31 != 0 && sregs.efer & 1 << 10 != 0);
    }
}
