use acpi_tables::aml::EISAName;

use super::*;
use crate::map::{SLOTS, slot_address};
use crate::memory::Ram;

fn description(vcpus: u8, slots: usize) -> Description {
    Description { vcpus, devices: slots, serial: true }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Follows the pointers as a kernel does. Returns FADT, MADT and DSDT.
fn follow(description: &Description) -> [Vec<u8>; 3] {
    let ram = Ram::new(64 << 20, 64).unwrap();
    write(ram.memory(), description).unwrap();
    let read = |address: u64, len: usize| {
        let mut bytes = vec![0; len];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    };
    let table = |address: u64, signature: &[u8; 4]| {
        let len = u32::from_le_bytes(read(address + 4, 4).try_into().unwrap());
        let bytes = read(address, len as usize);
        assert_eq!((&bytes[..4], sum(&bytes)), (&signature[..], 0));
        assert!(address >= RSDP && address + u64::from(len) <= linux::ACPI.end());
        bytes
    };
    let rsdp = read(RSDP, 36);
    assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
    let xsdt = table(word(&rsdp, 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let (fadt, madt) = (table(word(&xsdt, 36), b"FACP"), table(word(&xsdt, 44), b"APIC"));
    let dsdt = table(word(&fadt, 140), b"DSDT");
    [fadt, madt, dsdt]
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_platform_is_hardware_reduced_and_ends_by_its_ports() {
    let [fadt, ..] = follow(&description(1, 1));
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    // No legacy devices, no keyboard controller.
    assert_eq!(fadt[109] & 0b11, 0);
    let port = |at: usize| {
        assert_eq!(fadt[at..at + 4], [1, 8, 0, 1], "a byte in port space");
        word(&fadt, at + 4)
    };
    assert_eq!((port(116), fadt[128]), (u64::from(ports::RESET), RESET_VALUE));
    assert_eq!((port(244), port(256)), (u64::from(ports::SLEEP_CONTROL), u64::from(ports::SLEEP_STATUS)));
}

#[test]
fn every_processor_has_a_local_apic() {
    for vcpus in [1, 2, 32] {
        let [_, madt, _] = follow(&description(vcpus, 0));
        assert_eq!(madt.len(), 44 + usize::from(vcpus) * 8 + 12);
        for index in 0..vcpus {
            let entry = &madt[44 + usize::from(index) * 8..][..8];
            assert_eq!(entry, [0, 8, index, index, 1, 0, 0, 0]);
        }
        let chip = &madt[madt.len() - 12..];
        assert_eq!(chip, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }
}

#[test]
fn every_slot_in_use_and_no_other_has_a_device() {
    for slots in [0, 1, 7, SLOTS] {
        let [.., dsdt] = follow(&description(1, slots));
        for index in 0..SLOTS {
            let at = slot_address(index);
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend((at.mmio as u32).to_le_bytes());
            resources.extend((at.len as u32).to_le_bytes());
            // Extended interrupt: consumer, edge, active high, of its own.
            resources.extend([0x89, 6, 0, 0b11, 1]);
            resources.extend(at.line.to_le_bytes());
            assert_eq!(contains(&dsdt, &resources), index < slots, "slot {index} of {slots}");
            assert_eq!(contains(&dsdt, format!("V{index:03}").as_bytes()), index < slots);
        }
        assert_eq!(dsdt.windows(9).filter(|window| *window == b"LNRO0005\0").count(), slots);
    }
}

#[test]
fn the_other_devices_are_there() {
    let [.., dsdt] = follow(&description(1, 0));
    let name = |eisa: &str| bytes(&EISAName::new(eisa));
    assert!(contains(&dsdt, &name("PNP0501")) && contains(&dsdt, &name("PNP0C0C")));
    assert!(contains(&dsdt, b"QEMU0001\0") && contains(&dsdt, b"ACPI0013\0"));
    // \_S5 = Package { 5 }
    assert!(contains(&dsdt, b"\x08_S5_\x12\x04\x01\x0a\x05"));
    let [.., without] = follow(&Description { serial: false, ..description(1, 0) });
    assert!(!contains(&without, &name("PNP0501")));
}

#[test]
fn the_largest_tables_fit() {
    let tables = tables(&description(32, SLOTS));
    let end = tables.iter().map(|(address, bytes)| address + bytes.len() as u64).max().unwrap();
    assert!(end < RSDP + 0x4000, "{end:#x}");
    let mut ranges: Vec<_> = tables.iter().map(|(at, bytes)| (*at, at + bytes.len() as u64)).collect();
    ranges.sort();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:x?}");
}
