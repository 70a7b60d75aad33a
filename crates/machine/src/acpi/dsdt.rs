//! The DSDT: the devices that a kernel cannot find by itself, each with its name, registers and interrupt.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{Description, OEM, REVISION, SOFT_OFF, TABLE, bytes};
use crate::map::{SlotAddress, lines, ports, slot_address};

/// Bytes of a table's header.
const HEADER: u32 = 36;
/// Revision 2: integers of 64 bits.
const DSDT_REVISION: u8 = 2;
/// An absolute path, because the method that notifies is below `_SB_`, where a relative path would begin.
const POWER_BUTTON: &str = "\\_SB_.PWRB";
/// The value of a notification that means "pressed".
const PRESSED: u8 = 0x80;

pub(super) fn dsdt(description: &Description) -> Sdt {
    let mut devices = Vec::new();
    if description.serial {
        devices.extend(com1());
    }
    for number in 0..description.devices {
        devices.extend(virtio(number, slot_address(number)));
    }
    devices.extend(panic());
    devices.extend(power_button());
    let mut table = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM, TABLE, REVISION);
    table.append_slice(&Scope::raw("_SB_".into(), devices));
    table.append_slice(&soft_off());
    table
}

fn device(name: &str, children: Vec<&dyn Aml>) -> Vec<u8> {
    bytes(&Device::new(name.into(), children))
}

/// An interrupt line as all our devices have it: edge-triggered, active high, not shared.
fn line(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// 16550A at the ports where kernels expect the first serial line.
fn com1() -> Vec<u8> {
    let (first, count) = (ports::COM1.first, ports::COM1.count as u8);
    device(
        "COM1",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(first, first, 0, count), &line(lines::COM1)]),
            ),
        ],
    )
}

/// The name by which `virtio_mmio` of stock kernels finds its windows.
fn virtio(number: usize, slot: SlotAddress) -> Vec<u8> {
    device(
        &format!("V{number:03}"),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(number as u8)),
            // Cache-coherent, like everything in a PC.
            &Name::new("_CCA".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    // All slots lie below 4 GiB.
                    &Memory32Fixed::new(true, slot.mmio as u32, slot.len as u32),
                    &line(slot.line),
                ]),
            ),
        ],
    )
}

/// pvpanic: where the kernel reports its panic.
fn panic() -> Vec<u8> {
    device(
        "PVPN",
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(ports::PANIC, ports::PANIC, 1, 1)]),
            ),
            // Present, enabled, functioning, and nothing to show a user.
            &Name::new("_STA".into(), &0xbu8),
        ],
    )
}

/// The button, and the event device whose interrupt is its press.
fn power_button() -> Vec<u8> {
    let button = device("PWRB", vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]);
    let button_path = Path::new(POWER_BUTTON);
    let pressed = Notify::new(&button_path, &PRESSED);
    let event = device(
        "GED_",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line(lines::POWER_BUTTON)])),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(&Equal::new(&Arg(0), &lines::POWER_BUTTON), vec![&pressed])],
            ),
        ],
    );
    [button, event].concat()
}

/// `\_S5`: which sleep type switches the machine off.
fn soft_off() -> Vec<u8> {
    bytes(&Name::new("_S5_".into(), &Package::new(vec![&SOFT_OFF])))
}
