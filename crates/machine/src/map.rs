//! Where everything is: guest physical addresses, I/O ports and interrupt lines.
//!
//! ```text
//! 0         what a guest boots from: [`linux`], or the payload's (outlive_guest::abi)
//! 1 MiB     memory, up to 3 GiB of it
//! 3 GiB     device window:  0xD000_0000 slots   0xFEC0_0000 I/O APIC   0xFEE0_0000 local APICs
//!                           0xFFFB_C000 KVM's own four pages
//! 4 GiB     the rest of the memory
//! ```
//!
//! The numbers are here and nowhere else in this crate. Those that the payload guest also needs come from its
//! ABI.

use outlive_guest::abi;

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Range {
    pub(crate) const fn new(base: u64, len: u64) -> Self {
        Self { base, len }
    }

    /// First address after it.
    pub(crate) const fn end(self) -> u64 {
        self.base + self.len
    }
}

/// First byte of the device window: memory below it ends here.
pub(crate) const HOLE_START: u64 = abi::LOW_RAM_END;
/// First byte after the device window: memory continues here.
pub(crate) const HOLE_END: u64 = abi::HIGH_RAM_ADDR;

/// Registers of the I/O APIC.
pub(crate) const IO_APIC: Range = Range::new(0xFEC0_0000, 0x1000);
/// Registers of the local APICs: each processor sees its own.
pub(crate) const LOCAL_APIC: Range = Range::new(0xFEE0_0000, 0x1000);
/// Where KVM on Intel keeps an identity page table; no guest touches it.
pub(crate) const KVM_IDENTITY_MAP: Range = Range::new(0xFFFB_C000, 0x1000);
/// Where KVM on Intel keeps a TSS; no guest touches it.
pub(crate) const KVM_TSS: Range = Range::new(0xFFFB_D000, 0x3000);

/// What a Linux guest is booted from, below and at 1 MiB.
pub(crate) mod linux {
    use super::Range;

    /// Descriptor table.
    pub(crate) const DESCRIPTORS: Range = Range::new(0x500, 0x20);
    /// Boot parameters; the first stack ends below them.
    pub(crate) const ZERO_PAGE: Range = Range::new(0x7000, 0x1000);
    /// Page tables of the first four gigabytes.
    pub(crate) const PAGE_TABLES: Range = Range::new(0x9000, 6 * 0x1000);
    /// Command line, with room for the longest that any kernel takes.
    pub(crate) const COMMAND_LINE: Range = Range::new(0x2_0000, 0x1_0000);
    /// First byte after the low memory that the guest may use.
    pub(crate) const LOW_END: u64 = 0x9_FC00;
    /// ACPI tables. The RSDP is the first: kernels look for it from here to 1 MiB.
    pub(crate) const ACPI: Range = Range::new(0xE_0000, 0x1_0000);
    /// Where a processor in real mode jumps to restart the machine.
    pub(crate) const RESET_VECTOR: Range = Range::new(0xF_FFF0, 0x10);
    /// Where memory continues: no part of a kernel may be below.
    pub(crate) const HIGH_START: u64 = 0x10_0000;
}

/// I/O ports. The payload guest's are those of its ABI.
pub(crate) mod ports {
    /// A range of ports.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Ports {
        pub(crate) first: u16,
        pub(crate) count: u16,
    }

    /// Registers of the serial port COM1, where every kernel looks for it.
    pub(crate) const COM1: Ports = Ports { first: 0x3f8, count: 8 };
    /// Command and status of the keyboard controller, of which only the reset line exists.
    pub(crate) const KEYBOARD: u16 = 0x64;
    /// pvpanic: a read gives the events that it understands, a write reports one.
    pub(crate) const PANIC: u16 = 0x510;
    /// ACPI's SLEEP_CONTROL_REG: sleep type in bits 2-4, "now" in bit 5.
    pub(crate) const SLEEP_CONTROL: u16 = 0x600;
    /// ACPI's SLEEP_STATUS_REG.
    pub(crate) const SLEEP_STATUS: u16 = 0x601;
    /// ACPI's RESET_REG.
    pub(crate) const RESET: u16 = 0x602;
    /// Reset control of PC chip sets.
    pub(crate) const RESET_CONTROL: u16 = 0xcf9;
}

/// Lines of the I/O APIC (GSIs).
pub(crate) mod lines {
    use outlive_guest::abi;

    /// How many there are.
    pub(crate) const COUNT: u32 = 24;
    /// The power button's event device: COM2's line, which no machine of ours has.
    pub(crate) const POWER_BUTTON: u32 = 3;
    /// COM1.
    pub(crate) const COM1: u32 = 4;
    /// The first slot; the others follow.
    pub(crate) const FIRST_SLOT: u32 = abi::NET_IRQ;
}

/// Slots of a board: one for each remaining line.
pub const SLOTS: usize = (lines::COUNT - lines::FIRST_SLOT) as usize;

