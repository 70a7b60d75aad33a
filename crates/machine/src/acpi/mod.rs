//! The ACPI tables of a Linux guest, in which a stock kernel finds processors, interrupts, devices and the
//! ways to power off.
//!
//! ```text
//! RSDP (0xE0000) ─► XSDT ─┬─ FADT ─► DSDT   devices by name                (dsdt.rs)
//!                         └─ MADT           local APICs and the I/O APIC
//! ```
//!
//! The platform is *hardware-reduced* (ACPI 6.5, §4.1): no SCI, no PM timer, no legacy PIC and PIT; sleep and
//! reset are three ports of [`crate::map`]. Everything lies in the kilobytes below 1 MiB that the memory map
//! keeps from the guest, and is written anew at every boot.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use crate::map::{self, linux, ports};
use crate::memory::GuestMemory;

/// Address of the RSDP; the boot parameters contain it.
const RSDP: u64 = linux::ACPI.base;

/// The value for [`ports::RESET`].
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of "soft off", as the DSDT's `\_S5` says.
pub(crate) const SOFT_OFF: u8 = 5;

const OEM: [u8; 6] = *b"OUTLIV";
const TABLE: [u8; 8] = *b"OUTLIVE ";
const REVISION: u32 = 1;
/// FADT IAPC_BOOT_ARCH: no VGA, no CMOS clock; and, by their bits being 0, no legacy devices and no i8042.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// What the tables describe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Description {
    /// Processors; their local APICs are numbered from 0.
    pub(crate) vcpus: u8,
    /// virtio devices, in the slots from the first on.
    pub(crate) devices: usize,
    /// Whether there is a COM1.
    pub(crate) serial: bool,
}

/// The tables do not fit below 1 MiB or the guest has no memory there.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables do not fit below 1 MiB")]
pub struct AcpiError;

/// Writes all tables. The RSDP is the first byte of [`linux::ACPI`].
pub(crate) fn write(memory: &GuestMemory, description: &Description) -> Result<(), AcpiError> {
    for (address, bytes) in tables(description) {
        if address + bytes.len() as u64 > linux::ACPI.end() {
            return Err(AcpiError);
        }
        memory.write_slice(&bytes, GuestAddress(address)).map_err(|_| AcpiError)?;
    }
    Ok(())
}

/// Every table with its address.
fn tables(description: &Description) -> Vec<(u64, Vec<u8>)> {
    let mut place = Placer { next: RSDP + 64, tables: Vec::new() };
    let dsdt = place.put(&dsdt::dsdt(description));
    let fadt = place.put(&fadt(dsdt));
    let madt = place.put(&madt(description.vcpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place.put(&xsdt);
    let mut tables = place.tables;
    tables.push((RSDP, bytes(&Rsdp::new(OEM, xsdt))));
    tables
}

struct Placer {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl Placer {
    fn put(&mut self, table: &dyn Aml) -> u64 {
        let (address, bytes) = (self.next, bytes(table));
        self.next = (address + bytes.len() as u64).next_multiple_of(16);
        self.tables.push((address, bytes));
        address
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut table = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // There are no buttons in fixed registers; the DSDT has the power button as a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    table.iapc_boot_arch = BOOT_ARCH.into();
    table.reset_reg = port(ports::RESET);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(ports::SLEEP_CONTROL);
    table.sleep_status_reg = port(ports::SLEEP_STATUS);
    table.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut table =
        MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(map::LOCAL_APIC.base as u32));
    for index in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, map::IO_APIC.base as u32, 0));
    table
}

#[cfg(test)]
mod tests;
