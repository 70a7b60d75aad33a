//! How a guest gets to its first instruction.

mod firmware;
pub(crate) mod linux;
mod payload;

pub use firmware::{DiskBoot, FirmwareError, LinuxBoot};
pub use linux::{KernelError, LinuxBootError};
pub use payload::{BootError, PayloadOptions};
pub(crate) use payload::{load, start_registers};