/// Where the guest finds a slot's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotAddress {
    /// First address of the registers.
    pub mmio: u64,
    /// Bytes of registers.
    pub len: u64,
    /// Interrupt line (GSI).
    pub line: u32,
}

/// Where the guest finds the device of slot `index`. The payload guest knows the first one.
pub const fn slot_address(index: usize) -> SlotAddress {
    let len = abi::NET_MMIO_SIZE;
    SlotAddress { mmio: abi::NET_MMIO_ADDR + index as u64 * len, len, line: lines::FIRST_SLOT + index as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Panics if two of these share a number, or one lies outside of `within`.
    fn apart(mut ranges: Vec<(&str, Range)>, within: std::ops::Range<u64>) {
        ranges.sort_by_key(|(_, range)| range.base);
        for pair in ranges.windows(2) {
            let [(first, a), (second, b)] = pair else { unreachable!() };
            assert!(a.end() <= b.base, "{first} {a:x?} and {second} {b:x?}");
        }
        for (name, range) in ranges {
            assert!(within.start <= range.base && range.end() <= within.end, "{name} {range:x?}");
            assert!(range.len > 0, "{name}");
        }
    }

    #[test]
    fn nothing_in_the_device_window_overlaps() {
        let mut all = vec![
            ("I/O APIC", IO_APIC),
            ("local APIC", LOCAL_APIC),
            ("identity map", KVM_IDENTITY_MAP),
            ("TSS", KVM_TSS),
        ];
        let slots = (0..SLOTS).map(slot_address);
        all.extend(slots.map(|slot| ("a slot", Range::new(slot.mmio, slot.len))));
        apart(all, HOLE_START..HOLE_END);
    }

    #[test]
    fn nothing_that_a_guest_boots_from_overlaps() {
        let linux = vec![
            ("descriptors", linux::DESCRIPTORS),
            ("the end of the first stack", Range::new(linux::ZERO_PAGE.base - 256, 256)),
            ("boot parameters", linux::ZERO_PAGE),
            ("page tables", linux::PAGE_TABLES),
            ("command line", linux::COMMAND_LINE),
            ("ACPI tables", linux::ACPI),
            ("reset vector", linux::RESET_VECTOR),
        ];
        let low: Vec<_> = linux.iter().filter(|(_, range)| range.end() <= linux::LOW_END).copied().collect();
        assert_eq!(low.len(), 5, "the tables that outlive the boot are not in memory that the guest may use");
        apart(low, 0..linux::LOW_END);
        apart(linux, 0..linux::HIGH_START);
        let stacks = abi::STACK_SIZE * u64::from(abi::MAX_VCPUS);
        let payload = vec![
            ("boot information", Range::new(abi::BOOT_INFO_ADDR, abi::BOOT_INFO_LEN as u64)),
            ("descriptors", Range::new(abi::GDT_ADDR, 5 * 8)),
            ("page tables", Range::new(abi::PAGE_TABLES_ADDR, abi::PAGE_TABLES_END - abi::PAGE_TABLES_ADDR)),
            ("stacks", Range::new(abi::STACKS_ADDR, stacks)),
        ];
        apart(payload, 0..abi::IMAGE_ADDR);
    }

    #[test]
    fn no_port_is_given_twice() {
        let port = |name, first: u16, count| (name, Range::new(first.into(), count));
        let ours = [
            port("COM1", ports::COM1.first, ports::COM1.count.into()),
            port("keyboard", ports::KEYBOARD, 1),
            port("debug console", abi::PORT_DEBUG, 1),
            port("idle", abi::PORT_IDLE, 4),
            port("wake", abi::PORT_WAKE, 4),
            port("power", abi::PORT_POWER, 4),
            port("panic", ports::PANIC, 1),
            port("sleep control", ports::SLEEP_CONTROL, 1),
            port("sleep status", ports::SLEEP_STATUS, 1),
            port("reset", ports::RESET, 1),
            port("reset control", ports::RESET_CONTROL, 1),
        ];
        // What KVM answers by itself: both PICs, the PIT, and the line controls of the PICs.
        let kvms = [(0x20, 2), (0x40, 4), (0x61, 1), (0xa0, 2), (0x4d0, 2)];
        let kvms = kvms.map(|(first, count)| port("one of KVM's", first, count));
        apart(ours.into_iter().chain(kvms).collect(), 0..1 << 16);
    }

    #[test]
    fn no_line_is_given_twice() {
        // The timer, which the I/O APIC has on line 2 (kvm_setup_default_irq_routing gives it 0 and 2).
        let mut all = vec![0, 2, lines::POWER_BUTTON, lines::COM1];
        all.extend((0..SLOTS).map(|index| slot_address(index).line));
        let all = all.into_iter().map(|line| ("a line", Range::new(line.into(), 1)));
        apart(all.collect(), 0..lines::COUNT.into());
    }
}
