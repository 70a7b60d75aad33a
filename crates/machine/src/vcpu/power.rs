//! The ports by which a Linux guest ends, restarts or reports a panic: the ACPI registers that its FADT
//! names, the ways of older machines that kernels fall back to, and pvpanic.
//!
//! Nothing behind these ports has its own state. A checkpoint carries a request that nobody has carried out
//! yet.

use super::platform::AfterPort;
use crate::acpi::{RESET_VALUE, SOFT_OFF};
use crate::event::{PowerRequest, ResetWay};
use crate::map::ports::{self, KEYBOARD, RESET_CONTROL};

/// Command of the keyboard controller: pull the processor's reset line.
const PULL_RESET: u8 = 0xfe;
/// Reset control: reset.
const RESET_CPU: u8 = 1 << 2;
/// SLEEP_CONTROL_REG: now.
const SLEEP_ENABLE: u8 = 1 << 5;

/// pvpanic: the kernel panics.
const PANICKED: u8 = 1 << 0;
/// pvpanic: it panicked and now runs its crash kernel, which writes a dump and restarts the machine.
const CRASH_LOADED: u8 = 1 << 1;

/// Takes a write to one of the ports.
pub(super) fn write(port: u16, data: &[u8]) -> AfterPort {
    let &[value] = data else { return AfterPort::NotOurs };
    match port {
        ports::SLEEP_CONTROL if value == SLEEP_ENABLE | SOFT_OFF << 2 => AfterPort::Power(PowerRequest::Off),
        ports::RESET if value == RESET_VALUE => reset(ResetWay::Acpi),
        KEYBOARD if value == PULL_RESET => reset(ResetWay::Keyboard),
        RESET_CONTROL if value & RESET_CPU != 0 => reset(ResetWay::ResetControl),
        ports::PANIC if value & (PANICKED | CRASH_LOADED) != 0 => AfterPort::Panicked,
        ports::SLEEP_CONTROL | ports::SLEEP_STATUS | ports::RESET | ports::PANIC => AfterPort::Continue,
        KEYBOARD | RESET_CONTROL => AfterPort::Continue,
        _ => AfterPort::NotOurs,
    }
}

fn reset(way: ResetWay) -> AfterPort {
    AfterPort::Power(PowerRequest::Reset(way))
}

/// Answers a read from one of the ports. Returns false for any other.
pub(super) fn read(port: u16, data: &mut [u8]) -> bool {
    let [value] = data else { return false };
    *value = match port {
        // The guest woke from no sleep; the keyboard controller takes commands and has no data.
        ports::SLEEP_CONTROL | ports::SLEEP_STATUS | ports::RESET | KEYBOARD | RESET_CONTROL => 0,
        ports::PANIC => PANICKED | CRASH_LOADED,
        _ => return false,
    };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_end_is_understood() {
        let off = AfterPort::Power(PowerRequest::Off);
        assert_eq!(write(ports::SLEEP_CONTROL, &[0x20 | 5 << 2]), off);
        for (port, value, way) in [
            (ports::RESET, 1, ResetWay::Acpi),
            (KEYBOARD, 0xfe, ResetWay::Keyboard),
            (RESET_CONTROL, 0x06, ResetWay::ResetControl),
            (RESET_CONTROL, 0x0e, ResetWay::ResetControl),
        ] {
            assert_eq!(write(port, &[value]), reset(way), "{port:#x}");
        }
        assert_eq!(write(ports::PANIC, &[1]), AfterPort::Panicked);
        assert_eq!(write(ports::PANIC, &[2]), AfterPort::Panicked);
    }

    #[test]
    fn anything_else_does_nothing() {
        let harmless = [
            (ports::SLEEP_CONTROL, 5 << 2), // no "now"
            (ports::SLEEP_CONTROL, 0x20 | 3 << 2),
            (ports::SLEEP_STATUS, 0x80),
            (ports::RESET, 0),
            (KEYBOARD, 0xd1),
            (RESET_CONTROL, 0x02),
            (ports::PANIC, 0x80),
        ];
        for (port, value) in harmless {
            assert_eq!(write(port, &[value]), AfterPort::Continue, "{port:#x}");
        }
        // A PCI configuration address covers the port of the reset control.
        assert_eq!(write(RESET_CONTROL - 1, &0x8000_ff00u32.to_le_bytes()), AfterPort::NotOurs);
        assert_eq!(write(ports::RESET, &[1, 0]), AfterPort::NotOurs);
        assert_eq!(write(0x80, &[1]), AfterPort::NotOurs);
    }

    #[test]
    fn reads_say_what_pvpanic_understands_and_nothing_else() {
        let mut value = [0xaa];
        assert!(read(ports::PANIC, &mut value));
        assert_eq!(value, [3]);
        assert!(read(KEYBOARD, &mut value));
        assert_eq!(value, [0]);
        assert!(!read(0x80, &mut value) && !read(ports::PANIC, &mut [0; 4]));
    }
}
