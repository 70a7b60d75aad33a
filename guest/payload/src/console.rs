//! The debug console, and power-off.

use core::fmt::{self, Write};
use core::panic::PanicInfo;

use crate::{abi, cpu};

/// Writes to the debug port, byte by byte (each byte is an exit: boot and panic messages only).
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::out8(abi::PORT_DEBUG, byte));
        Ok(())
    }
}

/// Writes one line to the debug console.
pub fn line(args: fmt::Arguments<'_>) {
    // `Console` never fails.
    let _ = writeln!(Console, "{args}");
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    line(format_args!("{info}"));
    cpu::power(abi::POWER_PANIC)
}
