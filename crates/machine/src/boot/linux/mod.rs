//! Boot of Linux by its 64-bit boot protocol (Documentation/arch/x86/boot.rst): kernel, initrd, command line
//! and parameters are put into memory, the first vCPU starts at the kernel's 64-bit entry, the others wait
//! for it.
//!
//! ```text
//! 0x500     descriptor table        0x7000     parameters ("zero page")
//! 0x9000    page tables             0x2_0000   command line
//! 0x9_fc00  end of low memory       0xE_0000   ACPI tables (crate::acpi)
//!                                   0xF_FFF0   what a jump to the reset vector does
//! 1 MiB ... kernel, at the address it prefers  ... initrd, as high as the kernel allows
//! ```

mod kernel;
mod params;
mod registers;

use vm_memory::{Bytes, GuestAddress};

use super::firmware::{FirmwareError, LinuxBoot};
use crate::acpi::{self, AcpiError, Description};
use crate::memory::{HOLE_START, PAGE_SIZE, Ram};

pub use kernel::KernelError;
pub(crate) use registers::{prepare_vcpu, start};

/// Where the boot parameters are.
const ZERO_PAGE: u64 = 0x7000;
/// Where the command line is, with room for the longest that any kernel takes.
const COMMAND_LINE: u64 = 0x2_0000;
/// First byte after the low memory that the guest may use.
const LOW_END: u64 = 0x9_FC00;
/// Where memory goes on: nothing of a kernel may lie below.
const HIGH_START: u64 = 0x10_0000;

/// Where a processor in real mode goes to start the machine anew. Kernels jump there when they know no better
/// way: on hardware-reduced ACPI they try EFI, which this machine has not, and then the BIOS.
const RESET_VECTOR: u64 = 0xF_FFF0;
/// What they find there: `mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp $-1`.
const RESET_CODE: [u8; 9] = {
    let [low, high] = acpi::ports::RESET.to_le_bytes();
    [0xba, low, high, 0xb0, acpi::ports::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Why a Linux guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LinuxBootError {
    /// The kernel file.
    #[error("the kernel cannot be booted: {0}")]
    Kernel(#[from] KernelError),
    /// Kernel and initrd together.
    #[error(
        "an initrd of {initrd} bytes has no room beside the kernel below {limit:#x}: give the VM more with --memory"
    )]
    Initrd {
        /// Its size.
        initrd: u64,
        /// Where it must end.
        limit: u64,
    },
    /// The kernel takes less.
    #[error("the command line has {len} bytes, this kernel takes {limit} at most")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// What was kept for reboots.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// No memory where there should be some.
    #[error("the VM has no memory at {0:#x}: give it more with --memory")]
    Memory(u64),
}

/// Puts everything into memory that the kernel needs. Returns its 64-bit entry.
///
/// Writes are logged, so this is right at a reboot of a protected VM too. Nothing may run meanwhile.
pub(crate) fn load(ram: &Ram, boot: &LinuxBoot, description: &Description) -> Result<u64, LinuxBootError> {
    let low_end = ram.bytes().min(HOLE_START);
    let put = |address: u64, bytes: &[u8]| {
        ram.memory().write_slice(bytes, GuestAddress(address)).map_err(|_| LinuxBootError::Memory(address))
    };
    let kernel = kernel::load(ram.memory(), boot.kernel(), low_end)?;
    let initrd = place_initrd(&kernel, boot.initrd().len() as u64, low_end)?;
    put(initrd, boot.initrd())?;
    let command_line = boot.command_line().as_bytes();
    let limit = kernel.command_line_limit();
    if command_line.len() > limit {
        return Err(LinuxBootError::CommandLine { len: command_line.len(), limit });
    }
    put(COMMAND_LINE, command_line)?;
    put(COMMAND_LINE + command_line.len() as u64, &[0])?;
    let params = params::Params {
        header: kernel.header,
        command_line: COMMAND_LINE as u32,
        // Both lie below 3 GiB.
        initrd: (initrd as u32, boot.initrd().len() as u32),
        memory: ram.bytes(),
    };
    put(ZERO_PAGE, params.bytes().as_ref())?;
    for (address, bytes) in registers::tables() {
        put(address, &bytes)?;
    }
    put(RESET_VECTOR, &RESET_CODE)?;
    acpi::write(ram.memory(), description)?;
    Ok(kernel.entry)
}

/// As high as the kernel allows: there it is in the way of nothing.
fn place_initrd(kernel: &kernel::Loaded, len: u64, low_end: u64) -> Result<u64, LinuxBootError> {
    let limit = low_end.min(kernel.initrd_limit());
    let start = limit.checked_sub(len).map(|start| start - start % PAGE_SIZE as u64);
    match start {
        _ if len == 0 => Ok(0),
        Some(start) if start >= kernel.end => Ok(start),
        _ => Err(LinuxBootError::Initrd { initrd: len, limit }),
    }
}

#[cfg(test)]
mod tests;
