//! Boots Linux by its 64-bit boot protocol (Documentation/arch/x86/boot.rst): kernel, initrd, command line
//! and parameters go into memory, the first vCPU starts at the kernel's 64-bit entry, and the others wait for
//! it.
//!
//! [`crate::map::linux`] has what is below 1 MiB. Above it the kernel is at its preferred address and the
//! initrd as high as the kernel allows.

mod kernel;
mod params;
mod registers;

use vm_memory::{Bytes, GuestAddress};

use super::firmware::{FirmwareError, LinuxBoot};
use crate::acpi::{self, AcpiError, Description};
use crate::map::linux::{COMMAND_LINE, RESET_VECTOR, ZERO_PAGE};
use crate::map::{HOLE_START, ports};
use crate::memory::{PAGE_SIZE, Ram};

pub use kernel::KernelError;
pub(crate) use registers::{prepare_vcpu, start};

/// The code at the reset vector: `mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp $-1`. Kernels jump
/// there when they know no better way to restart: on hardware-reduced ACPI they try EFI, which this machine
/// lacks, and then the BIOS.
const RESET_CODE: [u8; 9] = {
    let [low, high] = ports::RESET.to_le_bytes();
    [0xba, low, high, 0xb0, acpi::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Why a Linux guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LinuxBootError {
    /// The kernel file.
    #[error("the kernel cannot be booted: {0}")]
    Kernel(#[from] KernelError),
    /// Kernel and initrd together.
    #[error("an initrd of {initrd} bytes has no room beside the kernel below {limit:#x}")]
    Initrd {
        /// Its size.
        initrd: u64,
        /// Where it must end.
        limit: u64,
    },
    /// The kernel takes less.
    #[error("the command line has {len} bytes, but this kernel takes {limit} at most")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The boot image for reboots.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// Memory is missing.
    #[error("the VM has no memory at {0:#x}")]
    Memory(u64),
}

/// Puts everything into memory that the kernel needs. Returns its 64-bit entry.
///
/// Writes are logged, so this is also correct at a reboot of a protected VM. No vCPU may run meanwhile.
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
    put(COMMAND_LINE.base, command_line)?;
    put(COMMAND_LINE.base + command_line.len() as u64, &[0])?;
    let params = params::Params {
        header: kernel.header,
        command_line: COMMAND_LINE.base as u32,
        // Both lie below 3 GiB.
        initrd: (initrd as u32, boot.initrd().len() as u32),
        memory: ram.bytes(),
    };
    put(ZERO_PAGE.base, params.bytes().as_ref())?;
    for (address, bytes) in registers::tables() {
        put(address, &bytes)?;
    }
    put(RESET_VECTOR.base, &RESET_CODE)?;
    acpi::write(ram.memory(), description)?;
    Ok(kernel.entry)
}

/// As high as the kernel allows, where it is in nobody's way.
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
pub(crate) mod tests;
